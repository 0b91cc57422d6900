"""The three kinds of problems of benchmarks/convergence.py.

Data are on the device, and a batch is a function of (seed, step). So one
program can run many steps, and all optimizers with the same seed see the same
batches.
"""

from collections.abc import Callable
import functools
import sys
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

import records

sys.path.append(records.EXAMPLES)
import gpt
import gpt_program
import text


class Problem(NamedTuple):
  """A model with data and loss. B is the number of examples of a batch."""

  init: Callable[[Any], Any]  # (seed) -> params
  sample: Callable[[jax.Array], jax.Array]  # (key) -> batch, (B, ...)
  loss: Callable[[Any, jax.Array], jax.Array]  # (params, batch) -> mean loss
  predict: Callable[[Any, jax.Array], jax.Array]  # -> logits or means
  likelihood: str  # of labels given logits or means, for Sophia-G
  micro_batch: int  # examples in one gradient, a divisor of B
  # (params) -> loss, on a part of the held-out data and on all of it
  validate: Callable[[Any], jax.Array]
  validate_all: Callable[[Any], jax.Array]
  decay_mask: Callable[[Any], Any] = gpt.decay_mask  # what has weight decay
  clip_norm: float = 1.0  # limit on the global norm of the gradient


def _mean_over_batches(loss, examples, size):
  """Returns (params) -> mean loss of all examples, `size` at a time."""
  batches = examples[: len(examples) // size * size].reshape(
    -1, size, *examples.shape[1:]
  )
  return lambda params: jax.lax.map(
    lambda batch: loss(params, batch), batches
  ).mean()


def language(width, num_layers, num_heads, batch_size, micro_batch=16):
  """Returns a byte-level GPT on text of the standard library.

  Sequences have 64 bytes. Half a million bytes are held out; `validate` uses
  32,768 of them.
  """
  length = 64
  model = gpt.GPT(256, length, num_layers, num_heads, width, unroll=num_layers)
  predict = gpt_program.make_predict(model)
  loss = gpt_program.make_loss(predict)
  tokens, held_out = map(jnp.asarray, text.load())
  windows = jnp.arange(length + 1)
  starts = np.arange(0, len(held_out) - length, length)
  few = starts[np.linspace(0, len(starts) - 1, 512, dtype=int)]

  def init(seed):
    inputs = jnp.zeros((1, length), jnp.int32)
    return model.init(jax.random.key(seed), inputs)['params']

  def cut(tokens, starts):  # (B, T + 1)
    return tokens[starts[:, None] + windows].astype(jnp.int32)

  def sample(key):
    last = len(tokens) - length
    return cut(tokens, jax.random.randint(key, (batch_size,), 0, last))

  return Problem(
    init,
    sample,
    loss,
    predict,
    'categorical',
    micro_batch,
    _mean_over_batches(loss, cut(held_out, few), 32),
    _mean_over_batches(loss, cut(held_out, starts), 32),
  )


class _Autoencoder(nn.Module):
  """A deep autoencoder with a narrow code, as in Martens (2010)."""

  @nn.compact
  def __call__(self, x):  # (B, 256)
    for features in (128, 64, 16, 64, 128):
      x = nn.tanh(nn.Dense(features)(x))
    return nn.Dense(256)(x)


def photographs(batch_size: int = 256):
  """Returns a deep autoencoder of 16 × 16 crops of scikit-learn's photographs.

  The right fifth of each is held out. The loss is half the mean squared error,
  in units of the pixels' variance.
  """
  size = 16
  model = _Autoencoder()
  photos = np.stack(datasets.load_sample_images().images).mean(-1)
  photos = jnp.asarray((photos - photos.mean()) / photos.std(), jnp.float32)
  num_photos, height, width = photos.shape
  edge = width * 4 // 5
  offsets = jnp.arange(size)

  def cut(photo, top, left):  # (B, 256)
    rows = top[:, None, None] + offsets[:, None]
    columns = left[:, None, None] + offsets
    return photos[photo[:, None, None], rows, columns].reshape(-1, size**2)

  def sample(key):
    shape = (batch_size,)
    keys = jax.random.split(key, 3)
    return cut(
      jax.random.randint(keys[0], shape, 0, num_photos),
      jax.random.randint(keys[1], shape, 0, height - size + 1),
      jax.random.randint(keys[2], shape, 0, edge - size + 1),
    )

  held_out = jnp.meshgrid(
    jnp.arange(num_photos),
    jnp.arange(0, height - size + 1, 4),
    jnp.arange(edge, width - size + 1, 4),
    indexing='ij',
  )
  held_out = cut(*map(jnp.ravel, held_out))

  def predict(params, x):
    return model.apply({'params': params}, x)

  def loss(params, x):
    return jnp.mean((predict(params, x) - x) ** 2) / 2

  def init(seed):
    return model.init(jax.random.key(seed), jnp.zeros((1, size**2)))['params']

  validate = _mean_over_batches(loss, held_out, 256)
  return Problem(
    init, sample, loss, predict, 'gaussian', batch_size, validate, validate
  )


def regression(rotated: bool, condition: float = 1e5, batch_size: int = 128):
  """Returns a linear regression whose Hessian is diagonal or rotated.

  Inputs are normal, with variances from 1 down to 1 / condition along the axes,
  or along randomly rotated axes. Labels have no noise. So the Hessian is
  diagonal, or the same matrix rotated; nothing else differs. The validation
  loss is the expected loss relative to that of the initial parameters, zero.
  """
  size = 32
  rng = np.random.default_rng(0)
  scales = condition ** -np.linspace(0, 0.5, size)
  rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
  solution = rng.normal(size=size)
  axes = rotation if rotated else np.eye(size)
  inputs = jnp.asarray(scales[:, None] * axes.T, jnp.float32)  # of unit noise
  solution = jnp.asarray(axes @ solution, jnp.float32)

  def predict(params, x):
    return x @ params

  def loss(params, x):
    return jnp.mean((x @ (params - solution)) ** 2) / 2

  def validate(params):
    excess = lambda x: jnp.sum((inputs @ (x - solution)) ** 2)
    return excess(params) / excess(jnp.zeros(size))

  return Problem(
    lambda seed: jnp.zeros(size),
    lambda key: jax.random.normal(key, (batch_size, size)) @ inputs,
    loss,
    predict,
    'gaussian',
    batch_size,
    validate,
    validate,
    lambda params: False,
    float('inf'),
  )


_MAKERS = {
  'language': functools.partial(language, 64, 2, 2, 32),
  'language_large_batch': functools.partial(language, 64, 2, 2, 256),
  'language_1m': functools.partial(language, 128, 5, 4, 64, 64),
  'photographs': photographs,
  'axes': functools.partial(regression, False),
  'rotated': functools.partial(regression, True),
}


@functools.cache
def get(name: str) -> Problem:
  """Returns the problem with this name. It is created once."""
  return _MAKERS[name]()
