"""Tests of what benchmarks/convergence.py runs and of the figures it prints."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import convergence
from convergence import Case
import gpt_configs


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    yield


def test_trials_are_drawn_by_their_number_alone():
  cases = convergence.trials(12)
  assert len(set(cases)) == 12 * 4 * len(convergence.TASKS)
  drawn = {json.dumps([c.task, c.optimizer, c.settings]) for c in cases}
  assert len(drawn) == len(cases)
  for case in cases:
    assert dataclasses.replace(case, seed=1).settings == case.settings
    assert set(case.settings) == set(
      convergence.RANGES[case.task][case.optimizer]
    )
  rates = [
    c.settings['learning_rate']
    for c in convergence.trials(200)
    if (c.task, c.optimizer) == ('gpt_1m_2k', 'adamw')
  ]
  assert 1e-3 <= min(rates) < 1.2e-3 < 1.7e-2 < max(rates) <= 2e-2
  assert np.median(rates) == pytest.approx(math.sqrt(1e-3 * 2e-2), rel=0.3)


def test_steered_case_differs_in_gamma_alone():
  case = Case('gpt_1m_2k', 'sophia_g', 3)
  steered = dataclasses.replace(case, steered=True).settings
  assert steered.pop('target_win_rate') == 0.3
  assert steered.pop('gamma') == 0.04
  assert steered.items() < case.settings.items()


def result(task, optimizer, trial, losses, seed=0, steered=False):
  case = Case(task, optimizer, trial, seed, steered)
  # 0.5 s a step but for one stretch, when something else was running.
  return dataclasses.asdict(case) | {
    'settings': case.settings,
    'history': [
      {'step': 20 * i, 'seconds': 10.0 * i + (i > 1), 'val_loss': loss}
      for i, loss in enumerate(losses, start=1)
    ],
  }


@pytest.fixture(name='results')
def _results():
  results = []
  for task in convergence.TASKS:
    for optimizer in gpt_configs.OPTIMIZERS:
      results += [
        result(task, optimizer, 0, [5.0, 4.0, math.nan]),
        result(task, optimizer, 1, [4.0, 3.0, 2.0]),
        result(task, optimizer, 2, [4.0, 3.0, 2.5]),
      ]
    results += [
      result(task, 'adamw', 1, [4.0, 3.0, 2.0 + seed], seed) for seed in (1, 2)
    ]  # on average 3
    results += [
      result(task, 'lion', 1, [4.0, 3.5, 3.1], seed) for seed in (1, 2)
    ]
    for optimizer in 'sophia_h', 'sophia_g':
      results += [
        result(task, optimizer, 1, [3.0, 2.0, 1.0], seed) for seed in (1, 2)
      ]
      results += [
        result(task, optimizer, 1, [4.0, 3.1, 3.0], seed, True)
        for seed in (0, 1, 2)
      ]
  return results


def test_the_best_trial_is_run_with_three_seeds(results):
  assert convergence.best_trial(results, 'digits', 'lion') == 1
  finals = convergence.finals(results)
  assert len(finals) == 3 * (4 + 2) * len(convergence.TASKS)
  assert {c.trial for c in finals} == {1}
  assert convergence.left(finals, results) == []
  assert convergence.left(finals, results[:-1]) == [
    Case('digits', 'sophia_g', 1, 2, True)
  ]


def test_summary(results):
  rows = convergence.summary(results, 'gpt_16k')
  assert [row['label'] for row in rows] == [
    'AdamW',
    'Lion',
    'Sophia-H',
    'Sophia-H, γ steered',
    'Sophia-G',
    'Sophia-G, γ steered',
  ]
  adamw, lion, sophia, steered = rows[:4]
  assert adamw['mean'] == 3.0
  assert adamw['deviation'] == 1.0
  assert adamw['steps'] == [40, 40, 40]
  assert lion['steps'] == [40, None, None]
  assert sophia['mean'] == pytest.approx(4 / 3)
  assert sophia['steps'] == [40, 20, 20]
  assert steered['steps'] == [60, 60, 60]
  assert adamw['seconds_a_step'] == 0.5
  assert sophia['trials'] == [2.0, 2.5, math.inf]


def test_table_and_plots(results, tmp_path):
  table = convergence.render(results)
  title, _, _, _, adamw, lion, sophia = table.splitlines()[:7]
  assert title == 'GPT, 0.95 M parameters, 2,048 tokens a step:'
  assert '| AdamW | 3.000 ± 1.000 | 40 | 500 | 20.0 | 2.000, 2.500 |' in adamw
  assert '| 40 (1 of 3 seeds) | 500 | 20.0 |' in lion
  assert '| Sophia-H | 1.333 ± 0.577 | 27 | 500 | 13.3 |' in sophia
  convergence.plot_losses(results, str(tmp_path / 'losses.png'))
  convergence.plot_trials(results, str(tmp_path / 'trials.png'))
  assert all(p.stat().st_size > 10_000 for p in tmp_path.iterdir())


def test_record_is_read_back(results, tmp_path):
  path = tmp_path / 'record.json'
  convergence.write({'machine': 'x', 'runs': results[1:3]}, path)
  assert json.loads(path.read_text()) == {'machine': 'x', 'runs': results[1:3]}
  assert len(path.read_text().splitlines()) == 6
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('optimizer', gpt_configs.OPTIMIZERS)
def test_runs(optimizer, data_dir, monkeypatch, compile_fast):
  del compile_fast
  tiny = dataclasses.replace(
    convergence.TASKS['gpt_16k'],
    data_dir=data_dir,
    vocab_size=64,
    width=8,
    num_heads=2,
    num_layers=1,
    unroll=1,
    block_size=8,
    batch_size=8,
    micro_batch_size=4,
    curvature_batch_size=4,
    num_steps=4,
    warmup_steps=1,
    eval_interval=2,
    eval_batches=1,
  )
  monkeypatch.setitem(convergence.TASKS, 'gpt_16k', tiny)
  monkeypatch.setitem(
    convergence.TASKS, 'digits', {'steps': 20, 'warmup_steps': 2}
  )
  for task, steps in ('gpt_16k', [2, 4]), ('digits', list(range(1, 21))):
    got = convergence.run(Case(task, optimizer, 0, seed=2))
    assert [h['step'] for h in got['history']] == steps
    assert np.isfinite(convergence.final_loss(got))
    assert got['history'][0]['seconds'] < got['history'][-1]['seconds']
    assert (got['task'], got['optimizer'], got['seed']) == (task, optimizer, 2)
