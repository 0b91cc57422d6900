"""Device axes, and random keys for them. Only this module calls `lax.p*`.

An estimate is averaged over a mapped axis (`jax.pmap`, `jax.shard_map`) in
three steps: fold the replica index into the key, mark the parameters as
varying, pmean. The second step is needed because `shard_map` sums derivatives
with respect to replicated parameters over the replicas. Their mean would be too
large by a factor of the number of replicas.

With check_vma=True, `shard_map` tracks the axes over which an array varies.
This module uses that to find parameters that are divided over another axis.
`jax.pmap` does not track axes, but has only one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _coordinates

AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
  """Returns the names of the axes as a tuple."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def axis_index(name: str) -> jax.Array:
  """Returns the index of this replica; NameError if there is no such axis."""
  return jax.lax.axis_index(name)


def varying(x: jax.Array) -> frozenset[str]:
  """Returns the axes over which x varies, as tracked by `shard_map`."""
  return jax.typeof(x).mat.varying


def other_axes(x: jax.Array, axis_name: AxisName) -> tuple[str, ...]:
  """Returns the axes over which x varies, without those in `axis_name`."""
  return tuple(sorted(varying(x).difference(names(axis_name))))


def vary(tree: Any, axis_name: AxisName) -> Any:
  """Marks arrays as varying over those of the axes that `shard_map` maps."""
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def vary_leaf(x):
    missing = tuple(
      n for n in names(axis_name) if n in manual and n not in varying(x)
    )
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(vary_leaf, tree)


def vary_like(tree: Any, fn: Callable[[], Any]) -> Any:
  """Marks arrays as varying over the same axes as the results of `fn()`."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return tree
  # `jax.eval_shape` does not return varying axes if some axes are automatic.
  results = iter(jax.make_jaxpr(fn)().out_avals)
  return jax.tree.map(lambda x: vary(x, tuple(next(results).mat.varying)), tree)


def fold_in_index(key: jax.Array, axis_names: Iterable[str]) -> jax.Array:
  """Returns a key for draws on this replica. Do not store it in a state."""
  for name in axis_names:
    key = jax.random.fold_in(key, axis_index(name))
  return key


def random_like(
  key: jax.Array,
  theta: Any,
  sampler: Callable[..., jax.Array],
  axis_name: AxisName,
) -> Any:
  """Draws random arrays with the shapes, dtypes and sharding of a tree.

  Args:
    key: PRNG key of this replica.
    theta: Real floating point arrays. If an array is divided over an axis other
      than `axis_name`, its shards get independent draws.
    sampler: Takes (key, shape, dtype), like `jax.random.normal`. Draws for
      narrow dtypes are made in float32 and rounded: those in bfloat16 have few
      distinct values.
    axis_name: The axes over which theta is replicated.
  """

  def draw(key, x):
    key = fold_in_index(key, other_axes(x, axis_name))
    wide = _coordinates.wider(x.dtype, jnp.float32)
    sample = with_auto_axes(lambda key: sampler(key, x.shape, wide), x)
    return sample(key).astype(x.dtype)

  return jax.tree.map(draw, optax.tree.split_key_like(key, theta), theta)


def with_auto_axes(
  fn: Callable[..., jax.Array], like: jax.Array
) -> Callable[..., jax.Array]:
  """Lets the compiler choose shardings in `fn` if the mesh has explicit axes.

  Args:
    fn: A function that may contain operations without a sharding rule.
    like: An array with the sharding of the result of `fn`.

  Returns:
    A function with the arguments of `fn`.
  """
  axes = jax.sharding.get_abstract_mesh().explicit_axes
  if not axes:
    return fn
  sharding = jax.typeof(like).sharding
  return jax.sharding.auto_axes(fn, axes=axes, out_sharding=sharding)


def total(x: Any, axis_names: Iterable[str]) -> Any:
  """Sums over the axes. A Python number counts once for each replica."""
  return jax.lax.psum(x, tuple(axis_names))


def mean(tree: Any, axis_name: AxisName) -> Any:
  """Averages floating point arrays over the axes, in one collective."""
  axes = names(axis_name)
  return jax.lax.pmean(tree, axes) if axes else tree
