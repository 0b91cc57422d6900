"""How far optimizers get, after the same search for each, by length of the run.

  python benchmarks/convergence.py --output=benchmarks/convergence.json --jobs=2
  python benchmarks/convergence_plots.py --show=benchmarks/convergence.json

convergence_protocol.py says what is run. Every run ends with its schedule:
linear warm-up, cosine to 5 %. Sophia's curvature is that of a quarter of the
batch, on every tenth step.

A run is written as soon as it ends, and runs that are in the file are not run
again, so a benchmark that was stopped continues where it was. --jobs runs go on
side by side, in one thread each. Seconds are of the host's processor, without
compilation and validation. On a GPU they do not measure the run.
convergence_times.py compares the optimizers' times.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import platform
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import convergence_problems
import convergence_protocol as protocol
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


def _scale_by_sophia(s, estimator):
  return optax.chain(
    sophia_optax.scale_by_sophia(
      s['b1'],
      s['b2'],
      s.get('eps', 1e-8),
      gamma=_gamma(s),
      hessian_diagonal_fn=estimator,
      target_win_rate=s.get('target_win_rate'),
      nesterov=s['nesterov'],
      nu_bias_correction=s['nu_bias_correction'],
      adam_b2=s.get('adam_b2'),
    ),
    optax.clip_by_block_rms(s.get('cap', np.inf)),
  )


def make_optimizer(
  name: str, s: dict, problem, seed
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer with clipping, schedule and masked decay.

  Args:
    name: A key of `protocol.SPACES`, or one of `protocol.UNTUNED`.
    s: Its settings and `steps`. Floats may be traced, integers and booleans may
      not.
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
      # The average of several estimates, each on its part of the batch, has
      # less variance than one on all of it, at the same cost.
      direction = _scale_by_sophia(
        s,
        sophia_optax.microbatched(
          sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
            probe, likelihood=problem.likelihood
          ),
          s.get('parts', 4),
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
      step, (params, opt_state), start + jnp.arange(CHUNK)
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


def run(case: protocol.Case) -> dict:
  """Returns the case, settings, steps, device, and what `train` returns."""
  settings = protocol.settings(case)
  steps = protocol.TASKS[case.task].steps
  return (
    dataclasses.asdict(case)
    | {
      'settings': settings,
      'steps': steps,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    | train(case.task, case.optimizer, settings, case.seed, steps)
  )


def start(
  task: str, optimizer: str, settings: dict, seed: int
) -> tuple[Any, Any, Callable, Callable, Callable]:
  """Returns the start of a run, and what continues and validates it.

  Args:
    task: A key of `protocol.TASKS`, whose length the schedules have.
    optimizer: A key of `protocol.SPACES`, or one of `protocol.UNTUNED`.
    settings: Its hyperparameters.
    seed: Seed of parameters, batches and probes.

  Returns:
    Parameters and optimizer state; a function from these two, donated, and the
    number of the next step to both after `CHUNK` steps; and the problem's
    `validate` and `validate_all`.
  """
  spec = protocol.TASKS[task]
  static = {k: v for k, v in settings.items() if isinstance(v, int)}
  numbers = {
    name: jnp.float32(x) for name, x in settings.items() if isinstance(x, float)
  } | {'steps': jnp.float32(spec.steps)}
  init_params, init, advance, validate, validate_all = _programs(
    spec.problem, optimizer, tuple(static.items())
  )
  params = init_params(seed)

  def advance_run(params, opt_state, step):
    return advance(params, opt_state, numbers, seed, step)

  opt_state = init(params, numbers, seed)
  return params, opt_state, advance_run, validate, validate_all


def train(
  task: str, optimizer: str, settings: dict, seed: int, num_steps: int
) -> dict:
  """Trains once.

  Args:
    task: As in `start`.
    optimizer: As in `start`.
    settings: As in `start`.
    seed: As in `start`.
    num_steps: Number of steps, the task's or fewer.

  Returns:
    `curve` (validation losses on a part of the held-out data, evenly spaced),
    `loss` (the final loss on all held-out data) and `seconds` (for all steps).
    For this library's Sophia, also `win_rate` and, with a target, `gamma`, at
    the same steps as the curve.
  """
  params, opt_state, advance, validate, validate_all = start(
    task, optimizer, settings, seed
  )
  every = protocol.TASKS[task].steps // _CURVE
  history = {'curve': [], 'win_rate': [], 'gamma': []}
  seconds = []
  for step in range(0, num_steps, CHUNK):
    clock = time.process_time()
    params, opt_state = jax.block_until_ready(advance(params, opt_state, step))
    seconds.append(time.process_time() - clock)
    if (step + CHUNK) % every == 0:
      history['curve'].append(_number(validate(params)))
      win_rate = optax.tree.get(opt_state, 'win_rate')
      if win_rate is not None and optimizer != 'signum':
        history['win_rate'].append(float(f'{win_rate:.3g}'))
      factor = optax.tree.get(opt_state, 'gamma_factor')
      if factor is not None:
        gamma = factor * settings['gamma']
        history['gamma'].append(float(f'{gamma:.3g}'))
  return {
    'loss': _number(validate_all(params)),
    # Leaves out the first chunk, which may include compilation.
    'seconds': round(sum(seconds[1:]) * len(seconds) / len(seconds[1:]), 2),
  } | {name: values for name, values in history.items() if values}


def run_all(
  runs: list[dict],
  path: pathlib.Path,
  jobs: int,
  num_trials: int,
  tasks: Collection[str] = tuple(protocol.TASKS),
):
  """Runs all cases that are not in `runs`, and writes the file after each.

  Args:
    runs: Finished runs. New ones are appended.
    path: The file.
    jobs: Number of processes.
    num_trials: Number of trials for each optimizer.
    tasks: Keys of `protocol.TASKS`.
  """
  os.environ['NPROC'] = '1'  # Number of XLA threads in each process.
  fingerprint = text.fingerprint(text.standard_library())
  with concurrent.futures.ProcessPoolExecutor(
    jobs, multiprocessing.get_context('spawn')
  ) as pool:
    running = {}
    while True:
      known = {protocol.case_of(r) for r in runs} | set(running.values())
      left = (
        c
        for c in protocol.plan(runs, num_trials)
        if c.task in tasks and c not in known
      )
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
          f'loss {result["loss"]}, {result["seconds"]} s',
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
  records.check_only_flags(argv)
  if records.SHOW.value:
    raise app.UsageError('convergence_plots.py shows the tables of a file.')
  path = pathlib.Path(records.OUTPUT.value or 'convergence.json')
  runs = records.read(path)['runs'] if path.exists() else []
  run_all(runs, path, _JOBS.value, _TRIALS.value, _TASKS.value)


if __name__ == '__main__':
  _TRIALS = flags.DEFINE_integer(
    'trials', protocol.NUM_TRIALS, 'Trials for each optimizer.'
  )
  _TASKS = flags.DEFINE_multi_enum(
    'task',
    list(protocol.TASKS),
    list(protocol.TASKS),
    'Task to run; may be repeated. All by default. The output must have the '
    'runs of the task from which its settings come.',
  )
  _JOBS = flags.DEFINE_integer('jobs', 1, 'Parallel runs, one core each.')
  app.run(main)
