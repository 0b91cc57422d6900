"""Fractions and sums over all coordinates of a tree, on all shards."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _collectives


def fraction(
  condition: Callable[[jax.Array], jax.Array], tree: Any, like: jax.Array
) -> jax.Array:
  """Returns the fraction of coordinates that meet a condition, float32.

  Args:
    condition: Takes the local shard of a leaf and returns booleans of its
      shape.
    tree: The coordinates. Leaves may be divided over device axes.
    like: An array. Axes over which it varies are not summed over.
  """
  met = sum_over_shards(lambda x: count(condition(x)), like, tree)
  return met / max(size(tree, like), 1.0)


def size(tree: Any, like: jax.Array) -> float:
  """Returns the number of coordinates as a float: int32 can be too small."""
  return sum(
    float(x.size) * _collectives.total(1, _axes(like, x))
    for x in jax.tree.leaves(tree)
  )


def sum_over_shards(
  fn: Callable[..., jax.Array], like: jax.Array, *trees: Any
) -> jax.Array:
  """Sums `fn(*shards)` over all leaves and all shards of each leaf.

  Args:
    fn: Takes a leaf of each tree. Returns a float32 array, of the same shape
      for each leaf.
    like: An array. Axes over which it varies are not summed over.
    *trees: The coordinates. Leaves may be divided over device axes.
  """
  sums: dict[tuple[str, ...], Any] = {}
  for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
    axes = _axes(like, *leaves)
    sums[axes] = sums.get(axes, 0.0) + fn(*leaves)
  totals = [_collectives.total(x, axes) for axes, x in sums.items()]
  total = sum(totals, jnp.zeros([], jnp.float32))
  return _collectives.vary(total, tuple(_collectives.varying(like)))


def count(condition: jax.Array) -> jax.Array:
  """Counts the true entries, float32.

  The last axes are counted exactly in uint32, as many as fit, and the results
  are added in float32. A count in float32 alone would stop at 2^24, and one in
  int32 at 2^31.
  """
  shape = condition.shape
  axis = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) < 2**32)
  rows = jnp.sum(condition, tuple(range(axis, len(shape))), jnp.uint32)
  return jnp.sum(rows, dtype=jnp.float32)


def _axes(like, *leaves):
  varying = frozenset().union(*map(_collectives.varying, leaves))
  return tuple(sorted(varying - _collectives.varying(like)))
