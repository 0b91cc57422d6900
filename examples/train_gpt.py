"""Trains a GPT with Sophia or another optimizer, from a laptop to GPT-2's size.

  python examples/train_gpt.py --optimizer=sophia_h
  python examples/train_gpt.py --config=gpt2_124m --data_dir=... --dry_run

Each field of gpt_configs.Config is a flag. If a run is killed, start it again:
it resumes from its last checkpoint and ends with the same bits. Ctrl-C writes a
checkpoint first, unless there are several processes.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from typing import NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import tqdm

import checkpoints
import dry_run
import gpt_configs
import gpt_program
import sharding
import text


class Result(NamedTuple):
  """Result of a run."""

  state: gpt_program.State
  history: list[dict[str, float]]  # one entry for each validation
  compile_seconds: float
  finished: bool  # False after Ctrl-C


@contextlib.contextmanager
def postponed_interrupt():
  """Yields an event that Ctrl-C sets, so that the current step finishes.

  A second Ctrl-C interrupts at once. With several processes the first one does,
  because it would reach them at different steps.
  """
  interrupted = threading.Event()
  # Only the main thread can handle signals.
  if (
    threading.current_thread() is not threading.main_thread()
    or jax.process_count() > 1
  ):
    yield interrupted
    return

  def handler(*_):
    interrupted.set()
    signal.signal(signal.SIGINT, previous)

  previous = signal.signal(signal.SIGINT, handler)
  try:
    yield interrupted
  finally:
    signal.signal(signal.SIGINT, previous)


def train(config: gpt_configs.Config) -> Result:
  """Trains, or resumes from the newest checkpoint in config.out_dir.

  Seconds in the history do not include compilation, validation and checkpoints.
  With several processes, each calls this function and gets the history.

  Args:
    config: the settings.

  Returns:
    The state, the history and the time of compilation.
  """
  train_tokens, val_tokens = text.load(config.data_dir)
  sizes = config.block_size, config.vocab_size
  mesh = sharding.make_mesh(config.mesh)
  # Each process has all tokens and puts the right rows on its devices.
  val_batches = sharding.put(
    text.validation(
      val_tokens, config.eval_batches, config.micro_batch_size, *sizes
    ),
    sharding.batch_sharding(mesh, axis=1),
  )

  def batch_at(step):  # (B, T + 1)
    return sharding.put(
      text.sample(train_tokens, config.seed, step, config.batch_size, *sizes),
      sharding.batch_sharding(mesh),
    )

  program = gpt_program.make_program(config, mesh)
  start = time.perf_counter()
  with jax.set_mesh(mesh):
    step_fn = program.step.lower(program.state, batch_at(0)).compile()
    evaluate = program.evaluate.lower(
      program.state.params, val_batches
    ).compile()
  compile_seconds = time.perf_counter() - start

  saver = checkpoints.Checkpoints(config)
  step, state, record = saver.restore(program.state) or (
    0,
    jax.block_until_ready(program.init()),
    {'seconds': 0.0, 'history': []},
  )

  # On CPUs, overlapping steps of several processes can deadlock.
  one_by_one = jax.process_count() > 1 and jax.default_backend() == 'cpu'
  with (
    postponed_interrupt() as interrupted,
    tqdm.tqdm(
      total=config.num_steps,
      initial=step,
      desc=config.optimizer,
      disable=jax.process_index() > 0,
    ) as bar,
  ):
    metrics = {}
    clock = time.perf_counter()
    while step < config.num_steps and not interrupted.is_set():
      last_metrics = metrics
      state, metrics = step_fn(state, batch_at(step))
      step += 1
      if one_by_one:
        jax.block_until_ready(state)
      # Shows metrics of the previous step, so as not to wait for this one.
      shown = {name: f'{float(x):.3f}' for name, x in last_metrics.items()}
      seconds = record['seconds'] + time.perf_counter() - clock
      shown['tokens/s'] = f'{config.tokens_per_step * step / seconds:,.0f}'
      bar.set_postfix(shown, refresh=False)
      bar.update()

      validate = step % config.eval_interval == 0 or step == config.num_steps
      save = step % config.checkpoint_interval == 0
      if not validate and not save:
        continue
      jax.block_until_ready(state)
      record['seconds'] += time.perf_counter() - clock
      if validate:
        record['history'].append(
          {
            'step': step,
            'seconds': record['seconds'],
            'val_loss': float(evaluate(state.params, val_batches)),
            **{name: float(x) for name, x in metrics.items()},
          }
        )
      if save:
        saver.save(step, state, record)
      clock = time.perf_counter()
    jax.block_until_ready(state)
    record['seconds'] += time.perf_counter() - clock
    saver.save(step, state, record)
  saver.close()
  return Result(
    state, record['history'], compile_seconds, step == config.num_steps
  )


def describe(config: gpt_configs.Config) -> str:
  """Describes a step of the run without allocating parameters."""
  mesh = sharding.make_mesh(config.mesh)
  program = gpt_program.make_program(config, mesh)
  with jax.set_mesh(mesh):
    return dry_run.report(config, program.step, program.state, program.batch)


def define_flags():
  """Defines a flag for each setting, which overrides that of --config."""
  flags.DEFINE_enum(
    'config', 'demo', list(gpt_configs.CONFIGS), 'Settings to start from.'
  )
  flags.DEFINE_bool(
    'dry_run', False, 'Only print shapes, parameters, FLOPs and bytes.'
  )
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'host:port of process 0. Pass it to each of several processes to join '
    'their devices.',
  )
  flags.DEFINE_integer('num_processes', None, 'Total number of processes.')
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')
  define = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
  }
  for field in dataclasses.fields(gpt_configs.Config):
    define[field.type](field.name, None, f'See {gpt_configs.__name__}.py.')


def config_from_flags() -> gpt_configs.Config:
  given = {
    field.name: flags.FLAGS[field.name].value
    for field in dataclasses.fields(gpt_configs.Config)
    if flags.FLAGS[field.name].value is not None
  }
  config = gpt_configs.CONFIGS[flags.FLAGS.config]
  name = f'{flags.FLAGS.config}_{given.get("optimizer", config.optimizer)}'
  name += '_eigenbasis' * given.get('eigenbasis', config.eigenbasis)
  given.setdefault('out_dir', f'runs/{name}')
  try:
    vocab_size = text.vocab_size(
      given.get('data_dir', ''), given.get('vocab_size')
    )
    if vocab_size is not None:
      given['vocab_size'] = vocab_size
    return dataclasses.replace(config, **given)
  except ValueError as error:
    raise app.UsageError(str(error)) from error


def join_processes_from_flags():
  """Joins the devices of several processes. Call it before JAX is used."""
  names = 'coordinator_address', 'num_processes', 'process_id'
  given = {name: flags.FLAGS[name].value for name in names}
  if None not in given.values():
    jax.distributed.initialize(**given)
  elif any(value is not None for value in given.values()):
    raise app.UsageError(
      'Each of several processes needs --coordinator_address, --num_processes '
      f'and --process_id; got {given}.'
    )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --num_steps=9; got {argv[1:]}.'
    )
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file as INFO
  config = config_from_flags()
  join_processes_from_flags()
  if flags.FLAGS.dry_run:
    lines = [describe(config)]
  else:
    result = train(config)
    lines = [
      ', '.join(f'{name} {value:.6g}' for name, value in entry.items())
      for entry in result.history
    ]
    lines.append(
      f'compiled in {result.compile_seconds:.1f} s; '
      f'checkpoint in {config.out_dir}'
    )
    if not result.finished:
      lines.append('Interrupted. The same command continues from here.')
  if jax.process_index() == 0:
    print('\n'.join(lines))


if __name__ == '__main__':
  define_flags()
  app.run(main)
