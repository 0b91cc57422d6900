"""Outputs of a model and their vector-Jacobian products, whole or in chunks.

θ, theta   coordinates of the parameters
z          outputs, (..., N, V), large if there are many classes V
J          Jacobian of z with respect to θ
hidden     hidden states, (..., N, D), from which a head computes z

With chunks along the axis of N, z of only one chunk is in memory at a time.
Jᵀ s then has two terms. The head of each chunk gives a gradient with respect to
θ, and one with respect to the hidden states. The gradients with respect to θ
are summed over the chunks. The gradients with respect to the hidden states are
concatenated and propagated back to θ at the end.
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
  """Outputs z of a model. They may not all be in memory.

  Attributes:
    shape: The shape of z.
    like: An array with the dtype of z that varies over the same axes.
    vjp: (score, key, mask) -> Jᵀ s, a tree like θ in float32 or wider. It calls
      `score(key, z, mask)`, which returns s, for all of z or for each chunk.
  """

  shape: tuple[int, ...]
  like: jax.Array
  vjp: Callable[[Callable[..., jax.Array], jax.Array, jax.Array], Any]


def at_once(predict: Callable[[Any], jax.Array], theta: Any) -> Outputs:
  """Computes z = predict(θ)."""
  outputs, pull_back = jax.vjp(predict, theta)

  def vjp(score, key, mask):
    (grads,) = pull_back(score(key, outputs, mask))
    return _coordinates.widen(grads)

  return Outputs(outputs.shape, outputs, vjp)


def in_chunks(
  predict: Callable[[Any], jax.Array],
  head: Callable[[Any, jax.Array], jax.Array],
  theta: Any,
  num_chunks: int,
) -> Outputs:
  """Computes hidden = predict(θ) now, and z = head(θ, hidden) in `vjp`.

  Args:
    predict: Returns hidden states, (..., N, D).
    head: Returns z for the hidden states of a chunk, (..., N / M, D).
    theta: Coordinates of the parameters.
    num_chunks: Number M of chunks, a divisor of N.
  """

  def cut_hidden(theta):
    hidden = predict(theta)
    return _averages.cut(hidden, num_chunks, hidden.ndim - 2)

  hidden, pull_back = jax.vjp(cut_hidden, theta)  # (M, ..., N / M, D)
  axis = hidden.ndim - 3  # The axis of N in a chunk.
  one_chunk = lambda: head(theta, hidden[0])
  chunk = jax.eval_shape(one_chunk)
  shape = list(chunk.shape)
  shape[axis] *= num_chunks
  like = _collectives.vary_like(jnp.zeros((), chunk.dtype), one_chunk)
  zeros = optax.tree.zeros_like(_coordinates.widen(theta))

  def vjp(score, key, mask):
    def add_chunk(total, xs):
      key, hidden, mask = xs
      outputs, pull_back = jax.vjp(head, theta, hidden)
      grads, hidden_grads = pull_back(score(key, outputs, mask))
      return optax.tree.add(total, _coordinates.widen(grads)), hidden_grads

    keys = jax.random.split(key, num_chunks)
    masks = _averages.cut(mask, num_chunks, axis)
    total, hidden_grads = jax.lax.scan(add_chunk, zeros, (keys, hidden, masks))
    (grads,) = pull_back(hidden_grads)
    return optax.tree.add(total, _coordinates.widen(grads))

  return Outputs(tuple(shape), like, vjp)
