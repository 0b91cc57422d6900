"""How far optimizers get, after the same search for each, by length of the run.

  python benchmarks/convergence.py --output=benchmarks/convergence.json --jobs=2
  python benchmarks/convergence.py --show=benchmarks/convergence.json \
    --plot=docs/_static

convergence_protocol.py says what is run. Every run ends with its schedule:
linear warm-up, cosine to 5 %. Sophia's curvature is that of a quarter of the
batch, on every tenth step.

A run is written as soon as it ends, and runs that are in the file are not run
again, so a benchmark that was stopped continues where it was. --jobs runs go on
side by side, in one thread each. `step_cost.py --tables=optimizers` compares
the optimizers' times.

A new optimizer needs an entry in OPTIMIZERS below, in `SPACES` (or `UNTUNED`,
if its settings follow from AdamW's) and in the peers of tasks in
convergence_protocol.py, a label in convergence_tables.py and a style in
convergence_plots.py. The next call runs what is missing.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import convergence_plots
import convergence_problems
import convergence_protocol as protocol
import convergence_tables
import records
import sophia_optax
import text

_FINAL_RATE = 0.05
_CURVE = 20  # validations in a run
CHUNK = 15  # steps in one call of the program; divides all steps / _CURVE
_DIVERGED = 1e9  # sorts last, and JSON has no infinity


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

  return schedule if 'gamma_end' in s else s['gamma']


def _from_optax(make, s, problem, key):
  del key
  decay = {'weight_decay': s['weight_decay'], 'mask': problem.decay_mask}
  return make(_learning_rate(s), s['b1'], s['b2'], **decay)


def _muon(s, problem, key):
  """Muon for the matrices that the eigenbasis rotates, AdamW for others."""
  del key
  of_kernel = lambda path, _: (
    optax.contrib.MuonDimensionNumbers(-2, -1)
    if path[-1].key == 'kernel'
    else None
  )
  decay = s['weight_decay']
  return optax.contrib.muon(
    _learning_rate(s),
    beta=s['b1'],
    weight_decay=decay,
    weight_decay_mask=problem.decay_mask,
    adam_b1=s['b1'],
    adam_b2=s['b2'],
    adam_weight_decay=decay,
    muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(
      of_kernel, params
    ),
    consistent_rms=0.2,  # Updates as large as AdamW's.
  )


def _contrib(s, problem, key):
  return optax.contrib.sophia(
    _learning_rate(s),
    s['b1'],
    s['b2'],
    weight_decay=s['weight_decay'],
    weight_decay_mask=problem.decay_mask,
    gamma=s['gamma'],
    hessian_diagonal_fn=optax.contrib.hutchinson_estimator_diag_hessian(
      jax.random.key_data(key)
    ),
  )


def _sophia(make_estimator, s, problem, key):
  if 'sophiaw' in s:
    return sophia_optax.sophiaw(
      _learning_rate(s),
      s['b1'],
      s['adam_b2'],
      weight_decay=s['weight_decay'],
      mask=problem.decay_mask,
      curvature=s['sophiaw'],
      eigenbasis=s.get('eigenbasis', False),
    )
  return optax.chain(
    sophia_optax.scale_by_sophia(
      s['b1'],
      s.get('b2', 0.99),
      s.get('eps', 1e-8),
      gamma=_gamma(s),
      hessian_diagonal_fn=make_estimator(s, problem, key),
      target_win_rate=s.get('target_win_rate'),
      nesterov=s['nesterov'],
      nu_bias_correction=s.get('nu_bias_correction', False),
      adam_b2=s.get('adam_b2'),
    ),
    optax.clip_by_block_rms(s.get('cap', np.inf)),
    optax.add_decayed_weights(s['weight_decay'], problem.decay_mask),
    optax.scale_by_learning_rate(_learning_rate(s)),
  )


def _gauss_newton_bartlett(s, problem, key):
  # The average of several estimates, each on its part of the batch, has less
  # variance than one on all of it, at the same cost.
  return sophia_optax.microbatched(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
      key, likelihood=problem.likelihood
    ),
    s.get('parts', 4),
  )


_SOPHIA_G = functools.partial(_sophia, _gauss_newton_bartlett)
_SOPHIA_H = functools.partial(
  _sophia,
  lambda s, problem, key: sophia_optax.hutchinson_estimator_diag_hessian(key),
)
# From settings and `steps` (floats may be traced), problem, and key of probes.
OPTIMIZERS = {
  'adamw': functools.partial(_from_optax, optax.adamw),
  'nadamw': functools.partial(_from_optax, optax.nadamw),
  'lion': functools.partial(_from_optax, optax.lion),
  'contrib': _contrib,
  'sophia_g': _SOPHIA_G,
  'sophia_h': _SOPHIA_H,
  'copied_g': _SOPHIA_G,
  'copied_h': _SOPHIA_H,
  'eigen_g': _SOPHIA_G,
  'eigen_h': _SOPHIA_H,
  'soap': functools.partial(
    _from_optax,
    functools.partial(sophia_optax.sophiaw, curvature=None, eigenbasis=True),
  ),
  'muon': _muon,
  'tuned_muon': _muon,
  'signum': lambda s, problem, key: _sophia(
    lambda *_: optax.set_to_zero(), s | {'gamma': 0.0}, problem, key
  ),
}


def make_optimizer(
  name: str, s: dict, problem: convergence_problems.Problem, seed: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer with clipping, schedule and masked decay."""
  tx = OPTIMIZERS[name](s, problem, jax.random.key(seed))
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
def _programs(problem_name, optimizer_name, static):
  """Returns jitted functions. Trials, lengths and seeds are their arguments."""
  problem = convergence_problems.get(problem_name)

  def make(numbers, seed):
    return make_optimizer(optimizer_name, numbers | dict(static), problem, seed)

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
      # sophiaw gets the whole batch, and takes a quarter of it.
      part = len(batch) if 'sophiaw' in dict(static) else len(batch) // 4
      curvature_batch = batch[:part]
      updates, opt_state = tx.update(
        _gradient(problem, params, batch),
        opt_state,
        params,
        # optax.contrib's estimator passes the parameters alone.
        obj_fn=lambda params, batch=curvature_batch: problem.loss(
          params, batch
        ),
        predict_fn=problem.predict,
        batch=curvature_batch,
      )
      return (optax.apply_updates(params, updates), opt_state), None

    steps = start + jnp.arange(CHUNK)
    return jax.lax.scan(step, (params, opt_state), steps)[0]

  validate = jax.jit(problem.validate), jax.jit(problem.validate_all)
  return jax.jit(problem.init), init, advance, *validate


def start(
  task: str, optimizer: str, settings: dict, seed: int
) -> tuple[Any, Any, Callable, Callable, Callable]:
  """Returns the start of a run, and what continues and validates it.

  They are parameters and optimizer state; a function from these two, donated,
  and the number of the next step to both after `CHUNK` steps; and the problem's
  `validate` and `validate_all`.
  """
  spec = protocol.TASKS[task]
  numbers = {k: v for k, v in settings.items() if isinstance(v, float)}
  static = tuple(x for x in settings.items() if x[0] not in numbers)
  numbers = jax.tree.map(jnp.float32, numbers | {'steps': float(spec.steps)})
  init_params, init, advance, *validate = _programs(
    spec.problem, optimizer, static
  )
  params = init_params(seed)

  def advance_run(params, opt_state, step):
    return advance(params, opt_state, numbers, seed, step)

  return params, init(params, numbers, seed), advance_run, *validate


def _rounded(x, digits=5):
  return float(f'{x:.{digits}g}') if np.isfinite(x) else _DIVERGED


def run(case: protocol.Case) -> dict:
  """Trains once.

  Returns the case, without default values, `device`, `jax` and `loss`, the
  final loss on all held-out data. For a run of the report also `settings`,
  `curve` (losses on a part of the held-out data, evenly spaced) and, with this
  library's Sophia, `win_rate` at the same steps.
  """
  spec = protocol.TASKS[case.task]
  settings = protocol.settings(case)
  params, opt_state, advance, validate, validate_all = start(
    case.task, case.optimizer, settings, case.seed
  )
  curve, win_rates = [], []
  for step in range(0, spec.steps, CHUNK):
    params, opt_state = advance(params, opt_state, step)
    if (step + CHUNK) % (spec.steps // _CURVE) == 0:
      curve.append(_rounded(validate(params)))
      win_rate = optax.tree.get(opt_state, 'win_rate')
      if win_rate is not None and case.optimizer != 'signum':
        win_rates.append(_rounded(win_rate, 3))
  result = {
    f.name: getattr(case, f.name)
    for f in dataclasses.fields(case)
    if getattr(case, f.name) != f.default
  } | {
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'loss': _rounded(validate_all(params)),
  }
  if protocol.is_reported(case):
    result |= {'settings': settings, 'curve': curve}
    result |= {'win_rate': win_rates} if win_rates else {}
  return result


def run_all(
  runs: list[dict],
  save: Callable[[], Any],
  jobs: int,
  tasks: Collection[str] = tuple(protocol.TASKS),
):
  """Adds all cases that are missing in `runs`, and calls `save` after each."""
  os.environ['NPROC'] = '1'  # Number of XLA threads in each process.
  with concurrent.futures.ProcessPoolExecutor(
    jobs, multiprocessing.get_context('spawn')
  ) as pool:
    running = {}
    while True:
      known = {protocol.case_of(r) for r in runs} | set(running.values())
      left = (
        c for c in protocol.plan(runs) if c.task in tasks and c not in known
      )
      for case in itertools.islice(left, jobs - len(running)):
        running[pool.submit(run, case)] = case
      if not running:
        return
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        runs.append(future.result())
        save()
        now, case = time.strftime('%H:%M:%S'), running.pop(future)
        print(now, len(runs), case, f'loss {runs[-1]["loss"]}', flush=True)


def _measure(results, save):
  results['text_sha256'] = text.fingerprint(text.standard_library())
  runs = results['runs'] = results.pop('runs', [])
  run_all(runs, save, _JOBS.value, _TASKS.value)


def _render(results):
  path = pathlib.Path(__file__).with_name('convergence_times.json')
  runs, times = results['runs'], records.read(path)['optimizers']
  if _PLOT.value:
    path = pathlib.Path(_PLOT.value, 'convergence.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    plot = convergence_plots.plot_lengths(runs)
    plot.savefig(path, dpi=200, transparent=True)
  return convergence_tables.render(runs, times)


if __name__ == '__main__':
  _TASKS = flags.DEFINE_multi_enum(
    'task',
    list(protocol.TASKS),
    list(protocol.TASKS),
    'Task to run; may be repeated. All by default. The output must have the '
    'runs of the task from which its settings come.',
  )
  _JOBS = flags.DEFINE_integer('jobs', 1, 'Parallel runs, one core each.')
  _PLOT = flags.DEFINE_string('plot', None, 'Folder to draw into.')
  records.main(_measure, _render)
