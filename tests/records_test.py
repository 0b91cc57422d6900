"""Each benchmark runs, and the pages have what the committed files show."""

import dataclasses
import math
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import adapted_gamma
import convergence_protocol
import convergence_tables
import estimators
import records
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
    'adapted_gamma',
    'estimators',
    'step_cost',
    'step_cost_h100',
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
  assert shown.strip()
  text = '\n'.join(page.read_text() for page in PAGES)
  for line in shown.splitlines():
    # The page may use another name for a row of a Markdown table.
    assert line.split('|', 2)[-1] in text


def read(name):
  return records.read(ROOT / f'benchmarks/{name}.json')


def test_losses_are_those_of_the_record():
  runs, times = read('convergence')['runs'], read('convergence_times')
  tasks = [*convergence_protocol.LENGTHS, 'large_batch']
  summaries = [convergence_tables.summary(runs, task) for task in tasks]

  def cells(name, count, form):
    for summary in summaries[:count]:
      found = summary.get(name, {}).get('runs', {}).values()
      losses = np.array([run['loss'] for run in found])
      yield form(losses) if losses.size else '–'

  readme = (ROOT / 'README.md').read_text()
  names = 'adamw', 'nadamw', 'muon', 'soap', 'copied_g', 'eigen_g'
  for name in names:
    losses = cells(name, 3, lambda x: f'{x.mean():.3f}')
    time = times['optimizers']['language'].get(name, {}).get('time/adamw', 1)
    row = ' | '.join([*losses, f'{time:.2f}' if name != 'adamw' else '1'])
    assert f'| {row} |' in readme
  results = (ROOT / 'docs/results.md').read_text()
  for name in *names, 'copied_h', 'eigen_h':
    row = cells(name, 4, lambda x: f'{x.mean():.3f} ± {x.std(ddof=1):.3f}')
    assert f'| {" | ".join(row)} |' in results
  for task in 'language_600', 'language_2400':  # Half of the steps.
    for name, row in convergence_tables.summary(runs, task).items():
      losses = np.array([run['loss'] for run in row['runs'].values()])
      assert f'{losses.mean():.3f} ± {losses.std(ddof=1):.3f}' in results
      if name == 'soap':
        assert f'at {losses.mean():.3f} with' in readme
  half = times['optimizers']['language']['soap']['time/adamw'] / 2
  assert f'after {half:.2f} of the time' in readme
  step = read('step_cost')['step']
  for row in 'SOAP', 'sophiaw', 'sophiaw, eigenbasis':
    assert f'{step[row]["compile/adamw"]:.1f}' in readme


def compiled_for_tpus():
  return {(x['table'], x['row'], x['program']): x for x in read('tpu')['cases']}


def tables_of_scaling():
  """Returns the rows of the tables after the first, without row names."""
  page = (ROOT / 'docs/scaling.md').read_text()
  _, page = page.split('## What a step costs\n')
  rows = re.findall(r'^\|(.*)\|$', page, re.M)
  return [[cell.strip() for cell in row.split('|')] for row in rows]


def test_costs_in_scaling_are_those_of_the_files():
  step = read('step_cost')['step']
  rows = 'optax.contrib.sophia', 'sophiaw', 'sophiaw, two programs'
  rows += 'sophiaw, eigenbasis', 'SOAP'
  cells = [
    ['1', *(f'{step[row][f"{key}/adamw"]:.{digits}f}' for row in rows)]
    for key, digits in (('FLOPs', 3), ('MB', 2), ('time', 2), ('compile', 1))
  ]
  # Words of each parameter of four matrices.
  words = lambda case: case['temporary bytes'] / (16 * tpu_cases.SIZE**2)
  temporary = [
    f'{words(compiled_for_tpus()["update", *row]):.1f}'
    for row in (
      ('optax.adamw', 'one'),
      ('optax.contrib.sophia, H', 'one'),
      ('sophiaw, G', 'one'),
      ('sophiaw, G', 'ordinary'),
    )
  ]
  shown = [row[1:] for row in tables_of_scaling()[3:8]]
  assert shown == [[*temporary, '', ''], *cells]
  h100, page = read('step_cost_h100'), (ROOT / 'docs/scaling.md').read_text()
  update = 'sophia, g², adam_b2'  # That of sophiaw.
  times = [
    f'{h100[table][row]["time/adamw"]:.2f}'
    for table, row in (
      ('step', 'sophia, G, 1/8'),
      ('step', 'sophia, G, 1/2'),
      ('step', 'optax.contrib.sophia'),
      ('update', update),
      ('update', f'{update}, two programs'),
      ('update', 'optax.contrib.sophia, H'),
    )
  ]
  (sentences,) = re.findall(r'\* On an H100 (.*?)\n  \[Bench', page, re.S)
  assert re.findall(r'\d\.\d\d', sentences) == times


def test_sent_bytes_in_scaling_are_those_of_the_file():
  cases = compiled_for_tpus()
  sent = lambda *case: round(cases[case]['sent bytes'][0] / 1e6)
  rows = 0
  for name, *found in tables_of_scaling():
    if not (label := re.fullmatch(r'(\S+), (\d+) of (\w+), `(.*)`', name)):
      continue
    size, devices, chip, mesh = label.groups()
    table = f'{size}, {chip}-{devices}'
    adamw = sent(table, f'{mesh} adamw', 'one')
    assert sent(table, f'{mesh} sophia_h', 'ordinary') == adamw
    expected = [f'{adamw:,}']
    for optimizer in ('sophia_h', 'sophia_g'):
      n = sent(table, f'{mesh} {optimizer}', 'refresh')
      expected.append(f'{n:,} ({0.9 + n / adamw / 10:.3f})')
    assert found == expected
    rows += 1
  assert rows == 6


def test_eigenbasis_in_scaling_is_that_of_the_file():
  cases = compiled_for_tpus()
  case = lambda *names: cases['124M, v5e-8', *names]
  adamw = case('fsdp:8 adamw', 'one')
  columns = [
    [
      np.ravel(case('fsdp:8 sophiaw, eigenbasis', program)[key])[0]
      / np.ravel(adamw[key])[0]
      for key in ('sent bytes', 'FLOPs', 'temporary bytes', 'compile seconds')
    ]
    for program in ('ordinary', 'refresh')
  ]
  shown = [row[1:] for row in tables_of_scaling()[-4:]]
  digits = 2, 2, 2, 1
  assert shown == [
    [f'{x:.{n}f}' for x in row]
    for row, n in zip(np.transpose(columns), digits, strict=True)
  ]


def test_memory_in_scaling_is_that_of_the_file():
  cases = compiled_for_tpus()
  columns = []
  for table in ('124M, v5e-8', '124M, 8 head chunks, v5e-8'):
    memory = lambda row, program, table=table: cases.get(
      (table, f'fsdp:8 {row}', program), {}
    ).get('temporary bytes')
    adamw = memory('adamw', 'one')
    sizes = [adamw] + [
      memory(row, 'refresh')
      for row in ('sophia_g', 'sophia_g, Gumbel', 'sophia_h')
    ]
    columns.append([f'{n / 1e6:,.0f} MB' if n else '' for n in sizes])
    ratios = [f'{n / adamw:.2f}' if n else '' for n in sizes]
    columns.append(['1', *ratios[1:]])
  rows = [row[1:] for row in tables_of_scaling()]
  start = rows.index([column[0] for column in columns])
  assert rows[start : start + 4] == np.transpose(columns).tolist()


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
  names = ['G, whole batch', 'G, 2 parts']
  rows = [row for row in estimators.rows() if row.name in names]
  monkeypatch.setattr(estimators, 'rows', lambda: rows)
  table = estimators.measure(draws=20)
  assert list(table) == ['gradient', *names]
  assert 0.3 < table['G, 2 parts']['variance/whole'] < 0.8
  assert table['G, whole batch']['scatter'] > 0.5


@pytest.mark.slow
def test_step_cost_runs(monkeypatch, compile_fast):
  del compile_fast
  update, step = step_cost.update_rows(), step_cost.step_rows()
  monkeypatch.setattr(
    step_cost, 'update_rows', lambda: update[:1] + update[2:5]
  )
  monkeypatch.setattr(
    step_cost, 'step_rows', lambda: step[:1] + step[2:3] + step[4:6]
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
def test_adapted_gamma_runs(data_dir, monkeypatch, compile_fast):
  del compile_fast
  config = dataclasses.replace(
    adapted_gamma._CONFIG,
    data_dir=data_dir,
    vocab_size=64,
    width=8,
    num_heads=2,
    num_layers=1,
    block_size=8,
  )
  monkeypatch.setattr(adapted_gamma, '_CONFIG', config)
  settings = dataclasses.replace(
    adapted_gamma.TUNED['sophia_g'],
    sequences=8,
    curvature_of=8,
    num_steps=20,
    target_win_rate=0.3,
  )
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    loss, history = adapted_gamma.run('sophia_g', settings)
  assert 0 < loss < math.log(64) + 0.1
  assert len(history) == 2
