"""Fractions of coordinates, exact for any number of them, over all shards."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _collectives


def fraction(
  condition: Callable[[jax.Array], jax.Array], tree: Any, like: jax.Array
) -> jax.Array:
  """Returns the fraction of the coordinates that meet a condition, float32.

  Args:
    condition: Takes the local part of a leaf, returns booleans of its shape.
    tree: The coordinates, of which some may be divided over axes.
    like: Varies over the axes over which not to sum.
  """
  met = sum_over_shards(lambda x: count(condition(x)), tree, like)
  return met / max(size(tree, like), 1.0)


def size(tree: Any, like: jax.Array) -> float:
  """Returns the number of coordinates, which can be too large for int32."""
  return sum(
    float(x.size) * _collectives.total(1, _axes(x, like))
    for x in jax.tree.leaves(tree)
  )


def sum_over_shards(
  fn: Callable[[jax.Array], jax.Array], tree: Any, like: jax.Array
) -> jax.Array:
  """Sums `fn` of the local part of each leaf over leaves and shards.

  Args:
    fn: Returns a float32 array, of the same shape for each leaf.
    tree: The coordinates, of which some may be divided over axes.
    like: Varies over the axes over which not to sum.
  """
  sums: dict[tuple[str, ...], Any] = {}
  for x in jax.tree.leaves(tree):
    axes = _axes(x, like)
    sums[axes] = sums.get(axes, 0.0) + fn(x)
  totals = [_collectives.total(x, axes) for axes, x in sums.items()]
  total = sum(totals, jnp.zeros([], jnp.float32))
  return _collectives.vary(total, tuple(_collectives.varying(like)))


def count(condition: jax.Array) -> jax.Array:
  """Counts the true entries, float32.

  The count is exact over the last axes, as many as uint32 can count, and in
  float32 over the others: float32 alone stops at 2^24, int32 at 2^31.
  """
  shape = condition.shape
  axis = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) < 2**32)
  rows = jnp.sum(condition, tuple(range(axis, len(shape))), jnp.uint32)
  return jnp.sum(rows, dtype=jnp.float32)


def _axes(x, like):
  return _collectives.other_axes(x, tuple(_collectives.varying(like)))
