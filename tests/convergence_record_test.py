"""The committed runs, times and breakdowns are those of the protocol."""

import json
import pathlib

import pytest

import breakdown
import convergence
import convergence_protocol as protocol
import convergence_tables

RECORD = pathlib.Path(convergence.__file__).with_suffix('.json')


def test_committed_record_is_of_this_protocol():
  record = json.loads(RECORD.read_text())
  assert {'command', 'machine', 'versions', 'text_sha256'} < record.keys()
  assert record['runs']
  for result in record['runs']:
    case = protocol.case_of(result)
    assert result['settings'] == protocol.settings(case)
    assert result['steps'] == protocol.TASKS[case.task].steps
    assert result['device']
    assert result['jax']
    assert len(result['curve']) == 20
  cases = [protocol.case_of(r) for r in record['runs']]
  assert len(set(cases)) == len(cases)


@pytest.mark.parametrize('task', protocol.TASKS)
def test_committed_record_has_the_reported_runs(task):
  runs = json.loads(RECORD.read_text())['runs']
  rows = convergence_tables.summary(runs, task)
  expected = dict.fromkeys(protocol.TASKS[task].peers, protocol.SEEDS)
  found = {name: tuple(sorted(row['runs'])) for name, row in rows.items()}
  assert found == expected
  for name, row in rows.items():
    variants = {v: tuple(sorted(r)) for v, r in row['variants'].items()}
    assert variants == dict.fromkeys(
      protocol.VARIANTS.get((task, name), ()), protocol.SEEDS
    )


@pytest.mark.parametrize('task', ['language_1200', 'photographs'])
def test_committed_times_of_optimizers(task):
  found = json.loads(RECORD.with_name('convergence_times.json').read_text())
  for name in protocol.TASKS[task].peers:
    ratio = convergence_tables.time_of_a_step(found['ratio'], task, name)
    assert (ratio == 1.0) if name == 'adamw' else (0.8 < ratio < 1.5)


def test_breakdowns_are_of_these_settings():
  path = RECORD.with_name('breakdown.json')
  found = json.loads(path.read_text())['cases']
  assert [
    case | {'losses': c['losses']}
    for c, case in zip(found, breakdown.cases(), strict=True)
  ] == found
