"""Tests of the protocol of benchmarks/convergence.py."""

import collections
import dataclasses
import itertools
import json

import fake_runs
import pytest

import convergence_problems
import convergence_protocol as protocol
from convergence_protocol import Case
import convergence_tables
import gpt_configs


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
      assert all(x == float(f'{x:.3g}') for x in values)


def test_a_case_changes_the_learning_rate_only():
  case = Case('language_1200', 'sophia_g', 1)
  drawn = protocol.settings(case)
  assert protocol.settings(dataclasses.replace(case, seed=2)) == drawn
  faster = protocol.settings(dataclasses.replace(case, rate=2))
  assert faster.pop('learning_rate') == pytest.approx(
    2 * drawn['learning_rate'], rel=1e-2
  )
  assert faster.items() < drawn.items()


def test_every_variant_changes_something():
  for (task, optimizer), variants in protocol.VARIANTS.items():
    case = Case(task, optimizer, 1)
    drawn = protocol.settings(case)
    for variant, changed in variants.items():
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


def test_tokens_for_each_parameter():
  for task, spec in protocol.TASKS.items():
    if not spec.tokens:
      continue
    sequences = {'large_batch': 256, 'large_model': 64}.get(task, 32)
    params = convergence_problems.num_params(spec.problem)
    assert spec.tokens == pytest.approx(
      spec.steps * sequences * 64 / params, rel=0.01
    )


@pytest.mark.slow
def test_searches():
  results = fake_runs.complete()
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
      if not searched:
        _, of_parent = protocol.search(spec.parent, name, losses, 4)
        assert best == dataclasses.replace(of_parent, task=task)
        continue
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
        losses[case] = 9.0 if fails else fake_runs.fake_run(case)['loss']
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
