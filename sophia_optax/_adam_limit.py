"""A limit on the size of each array's update: the size of Adam's update.

Adam with one second moment v for each parameter array, instead of one for each
element, would make an update with the root mean square (RMS)

  RMS(m̂) / sqrt(v̂),   v = EMA of mean(g²),   v̂ = v / (1 - b2^t)

This is close to 1 while successive gradients agree. It is small when they are
mostly noise, and when they alternate in sign because a step was too long. The
clip of Sophia's rule does not notice either: where h is small, it makes a step
of full length for any m.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _coordinates
from sophia_optax import _fractions


def mean_squares(params: Any, tree: Any, like: jax.Array) -> jax.Array:
  """Returns the mean square of each array, shape (number of arrays,), float32.

  Args:
    params: The parameters, or any tree with their structure.
    tree: Their coordinates. Leaves may be divided over device axes.
    like: An array. Axes over which it varies are not averaged over.
  """

  def mean_square(_, coordinates):
    size = _fractions.size(coordinates, like)
    total = _fractions.sum_over_shards(_sum_of_squares, coordinates, like)
    return total / max(size, 1.0)

  means = jax.tree.leaves(jax.tree.map(mean_square, params, tree))
  return jnp.array(means, jnp.float32)


def scale_down(
  params: Any, updates: Any, limits: jax.Array, like: jax.Array
) -> Any:
  """Scales each array of updates whose RMS is larger than its limit.

  Args:
    params: The parameters, or any tree with their structure.
    updates: Coordinates of the updates.
    limits: Largest RMS of each array, shape (number of arrays,).
    like: An array. Axes over which it varies are not averaged over.
  """
  rms = jnp.sqrt(mean_squares(params, updates, like))
  tiny = jnp.finfo(rms.dtype).tiny
  factors = jnp.minimum(limits / jnp.maximum(rms, tiny), 1.0)
  factors = jax.tree.unflatten(jax.tree.structure(params), list(factors))

  def scale(_, factor, coordinates):
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), coordinates)

  return jax.tree.map(scale, params, factors, updates)


def _sum_of_squares(x):
  return jnp.sum(jnp.square(_coordinates.widen(x))).astype(jnp.float32)
