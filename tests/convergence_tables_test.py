"""Tests of the tables and plots of benchmarks/convergence.py."""

import fake_runs
import numpy as np
import pytest

import convergence_plots
import convergence_protocol as protocol
import convergence_tables


def test_best_of_n():
  assert convergence_tables.best_of([3.0, 1.0, 2.0], 1) == pytest.approx(2)
  assert convergence_tables.best_of([3.0, 1.0, 2.0], 2) == pytest.approx(4 / 3)
  assert convergence_tables.best_of([3.0, 1.0, 2.0], 3) == 1


def test_part_of_the_steps_to_a_loss():
  curve = [4.0, 3.0, 2.0, 2.0]
  assert convergence_tables.part_to(curve, 2.5) == pytest.approx(2.5 / 4)
  assert convergence_tables.part_to(curve, 2.0) == 0.75
  assert convergence_tables.part_to(curve, 9.0) == 0.25
  assert convergence_tables.part_to(curve, 1.9) is None


def test_fraction_of_steps():
  loss = lambda steps: 2 - 0.3 * np.log(steps)
  found = convergence_tables.fraction_of_steps(
    0.75, loss(900), loss(1200), loss(960)
  )
  assert found == pytest.approx(0.8)


def test_width_of_the_learning_rates():
  losses = {1.0: 0.06, 2.0: 0.0, 4.0: 0.06}
  # Half of the way, in the logarithm, on both sides.
  assert convergence_tables.width(losses) == pytest.approx(2)
  assert convergence_tables.width({1.0: 0.0, 2.0: 0.02}) == 2


@pytest.mark.slow
def test_summary():
  rows = convergence_tables.summary(fake_runs.complete(), 'language_4800')
  assert set(rows) == set(protocol.TASKS['language_4800'].peers)
  sophia = rows['sophia_g']
  assert sorted(sophia['runs']) == [1, 2, 3]
  # The same bowl, and 0.05 lower; AdamW's last loss is there one point before.
  assert sophia['differences'] == pytest.approx(dict.fromkeys((1, 2, 3), -0.05))
  assert sophia['parts'] == pytest.approx(dict.fromkeys((1, 2, 3), 0.95))
  # Sophia has no search in this task.
  rows = convergence_tables.summary(fake_runs.complete(), 'language_19200')
  assert all(sorted(row['runs']) == [1, 2, 3] for row in rows.values())
  variants = convergence_tables.summary(fake_runs.complete(), 'language_1200')[
    'copied_g'
  ]['variants']
  assert set(variants) == set(protocol.VARIANTS['language_1200', 'copied_g'])


@pytest.mark.slow
def test_tables():
  text = convergence_tables.render(fake_runs.complete(), fake_runs.TIMES)
  table = text[text.index('4,800 steps') :]
  rows = {
    line.split('|')[1].strip(): [x.strip() for x in line.split('|')[2:-1]]
    for line in table[: table.index('Settings')].splitlines()
    if line.startswith('|')
  }
  assert rows['AdamW'][1] == '+0.000 ± 0.000'
  assert rows['Sophia-G'][1:5] == ['-0.050 ± 0.000', '0.95', '1.25', '1.19']
  assert rows['Sophia-H'][3:5] == ['–', '–']  # It was not measured
  settings = [s for s in table.splitlines() if s.startswith('* AdamW: ')]
  assert settings[0].endswith('; cpu')
  table = text[text.index(' 900 steps') :]
  assert '| AdamW | 1.00 ± 0.00 |' in table[: table.index('###')]
  # Without the runs of all steps there is nothing to compare with.
  results = [
    r
    for r in fake_runs.complete()
    if r['task'] != 'language_1200' or r['seed'] not in protocol.SEEDS
  ]
  text = convergence_tables.render(results, {})
  table = text[text.index(' 900 steps') :]
  assert '| AdamW | – |' in table[: table.index('###')]


@pytest.mark.slow
@pytest.mark.parametrize('count', [0, 1, 40])
def test_incomplete_results_are_shown(count):
  results = fake_runs.complete()[:count]
  assert '### Cost' in convergence_tables.render(results, {})
  for fig in (
    convergence_plots.plot_lengths(results),
    convergence_plots.plot_curves(results, {}),
    convergence_plots.plot_tuning(results),
  ):
    fig.canvas.draw()


def lines_of(ax):
  return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


@pytest.mark.slow
def test_plots(tmp_path):
  results = fake_runs.complete()
  fig = convergence_plots.plot_lengths(results)
  lines = lines_of(fig.axes[0])
  # Not those that run at the shortest length only.
  assert lines.keys() == {
    convergence_tables.LABELS[name]
    for name in protocol.TASKS['language_4800'].peers
  }
  np.testing.assert_allclose(
    lines['Sophia-G'],  # It is not in the longest runs.
    [(protocol.TASKS[t].tokens, -0.05) for t in protocol.LENGTHS[:2]],
  )
  np.testing.assert_allclose(
    lines['AdamW'], [(protocol.TASKS[t].tokens, 0) for t in protocol.LENGTHS]
  )

  fig.savefig(tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000

  fig = convergence_plots.plot_curves(results, fake_runs.TIMES)
  steps, times = (lines_of(ax)['Sophia-G'] for ax in fig.axes[:2])
  assert steps[-1, 0] == 1200
  assert times[-1, 0] == pytest.approx(1200 * 1.25)
  np.testing.assert_array_equal(steps[:, 1], times[:, 1])

  left, right = convergence_plots.plot_tuning(results).axes
  assert np.all(np.diff(lines_of(left)['NAdamW'][:, 1]) <= 0)
  assert len(lines_of(right)['NAdamW']) >= 3
