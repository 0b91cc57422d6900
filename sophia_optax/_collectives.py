"""Averages over replicas: the only module that names device axes.

Estimates are averaged over a mapped axis (`jax.pmap`, `jax.shard_map`) in three
moves: draw with a key of one's own, differentiate as if the parameters were
one's own, take the mean. Without the second, differentiating parameters that
`shard_map` knows to be replicated sums over the replicas already, and the mean
would be too large by their number.
"""

from typing import Any

import jax

AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
  """Returns the names of the axes: none, one or several."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def fold_in_index(key: jax.Array, axis_name: AxisName) -> jax.Array:
  """A key of this replica's own, to draw with and never to store."""
  for name in names(axis_name):
    try:
      key = jax.random.fold_in(key, jax.lax.axis_index(name))
    except NameError:
      mesh = jax.sharding.get_abstract_mesh()
      raise ValueError(
          f'axis_name must be that of a mapped axis, got {name!r}; the axes of'
          f' the mesh here are {mesh.axis_names}. Call update under jax.pmap or'
          ' jax.shard_map with an axis of that name, or leave axis_name out:'
          ' jit with sharded arrays needs none.'
      ) from None
  return key


def varying(x: jax.Array) -> frozenset[str]:
  """The axes over which x differs, as far as `shard_map` keeps account."""
  aval = jax.typeof(x)
  return aval.mat.varying if hasattr(aval, 'mat') else aval.vma  # JAX 0.9.


def vary(tree: Any, axis_name: AxisName) -> Any:
  """Makes arrays that are replicated this replica's own, for `shard_map`."""
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def vary_leaf(x):
    missing = tuple(
        n for n in names(axis_name) if n in manual and n not in varying(x)
    )
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(vary_leaf, tree)


def mean(tree: Any, axis_name: AxisName) -> Any:
  """Averages over the axes, if there are any."""
  return jax.lax.pmean(tree, names(axis_name)) if axis_name else tree


def check_local(name: str, value: jax.Array, like: Any, axis_name: AxisName):
  """Raises if a loss was averaged over the axes that it will be averaged over.

  Args:
    name: Of the function that returned the loss.
    value: The loss.
    like: What it was computed from, of which every leaf varies if one does.
    axis_name: The axes.
  """
  for leaf in jax.tree.leaves(like)[:1]:
    averaged = set(names(axis_name)) & varying(leaf) - varying(value)
    if averaged:
      raise ValueError(
          f'{name} must return the loss of the local shard, got one that is'
          f' the same on all of {sorted(averaged)}. Leave out its pmean or'
          ' psum: the estimate is averaged over these axes afterwards.'
      )
