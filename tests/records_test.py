"""Each benchmark runs, and the pages have what the committed files show."""

import dataclasses
import math
import pathlib
import subprocess
import sys

import jax
import pytest

import convergence_protocol
import estimators
import records
import stability
import step_cost
import tpu_cases

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'benchmarks/README.md', *(ROOT / 'docs').glob('*.md')]


def test_record_is_read_back(tmp_path):
  path = tmp_path / 'record.json'
  path.write_text('of an earlier run')
  results = {'table': {'a': {'MB': 1.5}}, 'cases': [{'γ': 0.1}, {'γ': 0.2}]}
  records.write(path, results)
  assert records.read(path) == results
  assert f'"jax": "{jax.__version__}"' in path.read_text()
  assert '\n{"γ": 0.1},\n{"γ": 0.2}\n' in path.read_text()
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize('file', [
    'convergence',
    'estimators',
    'stability',
    'step_cost',
    'step_cost_h100',
    'tpu',
])  # fmt: skip
def test_pages_have_what_the_files_show(file):
  name = file.removesuffix('_h100')
  command = [f'benchmarks/{name}.py', f'--show=benchmarks/{file}.json']
  shown = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    encoding='utf-8',
    timeout=120,
  ).stdout
  if name == 'convergence':  # docs/results.md rounds the others.
    _, shown = shown.split('### The first 180 of 1,200 steps\n')
  assert shown.strip()
  text = '\n'.join(page.read_text() for page in PAGES)
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


@pytest.mark.slow
def test_estimators_run(monkeypatch, compile_fast):
  del compile_fast
  rows = estimators.rows()[:2]
  monkeypatch.setattr(estimators, 'rows', lambda: rows)
  table = estimators.measure(draws=2)
  assert list(table) == ['gradient', 'H, whole batch', 'H, 2 parts']
  assert table['H, 2 parts']['scatter'] > 0


@pytest.mark.slow
def test_step_cost_runs(monkeypatch, compile_fast):
  del compile_fast
  update, step = step_cost.update_rows(), step_cost.step_rows()
  monkeypatch.setattr(
    step_cost, 'update_rows', lambda: update[:1] + update[2:5]
  )
  monkeypatch.setattr(
    step_cost, 'step_rows', lambda: step[:1] + step[3:4] + step[-2:]
  )
  sizes = step_cost.SIZES['quick']
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    results = {
      'update': step_cost.measure_update(sizes.side, 1),
      'step': step_cost.measure_step(sizes, 1),
      'optimizers': {'axes': step_cost.measure_optimizers('axes', 1)},
    }
  for name in 'sophia, H', 'sophiaw', 'sophiaw, two programs':
    assert results['step'][name]['FLOPs/adamw'] > 1
  assert results['optimizers']['axes'].keys() == set(
    convergence_protocol.TASKS['axes'].peers
  )
  assert 'sophia, g², two programs' in step_cost.render(results)


@pytest.mark.slow
def test_stability_runs(data_dir, monkeypatch, compile_fast):
  del compile_fast
  config = dataclasses.replace(
    stability._CONFIG,
    data_dir=data_dir,
    vocab_size=64,
    width=8,
    num_heads=2,
    num_layers=1,
    block_size=8,
  )
  monkeypatch.setattr(stability, '_CONFIG', config)
  settings = stability.Settings(
    sequences=4, num_steps=20, parts=2, target_win_rate=0.3
  )
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    loss, _ = stability.run(settings, seed=1)
  assert 0 < loss < math.log(64) + 0.1
