"""The protocol of convergence.py: what to run, in which order, with what.

It is the same for every optimizer:

1. Search. The shortest language task (TASKS) gets 20 settings each, the points
   of a scrambled Halton sequence in the optimizer's space (SPACES). The three
   best are run with a second seed, and the mean of both decides. The learning
   rate of the best is then multiplied by powers of √2, down and up, with both
   seeds, until the loss is 0.03 above the best on both sides. The autoencoder
   has the same search, but its sweep ends as in 2. Least squares has one seed
   and no sweep.
2. Longer runs, larger batches and models. The two best trials of the parent
   task (one, where runs are long) are run; the better one's learning rate is
   multiplied by powers of √2 until one that is lower and one that is higher are
   worse. In the longest runs and with the largest model, only AdamW and NAdamW
   have this search. Runs of half of the steps have the best settings of all
   steps, and no sweep.
3. Report. The best of a task is run with three seeds that had no part in the
   search; a seed decides parameters, batches and probes. SOAP has one seed with
   the largest model.

Some have no search (UNTUNED), but AdamW's best settings in that task: Sophia-G
and Sophia-H with the settings to copy of docs/choosing.md, and, with a warm-up
of a tenth, those that use the basis of a matrix (ROTATED). The copied γ,
b2 and parts were chosen in earlier runs of the small language model, some of
them with the seeds of the report. In the shortest language task other learning
rates are run too, which shows how much the loss depends on them. Variants
differ in one thing.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools

import scipy.stats

NUM_TRIALS = 20
_SEARCH_SEEDS = 0, 4  # the second one is for the best of the first
SEEDS = 1, 2, 3  # of the report
_NUM_FINALISTS = 3
_CAP = 0.3

_COPIED = 'copied_g', 'copied_h'
ROTATED = 'eigen_g', 'eigen_h', 'soap', 'muon'
UNTUNED = (*_COPIED, *ROTATED)
# AdamW, and those that end below it in the shortest runs.
_FEW = 'adamw', 'nadamw', 'sophia_g', 'sophia_h', *_COPIED
_PEERS = (*_FEW, 'lion', 'signum', 'contrib')
# In the longest runs and with the largest model.
_LONG = 'adamw', 'nadamw', *_COPIED
_HALF = 'eigen_g', 'soap'


@dataclasses.dataclass(frozen=True)
class Task:
  """A problem and the length of its runs."""

  title: str  # in tables
  problem: str  # a name for `convergence_problems.get`
  steps: int
  tokens: float = 0  # per parameter; 0 if the problem has no tokens
  # The task whose best trials are used, and how many. None: its own search.
  parent: str | None = None
  carried: int = 2
  rate: int = 0  # power of √2 by which to multiply their learning rates first
  # The sweep of the learning rate ends when the loss is this much above the
  # best. None: no sweep, and with a parent no search but its best settings.
  margin: float | None = 0.0
  peers: tuple[str, ...] = _PEERS  # the optimizers, AdamW first
  one_seed: tuple[str, ...] = ()  # those with one seed of the report alone


def _small(steps, tokens, parent=None, **options):
  """A language task with the model of 0.12 million parameters."""
  title = f'GPT, 0.12 M parameters, 2,048 tokens a step, {steps:,} steps'
  return Task(title, 'language', steps, tokens, parent, **options)


LENGTHS = 'language_1200', 'language_4800', 'language_19200'
TASKS = {  # in the order in which they are run
  'language_1200': _small(
    1200, 20.6, margin=0.03, peers=(*_PEERS, *ROTATED, 'tuned_muon')
  ),
  'axes': Task('Regression along the axes', 'axes', 300, margin=None),
  'rotated': Task('Regression, rotated', 'rotated', 300, margin=None),
  'language_4800': _small(
    4800, 82.54, 'language_1200', peers=(*_FEW, 'signum', *ROTATED)
  ),
  'large_batch': Task(
    'GPT, 0.12 M parameters, 16,384 tokens a step, 600 steps',
    'language_large_batch',
    600,
    82.54,
    'language_1200',
    rate=1,
    peers=(*_FEW, 'eigen_g', 'soap'),
  ),
  'photographs': Task(
    'Autoencoder of photographs', 'photographs', 1800, peers=(*_PEERS, *ROTATED)
  ),
  'language_19200': _small(
    19200, 330, 'language_4800', carried=1, peers=(*_LONG, 'soap', 'eigen_g')
  ),
  'large_model': Task(
    'GPT, 1.0 M parameters, 4,096 tokens a step, 5,400 steps',
    'language_1m',
    5400,
    21.6,
    'language_1200',
    carried=1,
    rate=-1,
    peers=(*_LONG, 'soap'),
    one_seed=('soap',),
  ),
  # Half of the steps, to compare with AdamW's loss after all steps.
  'language_600': _small(600, 10.3, 'language_1200', margin=None, peers=_HALF),
  'language_2400': _small(
    2400, 41.2, 'language_4800', margin=None, peers=_HALF
  ),
  'large_model_2700': Task(
    'GPT, 1.0 M parameters, 4,096 tokens a step, 2,700 steps',
    'language_1m',
    2700,
    10.8,
    'large_model',
    margin=None,
    peers=('soap',),
    one_seed=('soap',),
  ),
}


def _log_uniform(low, high):
  return lambda u: low * (high / low) ** u


def _decay(low, high):
  """Draws 1 - x with x log-uniform."""
  return lambda u: 1 - _log_uniform(1 - low, 1 - high)(u)


def _choice(*values):
  return lambda u: values[int(u * len(values))]


_SHARED = {
  'warmup': _log_uniform(0.05, 0.5),  # a fraction of the steps
  'b1': _decay(0.8, 0.97),
}
_ADAM = {
  'learning_rate': _log_uniform(2e-3, 3e-2),
  **_SHARED,
  'b2': _decay(0.9, 0.995),
  'weight_decay': _log_uniform(0.03, 0.3),
}
_SIGN = {
  'learning_rate': _log_uniform(3e-4, 4.5e-3),
  **_SHARED,
  'weight_decay': _log_uniform(0.1, 1.0),
}
_RULE = {
  # For capped updates. Other updates can be 1 / 0.3 times larger, so the drawn
  # rate is multiplied by 0.3 for them.
  'learning_rate': _log_uniform(2e-3, 3e-2),
  **_SHARED,
  'b2': _decay(0.8, 0.99),
  'weight_decay': _log_uniform(0.03, 0.3),
}
_SOPHIA = _RULE | {
  'cap': _choice(_CAP, None),
  # γ at the end of the run, relative to the start. It changes by a cosine over
  # the second half.
  'gamma_end': _choice(1.0, 0.1),
}
_GAMMA_G = {'gamma': _log_uniform(0.02, 1.0)}
_GAMMA_H = {'gamma': _log_uniform(0.003, 0.3)}
SPACES = {
  'adamw': _ADAM,
  'nadamw': _ADAM,
  'tuned_muon': _ADAM,
  'sophia_g': _SOPHIA | _GAMMA_G,
  'sophia_h': _SOPHIA | _GAMMA_H,
  'lion': _SIGN | {'b2': _decay(0.9, 0.995)},
  'signum': _SIGN | {'nesterov': _choice(True, False)},
  'contrib': _RULE | {'learning_rate': _log_uniform(6e-4, 9e-3)} | _GAMMA_H,
}
_SOPHIA_FIXED = {'nesterov': True, 'nu_bias_correction': True}
# Those of `sophiaw` on every fourth example, here on the first quarter.
_SETTINGS = _SOPHIA_FIXED | {'b2': 0.95}
_COPIED_G = {'gamma': 0.1, 'target_win_rate': 0.3, 'parts': 8}
_SHORT = {'warmup': 0.1}  # A slow start costs more where the basis is right.
_EIGENBASIS = _SHORT | {'eigenbasis': True}
_FIXED = {
  'sophia_g': _SOPHIA_FIXED,
  'sophia_h': _SOPHIA_FIXED,
  'copied_g': _SETTINGS | _COPIED_G | {'eps': 1e-15},  # eps of `sophia_g`
  'copied_h': _SETTINGS | {'gamma': 0.05, 'gamma_end': 0.1},
  'eigen_g': _EIGENBASIS | {'sophiaw': 'gauss_newton'},
  'eigen_h': _EIGENBASIS | {'sophiaw': 'hessian'},
  'soap': _SHORT,
  'muon': _SHORT,
}
# Factors for the learning rates of problems other than language.
RATES = {'photographs': 0.5, 'axes': 10.0, 'rotated': 10.0}
VARIANTS = {  # by task and optimizer
  ('language_1200', 'copied_g'): {
    'without Nesterov momentum': {'nesterov': False},
    'γ not adapted': {'target_win_rate': None},
    'without curvature': {'gamma': 0.0, 'target_win_rate': None},
    'without the limit': {'adam_b2': None},
    'warm-up of a tenth': {'warmup': 0.1},
    'sophiaw': {'sophiaw': 'gauss_newton'},
  },
  ('language_1200', 'copied_h'): {'sophiaw': {'sophiaw': 'hessian'}},
  ('language_1200', 'soap'): {'warm-up of a quarter': {'warmup': 0.25}},
  ('photographs', 'copied_h'): {
    'γ adapted': {'gamma_end': 1.0, 'target_win_rate': 0.45}
  },
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One run."""

  task: str  # a key of `TASKS`
  optimizer: str  # a key of `SPACES`, or one of `UNTUNED`
  trial: int  # index of the point in the space; for `UNTUNED`, in AdamW's
  rate: int = 0  # power of √2 by which the learning rate is multiplied
  seed: int = 0  # of parameters, batches and probes
  variant: str = ''  # one of the `VARIANTS` of task and optimizer, or none


@functools.cache
def _points(optimizer):
  """Returns 100 points, from which n trials take the first n."""
  # Of the seeds 0 to 99, this one gives the least correlation between
  # coordinates of the first 20 points in Sophia's space: at most 0.3, where 0.5
  # is typical.
  return scipy.stats.qmc.Halton(len(SPACES[optimizer]), seed=77).random(100)


def settings(case: Case) -> dict:
  """Returns the hyperparameters of a run, rounded to three digits."""
  source = 'adamw' if case.optimizer in UNTUNED else case.optimizer
  drawn = {
    name: sample(u)
    for (name, sample), u in zip(
      SPACES[source].items(), _points(source)[case.trial], strict=True
    )
  }
  if 'cap' in drawn and drawn['cap'] is None:
    drawn['learning_rate'] *= _CAP
  drawn['learning_rate'] *= RATES.get(case.task, 1.0) * 2 ** (case.rate / 2)
  if case.optimizer in UNTUNED:
    drawn['adam_b2'] = drawn['b2']
  drawn |= _FIXED.get(case.optimizer, {})
  if case.variant:
    drawn |= VARIANTS[case.task, case.optimizer][case.variant]
  return {
    name: float(f'{x:.3g}') if isinstance(x, float) else x
    for name, x in drawn.items()
  }


def case_of(result: dict) -> Case:
  """Returns the case of a result, which leaves out default values."""
  names = {field.name for field in dataclasses.fields(Case)}
  return Case(**{name: x for name, x in result.items() if name in names})


def losses_of(results: list[dict]) -> dict[Case, float]:
  """Returns the final loss of each case."""
  return {case_of(r): r['loss'] for r in results}


def is_reported(case: Case) -> bool:
  """Whether the curve of a run is shown, and not only its final loss."""
  return case.seed in SEEDS and not case.variant


def score(case: Case, losses: dict[Case, float]) -> float | None:
  """Returns the loss that a search minimizes, or None if a run is missing.

  It is the mean over the seeds of the search. Those of the shortest language
  task and of the autoencoder use two, so that settings that diverge with one of
  them do not win.
  """
  found = [losses.get(twin) for twin in twins(case)]
  return None if None in found else sum(found) / len(found)


def twins(case: Case) -> list[Case]:
  """Returns a case of a search with each seed that the search uses."""
  spec = TASKS[case.task]
  has_one = spec.parent is not None or spec.margin is None
  seeds = _SEARCH_SEEDS[:1] if has_one else _SEARCH_SEEDS
  return [dataclasses.replace(case, seed=seed) for seed in seeds]


def swept_from(start: Case, losses: dict[Case, float]) -> dict[Case, float]:
  """Returns the scores of the cases that differ only in the learning rate."""
  of_trial = (case for case in losses if case.trial == start.trial)
  cases = [
    c for c in of_trial if dataclasses.replace(c, rate=start.rate) == start
  ]
  scores = {case: score(case, losses) for case in cases}
  return {case: x for case, x in scores.items() if x is not None}


def search(
  task: str, optimizer: str, losses: dict[Case, float]
) -> tuple[list[Case], Case | None]:
  """Returns the cases of a search for an optimizer's settings, and the best.

  The cases are all that are known to be needed, finished (in `losses`) or not.
  The best is None before the search is complete.
  """
  spec = TASKS[task]
  key = functools.partial(score, losses=losses)

  def sweep(start):  # cases with other learning rates, and the best of them
    swept = swept_from(start, losses)
    lowest = min(swept, key=swept.get, default=start)
    cases = twins(start)
    for rates in range(-1, -13, -1), range(1, 13):
      for rate in rates:
        case = dataclasses.replace(lowest, rate=lowest.rate + rate)
        cases += twins(case)
        if key(case) is None or key(case) > key(lowest) + spec.margin:
          break
    return cases + [twin for case in swept for twin in twins(case)], lowest

  if optimizer in UNTUNED:
    _, best = search(task, 'adamw', losses)
    if best is None:
      return [], None
    best = dataclasses.replace(best, optimizer=optimizer)
    # In the shortest language task, which alone has a margin above 0.
    is_swept = spec.margin and optimizer not in ROTATED
    return sweep(best)[0] if is_swept else [], best
  if spec.parent is None:
    cases = [Case(task, optimizer, trial) for trial in range(NUM_TRIALS)]
  else:
    tried, best = search(spec.parent, optimizer, losses)
    if best is None:
      return [], None
    if spec.margin is None:
      return [], dataclasses.replace(best, task=task)
    scored = (c for c in tried if c.seed == 0 and key(c) is not None)
    best_of_trial = {}
    for case in sorted(scored, key=key):
      best_of_trial.setdefault(case.trial, case)
    cases = [
      dataclasses.replace(case, task=task, rate=case.rate + spec.rate)
      for case in itertools.islice(best_of_trial.values(), spec.carried)
    ]
  if any(case not in losses for case in cases):
    return cases, None
  finalists = sorted(cases, key=losses.get)[:_NUM_FINALISTS]
  for case in finalists:
    cases += twins(case)
  best = None
  if all(case in losses for case in cases):
    best = min(finalists, key=key)
    if spec.margin is not None:
      more, best = sweep(best)
      cases += more
  is_complete = all(case in losses for case in cases)
  return list(dict.fromkeys(cases)), best if is_complete else None


def plan(results: list[dict]) -> Iterator[Case]:
  """Yields all needed cases, finished or not, in the order to run them."""
  losses = losses_of(results)
  for task, spec in TASKS.items():
    searches = {o: search(task, o, losses) for o in spec.peers}
    of_optimizers = (cases for cases, _ in searches.values())
    for in_turn in itertools.zip_longest(*of_optimizers):
      yield from filter(None, in_turn)
    best = [case for _, case in searches.values() if case]
    for seed, case in itertools.product(SEEDS, best):
      if case.optimizer in spec.one_seed and seed != SEEDS[0]:
        continue
      reported = dataclasses.replace(case, seed=seed)
      for variant in ('', *VARIANTS.get((task, case.optimizer), ())):
        yield dataclasses.replace(reported, variant=variant)
