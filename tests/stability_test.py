"""Tests of benchmarks/stability.py."""

import dataclasses
import math

import jax
import pytest

import stability


def run_of(trouble, remedy, val_loss, seed=0):
  history = [
    {
      'step': 10 * i,
      'loss': val_loss + 1 / i,
      'win_rate': 0.3,
      'negative_fraction': 0.4,
      'curvature_norm': 2.0,
    }
    for i in (1, 2)
  ]
  return {
    'trouble': trouble,
    'remedy': remedy,
    'seed': seed,
    'val_loss': val_loss,
    'history': history,
  }


@pytest.fixture(name='runs')
def _runs():
  runs = [
    run_of(trouble, remedy, 2.0 + i + j / 10)
    for i, trouble in enumerate(stability.TROUBLES)
    for j, remedy in enumerate(stability.REMEDIES)
  ]
  return [*runs, run_of('none', 'eps=1e-4', 3.0, seed=1)]


def test_table(runs):
  lines = stability.render(runs).splitlines()
  assert lines[2].startswith('| nothing | 2.000 | 3.000 | 4.000 | 5.000 |')
  assert lines[5].startswith('| eps=1e-4 | 2.650 | 3.300 |')


def curves(ax):
  lines, labels = ax.get_legend_handles_labels()
  return {
    label: list(line.get_ydata())
    for line, label in zip(lines, labels, strict=True)
  }


def test_plot(runs):
  fig = stability.plot(runs)
  fig.draw_without_rendering()
  losses = curves(fig.axes[0])
  assert losses == {
    'learning rate × 1': [3.0, 2.5],
    '× 4, nothing': [4.0, 3.5],
    '× 4, target_win_rate=0.3': [4.1, 3.6],
    '× 4, microbatched': [4.2, 3.7],
    '× 4, eps=1e-4': [4.3, 3.8],
  }
  for ax, label, value in zip(
    fig.axes[1:],
    ('Win rate', 'Fraction of h below zero', 'Norm of h'),
    (0.3, 0.4, 2.0),
    strict=True,
  ):
    assert ax.get_ylabel() == label
    assert curves(ax) == {name: [value, value] for name in losses}


def test_a_benchmark_that_was_stopped_continues(tmp_path, monkeypatch):
  results = iter([{'val_loss': 2.0}] * 8)
  monkeypatch.setattr(stability, 'run', lambda *args: next(results))
  path = tmp_path / 'runs.json'
  with pytest.raises(StopIteration):
    stability.run_all(path, num_seeds=1)
  monkeypatch.setattr(stability, 'run', lambda *args: {'val_loss': 3.0})
  losses = [r['val_loss'] for r in stability.run_all(path, num_seeds=1)]
  num_cases = len(stability.TROUBLES) * len(stability.REMEDIES)
  assert losses == [2.0] * 8 + [3.0] * (num_cases - 8)


@pytest.mark.slow
def test_runs(data_dir, monkeypatch, compile_fast):
  del compile_fast
  monkeypatch.setattr(
    stability,
    '_CONFIG',
    dataclasses.replace(
      stability._CONFIG,
      data_dir=data_dir,
      vocab_size=64,
      width=8,
      num_heads=2,
      num_layers=1,
      block_size=8,
    ),
  )
  settings = stability.Settings(
    sequences=4, num_steps=20, parts=2, target_win_rate=0.3
  )
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    result = stability.run(settings, seed=1)
  assert [h['step'] for h in result['history']] == [10, 20]
  assert all(0 < h['negative_fraction'] < 1 for h in result['history'])
  assert all(h['curvature_norm'] > 0 for h in result['history'])
  assert result['val_loss'] == pytest.approx(math.log(64), rel=0.1)
