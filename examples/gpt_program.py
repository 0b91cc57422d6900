"""The compiled program of train_gpt.py: model, loss, optimizer and step.

`make_program` does not run or compile anything. It returns jitted functions and
the shapes and shardings of their arguments, so that a laptop can lower the
train step of GPT-2's size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gpt
import gpt_configs
import sharding
import sophia_optax


class State(NamedTuple):
  """All values that a step changes. The batch is a function of the step."""

  params: Any
  opt_state: optax.OptState


def make_model(config):
  return gpt.GPT(
    vocab_size=config.vocab_size,
    block_size=config.block_size,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    width=config.width,
    dtype=jnp.dtype(config.dtype),
    unroll=config.unroll,
    remat=config.remat,
  )


def make_schedule(config):
  """Returns a learning rate with linear warm-up and a cosine."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate * config.final_learning_rate,
  )


def make_curvature(config):
  """Returns whose curvature Sophia uses, for `sophiaw`."""
  if config.optimizer == 'sophia_h':
    return 'hessian'
  if config.head_chunks == 1:
    return 'gauss_newton'
  return sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    num_chunks=config.head_chunks
  )


def make_optimizer(config):
  """Returns the optimizer with clipping, schedule and masked decay."""
  adamw = {
    'learning_rate': make_schedule(config),
    'b1': config.b1,
    'b2': config.b2,
    'weight_decay': config.weight_decay,
    'mask': gpt.decay_mask,
  }
  if config.optimizer in gpt_configs.OPTAX:
    optimizer = getattr(optax, config.optimizer)(**adamw)
  elif config.optimizer == 'nadamw':
    optimizer = sophia_optax.sophiaw(
      **adamw, curvature=None, eigenbasis=config.eigenbasis
    )
  else:
    optimizer = sophia_optax.sophiaw(
      **adamw,
      curvature=make_curvature(config),
      curvature_fraction=config.curvature_fraction,
      curvature_parts=config.curvature_parts,
      eigenbasis=config.eigenbasis,
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


def make_step(config, fns, optimizer):
  """Returns the function (state, batch, refresh) -> (state, metrics).

  `refresh` is a bool that says whether Sophia refreshes the curvature. With
  None, the count of steps decides.
  """
  loss_fn = fns['obj_fn']

  def step(state, batch, refresh=None):  # batch: (B, T + 1)
    params, opt_state = state
    # Strided, so that sequences stay on their devices.
    micro_batches = batch.reshape(
      config.micro_batch_size, -1, batch.shape[-1]
    ).swapaxes(0, 1)  # (B/M, M, T + 1)

    def add_micro_batch(total, tokens):  # tokens: (M, T + 1)
      new = jax.value_and_grad(loss_fn)(params, tokens)
      return jax.tree.map(jnp.add, total, new), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add_micro_batch, zero, micro_batches)
    loss, grads = jax.tree.map(lambda x: x / len(micro_batches), total)

    # On a refresh, Sophia-H calls obj_fn, and Sophia-G calls predict_fn and
    # head_fn, on parts of this batch.
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
  batch: jax.ShapeDtypeStruct  # (B, T + 1), with its sharding
  init: Callable  # () -> state
  step: Callable  # (state, batch, refresh) -> (state, metrics); donates state
  evaluate: Callable  # (params, batches) -> loss


def make_program(config, mesh, optimizer=None) -> Program:
  """Returns what runs on a mesh; the optimizer is the config's by default."""
  model = make_model(config)
  optimizer = optimizer or make_optimizer(config)
  fns = make_fns(config, model)
  init = make_init(config, model, optimizer)
  step = make_step(config, fns, optimizer)
  evaluate = make_evaluate(fns['obj_fn'])

  shapes = jax.eval_shape(init)
  shardings = sharding.state_sharding(mesh, shapes)
  replicated = sharding.replicated(mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  batch = jax.ShapeDtypeStruct(
    (config.batch_size, config.block_size + 1),
    jnp.int32,
    sharding=sharding.batch_sharding(mesh),
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
