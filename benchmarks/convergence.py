"""Compares optimizers over the length of the run, after equal searches.

  python benchmarks/convergence.py --output=benchmarks/convergence.json --jobs=2
  python benchmarks/convergence_plots.py --show=benchmarks/convergence.json

The protocol is the same for all optimizers:

1. Search. On the shortest language task (TASKS), each optimizer runs --trials
   settings, the points of a scrambled Halton sequence in its space (SPACES).
   The three best run with a second seed, and the best mean of both seeds wins.
   Its learning rate is then multiplied by powers of √2, down and up, with both
   seeds, until the loss is 0.03 above the best on both sides.
2. Longer runs, larger batches and larger models. The two best trials of the
   parent task run (one if runs are long). The learning rate of the better one
   is multiplied by powers of √2 until a lower and a higher rate are worse.
3. Report. The best settings of a task run with three seeds that the search did
   not use. A seed determines parameters, batches and probes.

Three settings need no search (UNTUNED). 'copied_g' and 'copied_h' are the
settings to copy in docs/choosing.md, for Sophia-G and Sophia-H. They follow
from AdamW's best learning rate and weight decay in the task. 'steered' is
'copied_g' with γ adjusted to a win rate of 0.3. Each variant changes one of the
best settings.

Every run completes its schedule, linear warm-up and then a cosine to 5 %.
Sophia estimates the curvature on a quarter of the batch, every tenth step.

Each run is written when it ends, and runs in the file are not repeated. So a
benchmark that was stopped continues. --jobs runs are in progress at a time,
each in one thread. Seconds are processor time, so other load on the machine has
no effect. They do not include compilation and validation.
"""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import platform
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import convergence_problems
import records
import sophia_optax
import text

_NUM_TRIALS = 20
SEEDS = (1, 2, 3)  # of the reported runs
_SEARCH_SEEDS = (0, 4)  # the second one only for the best with the first
_NUM_FINALISTS = 3
_FINAL_RATE = 0.05
_CURVE = 20  # validations in a run
_CHUNK = 15  # steps in one call of the program; divides steps / _CURVE
_CAP = 0.3
_DIVERGED = 1e9  # larger than any loss; JSON has no infinity


UNTUNED = 'copied_g', 'copied_h', 'steered'
_PEERS = (
  'adamw',
  'nadamw',
  'sophia_g',
  'sophia_h',
  'lion',
  'signum',
  'contrib',
  *UNTUNED,
)
# For long runs: the optimizers that are closest to AdamW in short ones.
_FEW = 'adamw', 'nadamw', 'sophia_g', 'copied_g', 'copied_h'


@dataclasses.dataclass(frozen=True)
class Task:
  """A problem and the length of its runs.

  Attributes:
    title: Title in tables and plots.
    problem: A name for `convergence_problems.get`.
    steps: Number of steps in a run.
    tokens: Number of tokens per parameter; 0 if the problem has no tokens.
    parent: Task whose best trials are used. None means a search of its own.
    carried: Number of trials to use from the parent.
    rate: Power of √2 by which to multiply their learning rates first.
    margin: The sweep of the learning rate ends when the loss is this much above
      the best. None means no sweep.
    peers: The optimizers, AdamW first.
  """

  title: str
  problem: str
  steps: int
  tokens: float = 0
  parent: str | None = None
  carried: int = 2
  rate: int = 0
  margin: float | None = 0.0
  peers: tuple[str, ...] = _PEERS


_SMALL = 'GPT, 0.12 M parameters, 2,048 tokens a step'
LENGTHS = 'language_1200', 'language_4800', 'language_19200'
TASKS = {  # in the order in which they are run
  'language_1200': Task(
    f'{_SMALL}, 1,200 steps', 'language', 1200, 20.6, margin=0.03
  ),
  'axes': Task('Regression along the axes', 'axes', 300, margin=None),
  'rotated': Task('Regression, rotated', 'rotated', 300, margin=None),
  'language_4800': Task(
    f'{_SMALL}, 4,800 steps',
    'language',
    4800,
    82.5,
    'language_1200',
    peers=(*_FEW, 'steered', 'sophia_h', 'signum'),
  ),
  'large_batch': Task(
    'GPT, 0.12 M parameters, 16,384 tokens a step, 600 steps',
    'language_large_batch',
    600,
    82.5,
    'language_1200',
    rate=1,
    peers=(*_FEW, 'sophia_h'),
  ),
  'language_19200': Task(
    f'{_SMALL}, 19,200 steps',
    'language',
    19200,
    330,
    'language_4800',
    carried=1,
    peers=_FEW,
  ),
  'photographs': Task('Autoencoder of photographs', 'photographs', 1800),
  'large_model': Task(
    'GPT, 1.0 M parameters, 4,096 tokens a step, 5,400 steps',
    'language_1m',
    5400,
    21.6,
    'language_1200',
    carried=1,
    rate=-1,
    peers=_FEW,
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
_SOPHIA = {
  # For capped updates. Other updates can be 1 / 0.3 times larger, so the drawn
  # rate is multiplied by 0.3 for them.
  'learning_rate': _log_uniform(2e-3, 3e-2),
  **_SHARED,
  'b2': _decay(0.8, 0.99),
  'weight_decay': _log_uniform(0.03, 0.3),
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
  'sophia_g': _SOPHIA | _GAMMA_G,
  'sophia_h': _SOPHIA | _GAMMA_H,
  'lion': _SIGN | {'b2': _decay(0.9, 0.995)},
  'signum': _SIGN | {'nesterov': _choice(True, False)},
  'contrib': {
    'learning_rate': _log_uniform(6e-4, 9e-3),
    **_SHARED,
    'b2': _decay(0.8, 0.99),
    'weight_decay': _log_uniform(0.03, 0.3),
  }
  | _GAMMA_H,
}
_SOPHIA_FIXED = {'nesterov': True, 'nu_bias_correction': True}
# docs/choosing.md has the same, and `sophia_like` of examples/gpt_configs.py.
_COPIED = _SOPHIA_FIXED | {
  'warmup': 0.25,
  'b1': 0.9,
  'b2': 0.95,
  'cap': _CAP,
  'gamma_end': 0.1,
}
_FIXED = {
  'sophia_g': _SOPHIA_FIXED,
  'sophia_h': _SOPHIA_FIXED,
  'copied_g': _COPIED | {'gamma': 0.1},
  'copied_h': _COPIED | {'gamma': 0.05},
  'steered': _COPIED | {'gamma': 0.1, 'target_win_rate': 0.3},
}
# Factors for the learning rates of problems other than language.
RATES = {'photographs': 0.5, 'axes': 10.0, 'rotated': 10.0}
VARIANTS = {
  'without Nesterov momentum': lambda s: {'nesterov': False},
  'without bias correction of h': lambda s: {'nu_bias_correction': False},
  'cap the other way': lambda s: (
    {'cap': None, 'learning_rate': _CAP * s['learning_rate']}
    if s['cap']
    else {'cap': _CAP, 'learning_rate': s['learning_rate'] / _CAP}
  ),
  'a tenth of the steps for warm-up': lambda s: {'warmup': 0.1},
  'γ the other way': lambda s: {'gamma_end': 0.1 if s['gamma_end'] == 1 else 1},
}
VARIED = {'language_1200': ('sophia_g', 'sophia_h', 'copied_g')}


@dataclasses.dataclass(frozen=True)
class Case:
  """One run.

  Attributes:
    task: A key of `TASKS`.
    optimizer: A key of `SPACES`, or one of `UNTUNED`.
    trial: Index of the point in the space. For `UNTUNED`, in AdamW's space.
    rate: Power of √2 by which the learning rate is multiplied.
    seed: Seed of parameters, batches and probes.
    variant: A key of `VARIANTS`, or ''.
  """

  task: str
  optimizer: str
  trial: int
  rate: int = 0
  seed: int = 0
  variant: str = ''


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
    drawn = {name: drawn[name] for name in ('learning_rate', 'weight_decay')}
  drawn |= _FIXED.get(case.optimizer, {})
  if case.variant:
    drawn |= VARIANTS[case.variant](drawn)
  return {
    name: float(f'{x:.3g}') if isinstance(x, float) else x
    for name, x in drawn.items()
  }


def _learning_rate(s):
  """Returns a schedule of warm-up and cosine. Settings may be traced."""

  def schedule(count):
    warmup = s['warmup'] * s['steps']
    progress = jnp.clip((count - warmup) / (s['steps'] - warmup), 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
    cosine = _FINAL_RATE + (1 - _FINAL_RATE) * cosine
    return s['learning_rate'] * jnp.where(
      count < warmup, count / warmup, cosine
    )

  return schedule


def _gamma(s):
  """Returns γ, constant or with a cosine to `gamma_end` in the second half."""

  def schedule(count):
    progress = jnp.clip(2 * count / s['steps'] - 1, 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
    return s['gamma'] * (s['gamma_end'] + (1 - s['gamma_end']) * cosine)

  return s['gamma'] if 'target_win_rate' in s else schedule


def _scale_by_sophia(s, estimator):
  return optax.chain(
    sophia_optax.scale_by_sophia(
      s['b1'],
      s['b2'],
      gamma=_gamma(s),
      hessian_diagonal_fn=estimator,
      target_win_rate=s.get('target_win_rate'),
      nesterov=s['nesterov'],
      nu_bias_correction=s['nu_bias_correction'],
    ),
    optax.clip_by_block_rms(s['cap']),
  )


def make_optimizer(
  name: str, s: dict, problem, seed
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer with clipping, schedule and masked decay.

  Args:
    name: A key of `SPACES`, or one of `UNTUNED`.
    s: Its settings and `steps`. Numbers may be traced, booleans may not.
    problem: The problem.
    seed: Seed of the probes.

  Returns:
    A transformation that takes `obj_fn`, `predict_fn` and `batch`.
  """
  rate = _learning_rate(s)
  decay = s['weight_decay'], problem.decay_mask
  probe = jax.random.key(seed)
  if name == 'adamw':
    tx = optax.adamw(
      rate, s['b1'], s['b2'], weight_decay=decay[0], mask=decay[1]
    )
  elif name == 'nadamw':
    tx = optax.nadamw(
      rate, s['b1'], s['b2'], weight_decay=decay[0], mask=decay[1]
    )
  elif name == 'lion':
    tx = optax.lion(
      rate, s['b1'], s['b2'], weight_decay=decay[0], mask=decay[1]
    )
  elif name == 'contrib':
    tx = optax.contrib.sophia(
      rate,
      s['b1'],
      s['b2'],
      weight_decay=decay[0],
      weight_decay_mask=decay[1],
      gamma=s['gamma'],
      hessian_diagonal_fn=optax.contrib.hutchinson_estimator_diag_hessian(
        jax.random.key_data(probe)
      ),
    )
  else:
    if name == 'signum':
      direction = sophia_optax.scale_by_sophia(
        s['b1'],
        gamma=0.0,
        hessian_diagonal_fn=optax.set_to_zero(),
        nesterov=s['nesterov'],
      )
    elif name in ('sophia_h', 'copied_h'):
      direction = _scale_by_sophia(
        s, sophia_optax.hutchinson_estimator_diag_hessian(probe)
      )
    else:
      # The average of four estimates has half the standard deviation of one, at
      # the same cost.
      direction = _scale_by_sophia(
        s,
        sophia_optax.microbatched(
          sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
            probe, likelihood=problem.likelihood
          ),
          4,
        ),
      )
    tx = optax.chain(
      direction,
      optax.add_decayed_weights(*decay),
      optax.scale_by_learning_rate(rate),
    )
  return optax.with_extra_args_support(
    optax.chain(optax.clip_by_global_norm(problem.clip_norm), tx)
  )


def _gradient(problem, params, batch):
  """Returns the mean gradient, computed for one micro-batch at a time."""
  parts = batch.reshape(-1, problem.micro_batch, *batch.shape[1:])
  grad = jax.grad(problem.loss)
  if len(parts) == 1:
    return grad(params, batch)

  def add(total, part):
    return jax.tree.map(jnp.add, total, grad(params, part)), None

  total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
  return jax.tree.map(lambda g: g / len(parts), total)


@functools.cache
def _programs(problem_name, optimizer_name, switches):
  """Returns jitted functions. Trials, lengths and seeds are their arguments."""
  problem = convergence_problems.get(problem_name)

  def make(numbers, seed):
    return make_optimizer(
      optimizer_name, numbers | dict(switches), problem, seed
    )

  @jax.jit
  def init(params, numbers, seed):
    return make(numbers, seed).init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def advance(params, opt_state, numbers, seed, start):
    tx = make(numbers, seed)
    key = jax.random.key(seed)

    def step(carry, t):
      params, opt_state = carry
      batch = problem.sample(jax.random.fold_in(key, t))
      quarter = batch[: len(batch) // 4]
      updates, opt_state = tx.update(
        _gradient(problem, params, batch),
        opt_state,
        params,
        obj_fn=lambda params, batch=quarter: problem.loss(params, batch),
        predict_fn=problem.predict,
        batch=quarter,
      )
      return (optax.apply_updates(params, updates), opt_state), None

    carry, _ = jax.lax.scan(
      step, (params, opt_state), start + jnp.arange(_CHUNK)
    )
    return carry

  return (
    jax.jit(problem.init),
    init,
    advance,
    jax.jit(problem.validate),
    jax.jit(problem.validate_all),
  )


def _number(loss):
  return float(f'{loss:.5g}') if np.isfinite(loss) else _DIVERGED


def run(case: Case) -> dict:
  """Trains once and returns the case, its settings and its results.

  Args:
    case: The run.

  Returns:
    The case's fields and `settings`, `steps`, `curve` (validation losses on a
    part of the held-out data, evenly spaced), `loss` (the final loss on all
    held-out data), `ms` (processor time per step, in the fastest pair of
    chunks) and `seconds` (for all steps). For this library's Sophia, also
    `win_rate` and, with a target, `gamma`, at the same steps as the curve.
  """
  task, drawn = TASKS[case.task], settings(case)
  switches = tuple((k, v) for k, v in drawn.items() if isinstance(v, bool))
  numbers = {
    name: jnp.float32(np.inf if x is None else x)
    for name, x in drawn.items()
    if not isinstance(x, bool)
  } | {'steps': jnp.float32(task.steps)}
  init_params, init, advance, validate, validate_all = _programs(
    task.problem, case.optimizer, switches
  )
  params = init_params(case.seed)
  opt_state = init(params, numbers, case.seed)
  history = {'curve': [], 'win_rate': [], 'gamma': []}
  seconds = []
  for start in range(0, task.steps, _CHUNK):
    clock = time.process_time()
    params, opt_state = jax.block_until_ready(
      advance(params, opt_state, numbers, case.seed, start)
    )
    seconds.append(time.process_time() - clock)
    if (start + _CHUNK) % (task.steps // _CURVE) == 0:
      history['curve'].append(_number(validate(params)))
      win_rate = optax.tree.get(opt_state, 'win_rate')
      if win_rate is not None and case.optimizer != 'signum':
        history['win_rate'].append(float(f'{win_rate:.3g}'))
      factor = optax.tree.get(opt_state, 'gamma_factor')
      if factor is not None:
        history['gamma'].append(float(f'{factor * drawn["gamma"]:.3g}'))
  # Any two consecutive chunks, 30 steps, have three refreshes.
  pairs = [a + b for a, b in zip(seconds[2::2], seconds[3::2], strict=False)]
  return (
    dataclasses.asdict(case)
    | {
      'settings': drawn,
      'steps': task.steps,
      'loss': _number(validate_all(params)),
      # Leaves out the first chunk, which may include compilation.
      'ms': round(1e3 * min(pairs) / (2 * _CHUNK), 3),
      'seconds': round(sum(seconds[1:]) * len(seconds) / len(seconds[1:]), 2),
    }
    | {name: values for name, values in history.items() if values}
  )


def case_of(result: dict) -> Case:
  """Returns the case of a result."""
  return Case(**{f.name: result[f.name] for f in dataclasses.fields(Case)})


def score(case: Case, losses: dict[Case, float]) -> float | None:
  """Returns the loss that a search minimizes, the mean over its seeds.

  A search without a parent uses two seeds, so that settings that diverge with
  one of them do not win.

  Args:
    case: A case of a search.
    losses: Final losses of the finished cases.

  Returns:
    The mean, or None if a run is missing.
  """
  found = [losses.get(twin) for twin in twins(case)]
  return None if None in found else sum(found) / len(found)


def twins(case: Case) -> list[Case]:
  """Returns a case of a search with each seed that the search uses."""
  spec = TASKS[case.task]
  has_one = spec.parent is not None or spec.margin is None
  seeds = _SEARCH_SEEDS[:1] if has_one else _SEARCH_SEEDS
  return [dataclasses.replace(case, seed=seed) for seed in seeds]


def search(
  task: str, optimizer: str, losses: dict[Case, float], num_trials: int
) -> tuple[list[Case], Case | None]:
  """Returns the cases of a search for an optimizer's settings, and the best.

  Args:
    task: A key of `TASKS`.
    optimizer: One of its peers.
    losses: Final losses of the finished cases.
    num_trials: Number of trials.

  Returns:
    All cases that are known to be needed, finished or not; and the best case if
    the search is complete, else None.
  """
  spec = TASKS[task]
  if optimizer in UNTUNED:
    _, best = search(task, 'adamw', losses, num_trials)
    return [], best and dataclasses.replace(best, optimizer=optimizer)
  if spec.parent is None:
    cases = [Case(task, optimizer, trial) for trial in range(num_trials)]
  else:
    tried, best = search(spec.parent, optimizer, losses, num_trials)
    if best is None:
      return [], None
    scores = {
      case: score(case, losses)
      for case in tried
      if case.seed == 0 and score(case, losses) is not None
    }
    first_of_trial = {}
    for case in sorted(scores, key=scores.get):
      first_of_trial.setdefault(case.trial, case)
    cases = [
      dataclasses.replace(case, task=task, rate=case.rate + spec.rate)
      for case in list(first_of_trial.values())[: spec.carried]
    ]
  if any(case not in losses for case in cases):
    return cases, None
  finalists = sorted(cases, key=losses.get)[:_NUM_FINALISTS]
  cases = list(
    dict.fromkeys(cases + [twin for case in finalists for twin in twins(case)])
  )
  if any(case not in losses for case in cases):
    return cases, None
  key = functools.partial(score, losses=losses)
  best = min(finalists, key=key)
  if spec.margin is None:
    return cases, best
  swept = [
    c
    for c in losses
    if c.trial == best.trial
    and dataclasses.replace(c, rate=best.rate) == best
    and key(c) is not None
  ]
  best = min(swept, key=key)
  for direction in -1, 1:
    for distance in range(1, 13):
      case = dataclasses.replace(best, rate=best.rate + direction * distance)
      cases += twins(case)
      if key(case) is None or key(case) > key(best) + spec.margin:
        break
  cases += [twin for case in swept for twin in twins(case)]
  cases = list(dict.fromkeys(cases))
  return cases, best if all(c in losses for c in cases) else None


def plan(results: list[dict], num_trials: int = _NUM_TRIALS) -> Iterator[Case]:
  """Yields all needed cases, finished or not, in the order to run them."""
  losses = {case_of(r): r['loss'] for r in results}
  varied = []
  for task, spec in TASKS.items():
    searches = {o: search(task, o, losses, num_trials) for o in spec.peers}
    # Takes the optimizers in turn.
    for row in itertools.zip_longest(
      *(cases for cases, _ in searches.values())
    ):
      yield from filter(None, row)
    best = [case for _, case in searches.values() if case]
    for seed in SEEDS:
      for case in best:
        yield dataclasses.replace(case, seed=seed)
    varied += [c for c in best if c.optimizer in VARIED.get(task, ())]
  for seed, case, variant in itertools.product(SEEDS, varied, VARIANTS):
    yield dataclasses.replace(case, seed=seed, variant=variant)


def run_all(runs: list[dict], path: pathlib.Path, jobs: int, num_trials: int):
  """Runs all cases that are not in `runs`, and writes the file after each."""
  os.environ['NPROC'] = '1'  # Number of XLA threads in each process.
  fingerprint = text.fingerprint(text.standard_library())
  with concurrent.futures.ProcessPoolExecutor(
    jobs, multiprocessing.get_context('spawn')
  ) as pool:
    running = {}
    while True:
      known = {case_of(r) for r in runs} | set(running.values())
      left = (c for c in plan(runs, num_trials) if c not in known)
      for case in itertools.islice(left, jobs - len(running)):
        running[pool.submit(run, case)] = case
      if not running:
        return
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        result = future.result()
        runs.append(result)
        records.write(
          path, processor=_processor(), text_sha256=fingerprint, runs=runs
        )
        print(
          time.strftime('%H:%M:%S'),
          len(runs),
          *dataclasses.astuple(running.pop(future)),
          f'loss {result["loss"]}, {result["ms"]} ms a step',
          flush=True,
        )


def _processor():
  info = pathlib.Path('/proc/cpuinfo')
  if not info.exists():
    return platform.processor()
  lines = [s for s in info.read_text().splitlines() if s.startswith('model n')]
  return lines[0].split(':')[1].strip() if lines else platform.processor()


def main(argv):
  """Runs all missing cases."""
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --output=f; got {argv[1:]}.'
    )
  path = pathlib.Path(records.OUTPUT.value or 'convergence.json')
  runs = records.read(path)['runs'] if path.exists() else []
  run_all(runs, path, _JOBS.value, _TRIALS.value)


if __name__ == '__main__':
  _TRIALS = flags.DEFINE_integer(
    'trials', _NUM_TRIALS, 'Trials for each optimizer.'
  )
  _JOBS = flags.DEFINE_integer('jobs', 1, 'Parallel runs, one core each.')
  app.run(main)
