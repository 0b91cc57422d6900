"""Tests of the runs of benchmarks/convergence.py."""

import concurrent.futures
import functools
import json
import math

import fake_runs
import jax
import pytest
import tqdm

import convergence
import convergence_problems
import convergence_protocol as protocol
from convergence_protocol import Case
import convergence_times


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    yield


@pytest.fixture(name='in_threads')
def _in_threads(monkeypatch):
  monkeypatch.setattr(
    concurrent.futures,
    'ProcessPoolExecutor',
    lambda jobs, _: concurrent.futures.ThreadPoolExecutor(jobs),
  )


@pytest.fixture(name='few_tasks')
def _few_tasks(monkeypatch):
  for name in list(protocol.TASKS):
    if name not in ('language_1200', 'axes', 'rotated'):
      monkeypatch.delitem(protocol.TASKS, name)


@pytest.mark.slow
def test_continues_where_it_was_killed(
  in_threads, few_tasks, monkeypatch, tmp_path
):
  del in_threads, few_tasks
  path, runs = tmp_path / 'record.json', []

  def run(case):
    if len(runs) == 30:
      raise KeyboardInterrupt
    runs.append(case)
    return fake_runs.fake_run(case)

  monkeypatch.setattr(convergence, 'run', run)
  with pytest.raises(KeyboardInterrupt):
    convergence.run_all([], path, 1, 4)
  record = json.loads(path.read_text())
  assert len(record['runs']) == 30
  first, runs[:] = list(runs), []

  monkeypatch.setattr(
    convergence,
    'run',
    lambda case: runs.append(case) or fake_runs.fake_run(case),
  )
  convergence.run_all(list(record['runs']), path, 2, 4)
  assert runs
  assert not set(runs) & set(first)
  again = json.loads(path.read_text())
  assert again['runs'][:30] == record['runs'][:30]
  assert len(again['text_sha256']) == 64
  # A line for a run, and nothing else in the folder.
  lines = path.read_text().splitlines()
  assert sum('"optimizer"' in line for line in lines) == len(again['runs'])
  assert list(tmp_path.iterdir()) == [path]

  count = len(runs)
  convergence.run_all(again['runs'], path, 2, 4)
  assert len(runs) == count


@pytest.mark.slow
def test_runs_only_the_tasks_asked_for(in_threads, monkeypatch, tmp_path):
  del in_threads
  monkeypatch.setattr(convergence, 'run', fake_runs.fake_run)
  path = tmp_path / 'record.json'
  convergence.run_all([], path, 2, 4, ['axes'])
  runs = json.loads(path.read_text())['runs']
  assert {r['task'] for r in runs} == {'axes'}
  assert {r['optimizer'] for r in runs} == set(protocol.TASKS['axes'].peers)


@functools.cache
def regression(task, optimizer):
  return convergence.run(Case(task, optimizer, 1))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', [*protocol.SPACES, *protocol.UNTUNED])
def test_every_optimizer_runs(optimizer):
  result = regression('axes', optimizer)
  assert result['loss'] < 0.1 < result['curve'][0]
  assert len(result['curve']) == 20
  assert result['curve'][-1] == pytest.approx(result['loss'])
  sophia = ('sophia_g', 'sophia_h', *protocol.UNTUNED)
  assert ('win_rate' in result) == (optimizer in sophia)
  assert ('gamma' in result) == (optimizer == 'copied_g')
  json.dumps(result)


@pytest.mark.slow
def test_times_of_steps():
  found = convergence_times.measure('axes', tqdm.tqdm(disable=True), 2)
  assert len(found) == 2
  for times in found:
    assert list(times) == list(protocol.TASKS['axes'].peers)
    assert all(0 < x < 10 for x in times.values())


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'sophia_g'])
def test_a_diagonal_helps_only_along_the_axes(optimizer):
  along, rotated = (regression(t, optimizer) for t in ('axes', 'rotated'))
  assert along['settings'] == rotated['settings']
  assert along['loss'] < 1e-3 * rotated['loss']


@pytest.mark.slow
def test_language_runs(monkeypatch, compile_fast):
  del compile_fast
  problem = convergence_problems.language(8, 1, 1, 32)
  problem = problem._replace(validate_all=problem.validate)
  monkeypatch.setattr(convergence_problems, 'get', lambda name: problem)
  monkeypatch.setitem(
    protocol.TASKS, 'tiny', protocol.Task('', 'tiny', 60, tokens=1)
  )
  result = convergence.run(Case('tiny', 'sophia_g', 1))
  first, *_, last = result['curve']
  assert last == result['loss'] < first < math.log(256) + 0.1
