"""The search, the runs and the tables of benchmarks/convergence.py."""

import functools
import json
import math
import pathlib

import jax
import pytest

import convergence
import convergence_plots
import convergence_problems
import convergence_protocol as protocol
from convergence_protocol import Case
import convergence_tables as tables
import records

RECORD = pathlib.Path(convergence.__file__).with_suffix('.json')


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    yield


# The protocol.


def bowl(case):
  """Returns a loss that is least around a learning rate."""
  space = protocol.SPACES[case.optimizer]['learning_rate']
  rate = protocol.settings(case)['learning_rate']
  distance = abs(math.log(rate / math.sqrt(space(0.0) * space(1.0))))
  return 1.5 + 0.1 * max(distance, 0.2) - 0.01 * case.seed


def run_search(optimizer, loss_of, task='language_1200'):
  """Returns the best case of the search in the shortest task, and losses."""
  losses, best = {}, None
  while best is None:
    cases, best = protocol.search(task, optimizer, losses)
    losses |= {case: loss_of(case) for case in cases}
  return best, losses


def test_the_report_has_no_seed_of_the_search():
  _, losses = run_search('adamw', bowl)
  assert not set(protocol.SEEDS) & {case.seed for case in losses}


def test_a_search_goes_past_the_best_learning_rate_on_both_sides():
  best, losses = run_search('nadamw', bowl)
  score = functools.partial(protocol.score, losses=losses)
  swept = {c.rate: score(c) for c in losses if c.trial == best.trial}
  for end in min(swept), max(swept):
    assert swept[end] > score(best) + protocol.TASKS['language_1200'].margin


def test_a_setting_that_diverges_with_the_second_seed_does_not_win():
  best, _ = run_search('nadamw', bowl)
  other, losses = run_search(
    'nadamw',
    lambda case: (
      9.0 if (case.trial, case.seed) == (best.trial, 4) else bowl(case)
    ),
  )
  assert other.trial != best.trial
  # Its learning rate has been swept with both seeds.
  swept = {}
  for case in losses:
    if case.trial == other.trial:
      swept.setdefault(case.rate, set()).add(case.seed)
  assert len(swept) >= 3
  assert all(seeds == {0, 4} for seeds in swept.values())


# The committed runs.


def test_the_record_is_complete_and_of_this_protocol():
  runs = records.read(RECORD)['runs']
  cases = [protocol.case_of(r) for r in runs]
  assert len(set(cases)) == len(cases)
  assert not set(protocol.plan(runs)) - set(cases)  # Nothing would run again.
  for case, run in zip(cases, runs, strict=True):
    if protocol.is_reported(case):
      assert run['settings'] == protocol.settings(case)
      assert len(run['curve']) == 20


# Tables and plots.


def test_figures_of_the_tables():
  curve = [4.0, 3.0, 2.0, 2.0]
  assert tables.part_to(curve, 2.5) == pytest.approx(2.5 / 4)
  assert tables.part_to(curve, 9.0) == 0.25
  assert tables.part_to(curve, 1.9) is None
  # Half of the way, in the logarithm, on both sides.
  assert tables.width({1.0: 0.06, 2.0: 0.0, 4.0: 0.06}) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.parametrize('count', [0, 500, None])
def test_tables_and_plot(count):  # records_test has the tables of all runs.
  results = records.read(RECORD)['runs'][:count]
  times = {'language': {'sophia_g': {'time/adamw': 1.25}}}
  text = tables.render(results, times)
  assert (protocol.TASKS['photographs'].title in text) == (count is None)
  convergence_plots.plot_lengths(results).draw_without_rendering()


# Runs.


@functools.cache
def regression(task, optimizer):
  return convergence.run(Case(task, optimizer, 1, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', protocol.TASKS['axes'].peers)
def test_every_optimizer_runs(optimizer):
  result = regression('axes', optimizer)
  assert result['loss'] < 0.1 < result['curve'][0]
  assert result['curve'][-1] == pytest.approx(result['loss'])
  sophia = optimizer.startswith(('sophia', 'copied'))
  assert ('win_rate' in result) == sophia
  json.dumps(result)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'sophia_g'])
def test_a_diagonal_helps_only_along_the_axes(optimizer):
  along, rotated = (regression(t, optimizer) for t in ('axes', 'rotated'))
  assert along['settings'] == rotated['settings']
  assert along['loss'] < 1e-3 * rotated['loss']


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sophia_g', *protocol.ROTATED])
def test_language_runs(optimizer, monkeypatch, compile_fast):
  del compile_fast
  problem = convergence_problems.language(8, 1, 1, 32)
  problem = problem._replace(validate_all=problem.validate)
  monkeypatch.setattr(convergence_problems, 'get', lambda name: problem)
  task = protocol.Task('', 'tiny', 60, tokens=1)
  monkeypatch.setitem(protocol.TASKS, 'tiny', task)
  result = convergence.run(Case('tiny', optimizer, 1, seed=1))
  first, *_, last = result['curve']
  assert last == result['loss'] < first < math.log(256) + 0.1
