"""Tests of the files of the benchmarks, and of the tables in the pages."""

import pathlib
import subprocess
import sys

from absl import app
import jax
import pytest

import records
import tpu_cases
import tpu_tables

ROOT = pathlib.Path(__file__).parents[1]


def test_record_is_read_back(tmp_path):
  path = tmp_path / 'record.json'
  path.write_text('of an earlier run')
  results = {'table': {'a': {'MB': 1.5}}, 'cases': [{'γ': 0.1}, {'γ': 0.2}]}
  records.write(path, **results)
  record = records.read(path)
  assert record.pop('command').startswith('python benchmarks/')
  assert record.pop('machine')['backend'] == jax.default_backend()
  assert record.pop('versions')['jax'] == jax.__version__
  assert record == results
  assert '\n{"γ": 0.1},\n{"γ": 0.2}\n' in path.read_text()
  assert list(tmp_path.iterdir()) == [path]


def test_arguments_that_are_no_flags_are_refused():
  records.check_only_flags(['gamma.py'])
  with pytest.raises(app.UsageError, match=r"as --output=f; got \['gamma'\]"):
    records.check_only_flags(['gamma.py', 'gamma'])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'file', 'page'),
  [
    ('breakdown', 'breakdown', 'benchmarks/README.md'),
    ('estimators', 'estimators', 'benchmarks/README.md'),
    ('gamma', 'gamma', 'docs/mathematics.md'),
    ('stability', 'stability', 'benchmarks/README.md'),
    ('step_cost', 'step_cost', 'benchmarks/README.md'),
    ('step_cost', 'step_cost_h100', 'docs/cost.md'),
    ('tpu', 'tpu', 'docs/cost.md'),
  ],
)
def test_pages_have_what_the_files_show(name, file, page):
  shown = subprocess.run(
    [sys.executable, f'benchmarks/{name}.py', f'--show=benchmarks/{file}.json'],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    encoding='utf-8',
    timeout=120,
  ).stdout
  assert shown
  text = (ROOT / page).read_text()
  for line in shown.splitlines():
    # The page may use another name for a row of a Markdown table.
    assert line.split('|', 2)[-1] in text


def test_programs_for_tpus_can_be_compiled_again():
  names = [case.name for case in tpu_cases.cases()]
  assert len(set(names)) == len(names)
  found = records.read(ROOT / 'benchmarks/tpu.json')['cases']
  assert {
    ', '.join((x['table'], x['row'], x['program'])) for x in found
  } <= set(names)


def test_tables_of_some_programs_for_tpus():
  cases = records.read(ROOT / 'benchmarks/tpu.json')['cases']
  for case in cases:
    table = tpu_tables.render([case])
    assert 'goal' in table
    # Only both of two programs make a row of the update.
    assert case['row'] in table or case['program'] != 'one'
