"""Outputs of a model and the way back from them: at once, or chunk by chunk.

θ, theta   coordinates of the parameters
z          outputs, (..., N, V), of which V classes can be many
J          their Jacobian with respect to θ
hidden     hidden states, (..., N, D), from which a head computes z

With chunks of N no more than z of a chunk exists at a time. Jᵀ s is then the
sum of what the head of each chunk sends back to θ, and of what the hidden
states, which all chunks have sent back to, send back to θ at the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _averages
from sophia_optax import _collectives
from sophia_optax import _coordinates


class Outputs(NamedTuple):
  """Outputs z, which may not be in memory.

  Attributes:
    shape: Of all of them.
    like: An array with their dtype, and that varies over axes as they do.
    send_back: (score, key, mask) -> Jᵀ s, a tree like θ in float32 or wider,
      where `score(key, z, mask)` returns s for some of the predictions.
  """

  shape: tuple[int, ...]
  like: jax.Array
  send_back: Callable[[Callable[..., jax.Array], jax.Array, jax.Array], Any]


def at_once(predict: Callable[[Any], jax.Array], theta: Any) -> Outputs:
  """Computes z = predict(θ)."""
  outputs, pull_back = jax.vjp(predict, theta)

  def send_back(score, key, mask):
    (sent,) = pull_back(score(key, outputs, mask))
    return _coordinates.widen(sent)

  return Outputs(outputs.shape, outputs, send_back)


def in_chunks(
  predict: Callable[[Any], jax.Array],
  head: Callable[[Any, jax.Array], jax.Array],
  theta: Any,
  num_chunks: int,
) -> Outputs:
  """Computes hidden = predict(θ), and z = head(θ, hidden) when it is needed.

  Args:
    predict: Returns hidden states, (..., N, D).
    head: Returns z for the hidden states of a chunk, (..., N / M, D).
    theta: θ.
    num_chunks: Number M of chunks, a divisor of N.
  """

  def cut_hidden(theta):
    hidden = predict(theta)
    _check_divides(num_chunks, hidden.shape)
    return _averages.cut(hidden, num_chunks, hidden.ndim - 2)

  hidden, pull_back = jax.vjp(cut_hidden, theta)  # (M, ..., N / M, D)
  axis = hidden.ndim - 3  # Of N.
  one_chunk = lambda: head(theta, hidden[0])
  chunk = jax.eval_shape(one_chunk)
  shape = list(chunk.shape)
  shape[axis] *= num_chunks
  like = _collectives.vary_like(jnp.zeros((), chunk.dtype), one_chunk)
  zeros = optax.tree.zeros_like(_coordinates.widen(theta))

  def send_back(score, key, mask):
    def add_chunk(total, xs):
      key, hidden, mask = xs
      outputs, pull_back = jax.vjp(head, theta, hidden)
      sent, to_hidden = pull_back(score(key, outputs, mask))
      return optax.tree.add(total, _coordinates.widen(sent)), to_hidden

    keys = jax.random.split(key, num_chunks)
    masks = _averages.cut(mask, num_chunks, axis)
    total, to_hidden = jax.lax.scan(add_chunk, zeros, (keys, hidden, masks))
    (sent,) = pull_back(to_hidden)
    return optax.tree.add(total, _coordinates.widen(sent))

  return Outputs(tuple(shape), like, send_back)


def _check_divides(num_chunks, shape):
  if len(shape) < 2 or shape[-2] % num_chunks:
    size = 'no such axis' if len(shape) < 2 else shape[-2]
    raise ValueError(
      'With head_fn, predict_fn must return hidden states (..., N, D), whose'
      f' axis of N splits into num_chunks={num_chunks} equal chunks, got shape'
      f' {shape}, with N = {size}. Choose num_chunks among the divisors of N.'
    )
