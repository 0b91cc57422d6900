"""Trains a GPT with Sophia or AdamW, on a laptop or with GPT-2's settings.

  python examples/train_gpt.py --optimizer=sophia_h
  python examples/train_gpt.py --config=gpt2_124m --data_dir=... --dry_run

Every field of gpt_configs.Config is a flag. A run that was killed goes on from
its last checkpoint when started again, and ends with the same bits. Ctrl-C
writes a checkpoint first.
"""

import contextlib
import dataclasses
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
import sophia_optax
import text


class State(NamedTuple):
  """Everything that a step changes; the batch is a function of the step."""

  params: Any
  opt_state: optax.OptState


class Result(NamedTuple):
  """What a run left."""

  state: State
  history: list[dict[str, float]]  # one entry for each validation
  compile_seconds: float
  finished: bool  # False after Ctrl-C


def make_model(config):
  return gpt.GPT(
      config.vocab_size, config.block_size, config.num_layers,
      config.num_heads, config.width, jnp.dtype(config.dtype), config.unroll,
      config.remat)


def make_optimizer(config):
  """Returns the optimizer with clipping, warm-up, cosine and masked decay."""
  learning_rate = optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=config.learning_rate,
      warmup_steps=config.warmup_steps, decay_steps=config.num_steps,
      end_value=config.learning_rate * config.final_learning_rate)
  if config.optimizer == 'sophia_h':
    optimizer = sophia_optax.sophia(
        learning_rate, config.b1, config.b2, config.eps, config.weight_decay,
        gpt.decay_mask, config.gamma, update_interval=config.update_interval,
        hessian_diagonal_fn=sophia_optax.microbatched(
            sophia_optax.hutchinson_estimator_diag_hessian(config.seed),
            config.curvature_parts))
  elif config.optimizer == 'sophia_g':
    optimizer = sophia_optax.sophia_g(
        learning_rate, config.b1, config.b2, config.gamma, config.weight_decay,
        weight_decay_mask=gpt.decay_mask,
        update_interval=config.update_interval,
        hessian_diagonal_fn=sophia_optax.microbatched(
            sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
                config.seed),
            config.curvature_parts))
  else:
    optimizer = optax.adamw(
        learning_rate, config.b1, config.b2, config.eps,
        weight_decay=config.weight_decay, mask=gpt.decay_mask)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def make_predict(model):
  def predict_fn(params, tokens):  # tokens: (B, T + 1)
    return model.apply({'params': params}, tokens[:, :-1])  # (B, T, V)

  return predict_fn


def make_loss(predict_fn):
  def loss_fn(params, tokens):  # tokens: (B, T + 1)
    return optax.softmax_cross_entropy_with_integer_labels(
        predict_fn(params, tokens), tokens[:, 1:]).mean()

  return loss_fn


def make_init(config, model, optimizer):
  def init():
    tokens = jnp.zeros((1, config.block_size), jnp.int32)
    params = model.init(jax.random.key(config.seed), tokens)['params']
    return State(params, optimizer.init(params))

  return init


def make_step(config, predict_fn, optimizer):
  """Returns the function (state, batch) -> (state, metrics)."""
  loss_fn = make_loss(predict_fn)

  def step(state, batch):  # batch: (B, T + 1)
    params, opt_state = state

    def add_micro_batch(total, tokens):  # tokens: (M, T + 1)
      new = jax.value_and_grad(loss_fn)(params, tokens)
      return jax.tree.map(jnp.add, total, new), None

    size = min(config.micro_batch_size, len(batch))
    micro_batches = batch.reshape(-1, size, batch.shape[-1])  # (B/M, M, T + 1)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add_micro_batch, zero, micro_batches)
    loss, grads = jax.tree.map(lambda x: x / len(micro_batches), total)

    # For the curvature: Sophia-H calls obj_fn, Sophia-G predict_fn, on a part
    # of this batch at a time, when it refreshes; AdamW calls neither.
    updates, opt_state = optimizer.update(
        grads, opt_state, params, obj_fn=loss_fn, predict_fn=predict_fn,
        batch=batch[:config.curvature_batch_size])
    params = optax.apply_updates(params, updates)

    metrics = {'loss': loss}
    win_rate = optax.tree.get(opt_state, 'win_rate')
    if win_rate is not None:
      metrics['win_rate'] = win_rate
    return State(params, opt_state), metrics

  return step


def make_evaluate(loss_fn):
  def evaluate(params, batches):  # batches: (N, B, T + 1)
    return jax.lax.map(lambda tokens: loss_fn(params, tokens), batches).mean()

  return evaluate


@contextlib.contextmanager
def postponed_interrupt():
  """Yields an event that Ctrl-C sets, so that a step is never cut in two.

  A second Ctrl-C interrupts at once.
  """
  interrupted = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield interrupted  # signals only ever reach the main thread
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
  """Trains, or goes on with what config.out_dir has.

  Seconds in the history are of training: compilation, validation and
  checkpoints are not in them.

  Args:
    config: the settings.

  Returns:
    State, history and time of compilation.
  """
  train_tokens, val_tokens = text.load(config.data_dir)
  sizes = config.block_size, config.vocab_size
  val_batches = text.validation(
      val_tokens, config.eval_batches, config.micro_batch_size, *sizes)

  def batch_at(step):  # (B, T + 1)
    return text.sample(
        train_tokens, config.seed, step, config.batch_size, *sizes)

  model = make_model(config)
  optimizer = make_optimizer(config)
  predict_fn = make_predict(model)
  init = jax.jit(make_init(config, model, optimizer))
  abstract_state = jax.eval_shape(init)
  start = time.perf_counter()
  # Donated: the new state takes the memory of the old one.
  step_fn = jax.jit(
      make_step(config, predict_fn, optimizer), donate_argnums=0).lower(
          abstract_state, batch_at(0)).compile()
  evaluate = jax.jit(make_evaluate(make_loss(predict_fn))).lower(
      abstract_state.params, val_batches).compile()
  compile_seconds = time.perf_counter() - start

  saver = checkpoints.Checkpoints(config)
  step, state, record = saver.restore(abstract_state) or (
      0, init(), {'seconds': 0.0, 'history': []})

  with postponed_interrupt() as interrupted, tqdm.tqdm(
      total=config.num_steps, initial=step, desc=config.optimizer) as bar:
    metrics = {}
    clock = time.perf_counter()
    while step < config.num_steps and not interrupted.is_set():
      last_metrics = metrics
      state, metrics = step_fn(state, batch_at(step))
      step += 1
      # Reading the step before lets this one run meanwhile.
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
        record['history'].append({
            'step': step, 'seconds': record['seconds'],
            'val_loss': float(evaluate(state.params, val_batches)),
            **{name: float(x) for name, x in metrics.items()}})
      if save:
        saver.save(step, state, record)
      clock = time.perf_counter()
    jax.block_until_ready(state)
    record['seconds'] += time.perf_counter() - clock
    saver.save(step, state, record)
  saver.close()
  return Result(
      state, record['history'], compile_seconds, step == config.num_steps)


def describe(config: gpt_configs.Config) -> str:
  """Describes the run's step without allocating its parameters."""
  model = make_model(config)
  optimizer = make_optimizer(config)
  state = jax.eval_shape(make_init(config, model, optimizer))
  batch = jax.ShapeDtypeStruct(
      (config.batch_size, config.block_size + 1), jnp.int32)
  step = make_step(config, make_predict(model), optimizer)
  return dry_run.report(config, step, state, batch)


def define_flags():
  """Defines a flag for every setting; None leaves what --config says."""
  flags.DEFINE_enum(
      'config', 'demo', list(gpt_configs.CONFIGS), 'Settings to begin with.')
  flags.DEFINE_bool(
      'dry_run', False, 'Print shapes, parameters, FLOPs and bytes only.')
  define = {str: flags.DEFINE_string, int: flags.DEFINE_integer,
            float: flags.DEFINE_float, bool: flags.DEFINE_bool}
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
    return gpt_configs.get_config(flags.FLAGS.config, optimizer, **given)
  except ValueError as error:
    raise app.UsageError(str(error)) from error


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --num_steps=9; got {argv[1:]}.')
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file as INFO
  config = config_from_flags()
  if flags.FLAGS.dry_run:
    print(describe(config))
    return
  result = train(config)
  for entry in result.history:
    print(', '.join(f'{name} {value:.6g}' for name, value in entry.items()))
  print(f'compiled in {result.compile_seconds:.1f} s; '
        f'checkpoint in {config.out_dir}')
  if not result.finished:
    print('Interrupted. The same command goes on from here.')


if __name__ == '__main__':
  define_flags()
  app.run(main)
