"""Tests of benchmarks/convergence.py, of its protocol and of its plots."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tqdm

import breakdown
import convergence
import convergence_plots
import convergence_problems
import convergence_protocol as protocol
from convergence_protocol import Case
import convergence_tables
import convergence_times
import gpt_configs

RECORD = pathlib.Path(convergence.__file__).with_suffix('.json')


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    yield


def test_trials_are_points_of_a_stated_space():
  assert protocol.settings(Case('language_1200', 'adamw', 0)) == {
    'learning_rate': 0.00469,
    'warmup': 0.329,
    'b1': 0.84,
    'b2': 0.991,
    'weight_decay': 0.0641,
  }
  for optimizer, space in protocol.SPACES.items():
    drawn = [
      protocol.settings(Case('language_1200', optimizer, trial))
      for trial in range(20)
    ]
    assert len({json.dumps(s) for s in drawn}) == 20
    for name, sample in space.items():
      values = [s[name] for s in drawn]
      ends = [sample(0.0), sample(1 - 1e-9)]
      if isinstance(ends[0], bool) or None in ends or name == 'gamma_end':
        assert 7 <= values.count(ends[0]) <= 13  # about half of 20
        continue
      if 'cap' in space and name == 'learning_rate':
        ends[0] *= 0.3
      assert ends[0] <= min(values) < max(values) <= ends[1] * (1 + 1e-6)
      assert all(len(f'{x:.3g}') <= 8 for x in values)


def test_a_case_changes_the_learning_rate_only():
  case = Case('language_1200', 'sophia_g', 1)
  drawn = protocol.settings(case)
  assert protocol.settings(dataclasses.replace(case, seed=2)) == drawn
  faster = protocol.settings(dataclasses.replace(case, rate=2))
  assert faster.pop('learning_rate') == pytest.approx(
    2 * drawn['learning_rate'], rel=1e-2
  )
  assert faster.items() < drawn.items()


def test_a_variant_changes_what_its_name_says():
  case = Case('language_1200', 'copied_g', 1)
  drawn = protocol.settings(case)
  for variant, changed in protocol.VARIANTS.items():
    other = protocol.settings(dataclasses.replace(case, variant=variant))
    assert other == drawn | changed != drawn


@pytest.mark.parametrize('name', ['copied_g', 'copied_h'])
def test_settings_to_copy_are_those_of_the_examples(name):
  drawn = protocol.settings(Case('language_4800', name, 3, 1))
  adamw = protocol.settings(Case('language_4800', 'adamw', 3, 1))
  expected = gpt_configs.sophia_like(
    gpt_configs.Config(
      num_steps=4800,
      learning_rate=adamw['learning_rate'],
      warmup_steps=round(adamw['warmup'] * 4800),
      b1=adamw['b1'],
      b2=adamw['b2'],
      weight_decay=adamw['weight_decay'],
    ),
    name.replace('copied', 'sophia'),
  )
  assert drawn.pop('warmup') == pytest.approx(
    expected.warmup_steps / 4800, abs=1e-3
  )
  wanted = {
    'learning_rate': expected.learning_rate,
    'weight_decay': expected.weight_decay,
    'b1': expected.b1,
    'b2': expected.b2,
    'adam_b2': expected.adam_b2,
    'gamma': expected.gamma,
    'nesterov': expected.nesterov,
    'nu_bias_correction': expected.bias_correction,
  }
  if name == 'copied_g':
    wanted |= {
      'target_win_rate': expected.target_win_rate,
      'parts': expected.curvature_parts,
      'eps': 1e-15,
    }
  else:
    wanted |= {'gamma_end': expected.final_gamma}
  assert drawn == wanted


def fake_run(case):
  """Returns a run whose loss is a flat bowl around a learning rate."""
  drawn = protocol.settings(case)
  untuned = case.optimizer in protocol.UNTUNED
  name = 'adamw' if untuned else case.optimizer
  low, high = (protocol.SPACES[name]['learning_rate'](u) for u in (0.0, 1.0))
  best = math.sqrt(low * high) * protocol.RATES.get(case.task, 1)
  loss = 1.5 + 0.1 * max(abs(math.log(drawn['learning_rate'] / best)), 0.2)
  loss -= 0.1 * list(protocol.TASKS).index(case.task)
  loss -= 0.05 * (case.optimizer == 'sophia_g') + 0.01 * case.seed
  curve = [loss + 1 - i / 20 for i in range(1, 21)]
  return dataclasses.asdict(case) | {
    'settings': drawn,
    'steps': protocol.TASKS[case.task].steps,
    'device': 'cpu',
    'curve': curve,
    'loss': loss,
    'seconds': 10.0,
  }


TIMES = {'language': {'adamw': 20.0, 'sophia_g': 25.0}}  # ms of a step


@functools.cache
def complete(num_trials=4):
  """Returns the results of the whole benchmark with losses of `fake_run`."""
  results, done = [], set()
  while case := next(
    (c for c in protocol.plan(results, num_trials) if c not in done), None
  ):
    results.append(fake_run(case))
    done.add(case)
  return results


@pytest.mark.slow
def test_every_optimizer_has_the_same_search():
  results = complete()
  losses = convergence_tables.losses_of(results)
  assert len(losses) == len(results)
  for task, spec in protocol.TASKS.items():
    for name in spec.peers:
      cases = [c for c in losses if (c.task, c.optimizer) == (task, name)]
      _, best = protocol.search(task, name, losses, 4)
      assert {dataclasses.replace(best, seed=s) for s in protocol.SEEDS} <= set(
        cases
      )
      if name in protocol.UNTUNED:
        _, of_adamw = protocol.search(task, 'adamw', losses, 4)
        assert best == dataclasses.replace(of_adamw, optimizer=name)
        assert {c.trial for c in cases} == {of_adamw.trial}
        if not spec.margin:  # No other learning rates.
          assert sum(not c.variant for c in cases) == len(protocol.SEEDS)
          continue
      searched = [c for c in cases if c.seed == 0]
      assert losses[best] == min(losses[c] for c in searched)
      if name not in protocol.UNTUNED:
        trials = {c.trial for c in searched}
        assert len(trials) == (spec.carried if spec.parent else 4)
      if spec.margin is None:
        continue
      # The sweep went past the best rate on both sides.
      swept = {c.rate: losses[c] for c in searched if c.trial == best.trial}
      assert len(swept) >= 3
      for end in min(swept), max(swept):
        assert swept[end] > losses[best] + spec.margin


def test_a_setting_that_diverges_with_the_second_seed_does_not_win():
  def run_search(breaks_down):
    losses, best = {}, None
    while best is None:
      cases, best = protocol.search('language_1200', 'nadamw', losses, 4)
      for case in cases:
        fails = case.trial == breaks_down and case.seed == 4
        losses[case] = 9.0 if fails else fake_run(case)['loss']
    return best, losses

  best, _ = run_search(breaks_down=None)
  other, losses = run_search(breaks_down=best.trial)
  assert other.trial != best.trial
  # Its learning rate has been swept with both seeds.
  swept = {c.rate: set() for c in losses if c.trial == other.trial}
  for case in losses:
    if case.trial == other.trial:
      swept[case.rate].add(case.seed)
  assert len(swept) >= 3
  assert set(map(frozenset, swept.values())) == {frozenset({0, 4})}
  assert protocol.score(other, losses) == pytest.approx(
    (losses[other] + losses[dataclasses.replace(other, seed=4)]) / 2
  )


def test_optimizers_take_turns():
  counts = collections.Counter()
  for case in itertools.islice(protocol.plan([], 20), 7 * 20):
    counts[case.optimizer] += 1
    assert max(counts.values()) - min(counts[o] for o in protocol.SPACES) <= 1
  assert set(counts.values()) == {20}


@pytest.fixture(name='in_threads')
def _in_threads(monkeypatch):
  monkeypatch.setattr(
    concurrent.futures,
    'ProcessPoolExecutor',
    lambda jobs, _: concurrent.futures.ThreadPoolExecutor(jobs),
  )
  for name in list(protocol.TASKS)[3:]:
    monkeypatch.delitem(protocol.TASKS, name)  # The others are enough.


@pytest.mark.slow
def test_continues_where_it_was_killed(in_threads, monkeypatch, tmp_path):
  del in_threads
  path, runs = tmp_path / 'record.json', []

  def run(case):
    if len(runs) == 30:
      raise KeyboardInterrupt
    runs.append(case)
    return fake_run(case)

  monkeypatch.setattr(convergence, 'run', run)
  with pytest.raises(KeyboardInterrupt):
    convergence.run_all([], path, 1, 4)
  record = json.loads(path.read_text())
  assert len(record['runs']) == 30
  first, runs[:] = list(runs), []

  monkeypatch.setattr(
    convergence, 'run', lambda case: runs.append(case) or fake_run(case)
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
  monkeypatch.setattr(convergence, 'run', fake_run)
  path = tmp_path / 'record.json'
  convergence.run_all([], path, 2, 4, ['axes'])
  runs = json.loads(path.read_text())['runs']
  assert {r['task'] for r in runs} == {'axes'}
  assert {r['optimizer'] for r in runs} == set(protocol.TASKS['axes'].peers)


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


def test_width_of_the_learning_rates():
  losses = {1.0: 0.06, 2.0: 0.0, 4.0: 0.06}
  # Half of the way, in the logarithm, on both sides.
  assert convergence_tables.width(losses) == pytest.approx(2)
  assert convergence_tables.width({1.0: 0.0, 2.0: 0.02}) == 2


@pytest.mark.slow
def test_summary():
  rows = convergence_tables.summary(complete(), 'language_4800')
  assert set(rows) == set(protocol.TASKS['language_4800'].peers)
  sophia = rows['sophia_g']
  assert sorted(sophia['runs']) == [1, 2, 3]
  # The same bowl, and 0.05 lower; AdamW's last loss is there one point before.
  assert sophia['differences'] == pytest.approx(dict.fromkeys((1, 2, 3), -0.05))
  assert sophia['parts'] == pytest.approx(dict.fromkeys((1, 2, 3), 0.95))
  # Some optimizers have no search in this task.
  rows = convergence_tables.summary(complete(), 'photographs')
  assert all(sorted(row['runs']) == [1, 2, 3] for row in rows.values())
  variants = convergence_tables.summary(complete(), 'language_1200')[
    'copied_g'
  ]['variants']
  assert set(variants) == set(protocol.VARIANTS)


@pytest.mark.slow
def test_tables():
  text = convergence_tables.render(complete(), TIMES)
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


@pytest.mark.slow
@pytest.mark.parametrize('count', [0, 1, 40])
def test_incomplete_results_are_shown(count):
  results = complete()[:count]
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
  results = complete()
  fig = convergence_plots.plot_lengths(results)
  lines = lines_of(fig.axes[0])
  # Not those that run at the shortest length only.
  assert lines.keys() == {
    convergence_tables.LABELS[name]
    for name in protocol.TASKS['language_4800'].peers
  }
  np.testing.assert_allclose(
    lines['Sophia-G'],  # The longest runs have the settings to copy only.
    [(protocol.TASKS[t].tokens, -0.05) for t in protocol.LENGTHS[:2]],
  )
  np.testing.assert_allclose(
    lines['AdamW'], [(protocol.TASKS[t].tokens, 0) for t in protocol.LENGTHS]
  )

  fig.savefig(tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000

  fig = convergence_plots.plot_curves(results, TIMES)
  steps, times = (lines_of(ax)['Sophia-G'] for ax in fig.axes[:2])
  assert steps[-1, 0] == 1200
  assert times[-1, 0] == pytest.approx(1200 * 1.25)
  np.testing.assert_array_equal(steps[:, 1], times[:, 1])

  left, right = convergence_plots.plot_tuning(results).axes
  assert np.all(np.diff(lines_of(left)['NAdamW'][:, 1]) <= 0)
  assert len(lines_of(right)['NAdamW']) >= 3


def test_tokens_for_each_parameter():
  for task in 'language_1200', 'language_19200', 'large_batch', 'large_model':
    spec = protocol.TASKS[task]
    sequences = {'large_batch': 256, 'large_model': 64}.get(task, 32)
    params = convergence_problems.num_params(spec.problem)
    assert spec.tokens == pytest.approx(
      spec.steps * sequences * 64 / params, rel=0.01
    )


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
  if task == 'large_model':  # Other seeds and Sophia-H have not run yet.
    expected = {'adamw': (1, 2), 'nadamw': (1,), 'copied_g': (1,)}
  found = {name: tuple(sorted(row['runs'])) for name, row in rows.items()}
  assert found == expected


@pytest.mark.parametrize(
  ('task', 'names'),
  [
    ('language_1200', protocol.TASKS['language_1200'].peers),
    # The others have not been timed on photographs.
    ('photographs', protocol.TASKS['large_batch'].peers),
  ],
)
def test_committed_times_of_optimizers(task, names):
  found = json.loads(RECORD.with_name('convergence_times.json').read_text())
  for name in names:
    ratio = convergence_tables.time_of_a_step(found['ms'], task, name)
    assert (ratio == 1.0) if name == 'adamw' else (0.8 < ratio < 1.5)


def test_breakdowns_are_of_these_settings():
  path = RECORD.with_name('breakdown.json')
  found = json.loads(path.read_text())['cases']
  assert [
    case | {'losses': c['losses']}
    for c, case in zip(found, breakdown.cases(), strict=True)
  ] == found


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
  assert list(found) == list(protocol.TASKS['axes'].peers)
  assert all(0 < x < 10 for x in found.values())


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
