"""Trains a GPT with Sophia or another optimizer, from a laptop to GPT-2's size.

  python examples/train_gpt.py --optimizer=sophia_h
  python examples/train_gpt.py --config=gpt2_124m --data_dir=... --dry_run

Each field of gpt_configs.Config is a flag. If a run is killed, start it again:
it resumes from its last checkpoint and ends with the same bits. Ctrl-C writes a
checkpoint first, unless there are several processes.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import signal
import threading
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import optax
import tqdm

import checkpoints
import dry_run
import gpt
import gpt_configs
import sharding
import sophia_optax
import text


class State(NamedTuple):
  """All values that a step changes. The batch is a function of the step."""

  params: Any
  opt_state: optax.OptState


class Result(NamedTuple):
  """Result of a run."""

  state: State
  history: list[dict[str, float]]  # one entry for each validation
  compile_seconds: float
  finished: bool  # False after Ctrl-C


def make_model(config):
  return gpt.GPT(
    config.vocab_size,
    config.block_size,
    config.num_layers,
    config.num_heads,
    config.width,
    jnp.dtype(config.dtype),
    config.unroll,
    config.remat,
  )


def on_first_sequences(size, num_parts, estimator):
  """Estimates on the first sequences of the batch, one part at a time.

  This moves sequences between devices, but only on steps that refresh the
  curvature, because the optimizer calls the estimator only on those.
  """
  estimator = sophia_optax.microbatched(estimator, num_parts)

  def update(updates, state, params=None, *, batch, **extra_args):
    tokens = batch.reshape(-1, batch.shape[-1])[:size]  # (size, T + 1)
    return estimator.update(
      updates, state, params, batch=sharding.divide(tokens), **extra_args
    )

  return optax.GradientTransformationExtraArgs(estimator.init, update)


def make_gamma(config):
  """Returns γ, a constant or a schedule that decays in the second half."""
  if config.final_gamma == 1:
    return config.gamma
  half = config.num_steps // 2
  return optax.join_schedules(
    [
      optax.constant_schedule(config.gamma),
      optax.cosine_decay_schedule(
        config.gamma, config.num_steps - half, alpha=config.final_gamma
      ),
    ],
    [half],
  )


def make_optimizer(config):
  """Returns the optimizer with clipping, warm-up, cosine and masked decay."""
  learning_rate = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate * config.final_learning_rate,
  )
  part = functools.partial(
    on_first_sequences, config.curvature_batch_size, config.curvature_parts
  )
  if config.optimizer == 'sophia_h':
    optimizer = sophia_optax.sophia(
      learning_rate,
      config.b1,
      config.b2,
      config.eps,
      config.weight_decay,
      gpt.decay_mask,
      make_gamma(config),
      update_interval=config.update_interval,
      target_win_rate=config.target_win_rate or None,
      nesterov=config.nesterov,
      nu_bias_correction=config.nu_bias_correction,
      max_update_rms=config.max_update_rms or None,
      hessian_diagonal_fn=part(
        sophia_optax.hutchinson_estimator_diag_hessian(config.seed)
      ),
    )
  elif config.optimizer == 'sophia_g':
    optimizer = sophia_optax.sophia_g(
      learning_rate,
      config.b1,
      config.b2,
      make_gamma(config),
      config.weight_decay,
      weight_decay_mask=gpt.decay_mask,
      update_interval=config.update_interval,
      target_win_rate=config.target_win_rate or None,
      nesterov=config.nesterov,
      nu_bias_correction=config.nu_bias_correction,
      max_update_rms=config.max_update_rms or None,
      hessian_diagonal_fn=part(
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
          config.seed,
          num_chunks=config.head_chunks if config.head_chunks > 1 else None,
        )
      ),
    )
  elif config.optimizer == 'lion':
    optimizer = optax.lion(
      learning_rate,
      config.b1,
      config.b2,
      weight_decay=config.weight_decay,
      mask=gpt.decay_mask,
    )
  else:
    adam = {'adamw': optax.adamw, 'nadamw': optax.nadamw}[config.optimizer]
    optimizer = adam(
      learning_rate,
      config.b1,
      config.b2,
      config.eps,
      weight_decay=config.weight_decay,
      mask=gpt.decay_mask,
    )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def make_predict(model):
  def predict_fn(params, tokens):  # tokens: (B, T + 1)
    return model.apply({'params': params}, tokens[:, :-1])  # (B, T, V)

  return predict_fn


def make_loss(predict_fn):
  def loss_fn(params, tokens):  # tokens: (B, T + 1)
    return optax.softmax_cross_entropy_with_integer_labels(
      predict_fn(params, tokens), tokens[:, 1:]
    ).mean()

  return loss_fn


def make_chunked_loss(hidden_fn, head_fn, num_chunks):
  """Returns the same loss, with only the logits of one chunk in memory.

  The backward pass computes the logits again. A custom derivative rule could
  avoid that, but Sophia-H needs second derivatives of the loss, by jvp.
  """

  def cut(x):  # (B, T, ...) -> (K, B, T/K, ...)
    return jnp.moveaxis(x.reshape(len(x), num_chunks, -1, *x.shape[2:]), 1, 0)

  def loss_fn(params, tokens):  # tokens: (B, T + 1)
    @jax.checkpoint
    def chunk_loss(chunk):
      hidden, labels = chunk
      return optax.softmax_cross_entropy_with_integer_labels(
        head_fn(params, hidden), labels
      ).mean()

    chunks = cut(hidden_fn(params, tokens)), cut(tokens[:, 1:])
    return jax.lax.map(chunk_loss, chunks).mean()

  return loss_fn


def make_fns(config, model):
  """Returns the functions for the optimizers: obj_fn, predict_fn, head_fn."""
  if config.head_chunks == 1:
    predict_fn = make_predict(model)
    return {'obj_fn': make_loss(predict_fn), 'predict_fn': predict_fn}

  def hidden_fn(params, tokens):  # tokens: (B, T + 1)
    inputs = tokens[:, :-1]
    return model.apply({'params': params}, inputs, method=model.hidden)

  def head_fn(params, hidden):  # (B, T/K, C) -> (B, T/K, V)
    return model.apply({'params': params}, hidden, method=model.head)

  return {
    'obj_fn': make_chunked_loss(hidden_fn, head_fn, config.head_chunks),
    'predict_fn': hidden_fn,
    'head_fn': head_fn,
  }


def make_init(config, model, optimizer):
  def init():
    tokens = jnp.zeros((1, config.block_size), jnp.int32)
    params = model.init(jax.random.key(config.seed), tokens)['params']
    return State(params, optimizer.init(params))

  return init


def make_step(fns, optimizer):
  """Returns the function (state, batch, refresh) -> (state, metrics).

  `refresh` is a bool that says whether Sophia refreshes the curvature. With
  None, the count of steps decides.
  """
  loss_fn = fns['obj_fn']

  def step(state, batch, refresh=None):  # batch: (B/M, M, T + 1)
    params, opt_state = state

    def add_micro_batch(total, tokens):  # tokens: (M, T + 1)
      new = jax.value_and_grad(loss_fn)(params, tokens)
      return jax.tree.map(jnp.add, total, new), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add_micro_batch, zero, batch)
    loss, grads = jax.tree.map(lambda x: x / len(batch), total)

    # On a refresh, Sophia-H calls obj_fn, and Sophia-G calls predict_fn and
    # head_fn, on parts of this batch. Other optimizers ignore them.
    updates, opt_state = optimizer.update(
      grads, opt_state, params, batch=batch, refresh=refresh, **fns
    )
    params = optax.apply_updates(params, updates)

    metrics = {'loss': loss}
    for name in ('win_rate', 'gamma_factor'):
      value = optax.tree.get(opt_state, name)
      if value is not None:
        metrics[name] = value
    return State(params, opt_state), metrics

  return step


def make_evaluate(loss_fn):
  def evaluate(params, batches):  # batches: (N, B, T + 1)
    return jax.lax.map(lambda tokens: loss_fn(params, tokens), batches).mean()

  return evaluate


class Program(NamedTuple):
  """Functions for a mesh. Trace them within `jax.set_mesh(mesh)`."""

  state: State  # shapes, dtypes and shardings
  batch: jax.ShapeDtypeStruct  # (B/M, M, T + 1), with its sharding
  init: Callable  # () -> state
  step: Callable  # (state, batch, refresh) -> (state, metrics); donates state
  evaluate: Callable  # (params, batches) -> loss


def make_program(config, mesh, optimizer=None) -> Program:
  """Returns what runs on a mesh; the optimizer is the config's by default."""
  model = make_model(config)
  optimizer = optimizer or make_optimizer(config)
  fns = make_fns(config, model)
  init = make_init(config, model, optimizer)
  step = make_step(fns, optimizer)
  evaluate = make_evaluate(fns['obj_fn'])

  shapes = jax.eval_shape(init)
  shardings = sharding.state_sharding(mesh, shapes)
  replicated = sharding.replicated(mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  size = config.micro_batch_size
  batch = jax.ShapeDtypeStruct(
    (config.batch_size // size, size, config.block_size + 1),
    jnp.int32,
    sharding=sharding.batch_sharding(mesh, axis=1),
  )
  return Program(
    state,
    batch,
    jax.jit(init, out_shardings=shardings),
    # The old state is donated, so the new one uses its memory.
    jax.jit(
      step,
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      static_argnames='refresh',
    ),
    jax.jit(evaluate, out_shardings=replicated),
  )


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
  # Each process has all tokens and puts the right rows on its devices. Each
  # micro-batch is divided over all devices, so steps do not move sequences.
  rows = sharding.batch_sharding(mesh, axis=1)
  val_batches = sharding.put(
    text.validation(
      val_tokens, config.eval_batches, config.micro_batch_size, *sizes
    ),
    rows,
  )

  def batch_at(step):  # (B/M, M, T + 1)
    batch = text.sample(
      train_tokens, config.seed, step, config.batch_size, *sizes
    )
    return sharding.put(
      batch.reshape(-1, config.micro_batch_size, batch.shape[-1]), rows
    )

  program = make_program(config, mesh)
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
  program = make_program(config, mesh)
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
  optimizer = given.pop('optimizer', 'sophia_h')
  given.setdefault('out_dir', f'runs/{flags.FLAGS.config}_{optimizer}')
  try:
    vocab_size = text.vocab_size(
      given.get('data_dir', ''), given.get('vocab_size')
    )
    if vocab_size is not None:
      given['vocab_size'] = vocab_size
    return gpt_configs.get_config(flags.FLAGS.config, optimizer, **given)
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
