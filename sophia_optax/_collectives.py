"""Device axes and random keys on them: the only module that calls `lax.p*`.

An estimate is averaged over a mapped axis (`jax.pmap`, `jax.shard_map`) in
three steps: fold the replica index into the key, mark the parameters as
varying, pmean. Without the second step, differentiating with respect to
parameters that `shard_map` knows to be replicated already sums over the
replicas, and the mean is too large by their number.

`shard_map` tracks the axes over which an array varies, unless check_vma=False.
This module uses that to find parameters that are divided over another axis.
`jax.pmap` tracks nothing; it has a single axis.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _coordinates

AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
  """Returns the names of the axes: none, one or several."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def axis_index(name: str) -> jax.Array:
  """Returns the index of this replica; raises NameError without the axis."""
  return jax.lax.axis_index(name)


def varying(x: jax.Array) -> frozenset[str]:
  """Returns the axes over which x differs, as far as `shard_map` tracks it."""
  return jax.typeof(x).mat.varying


def other_axes(x: jax.Array, axis_name: AxisName) -> tuple[str, ...]:
  """Returns the axes other than `axis_name` over which x is known to differ."""
  return tuple(sorted(varying(x).difference(names(axis_name))))


def vary(tree: Any, axis_name: AxisName) -> Any:
  """Marks arrays as varying over the axes that `shard_map` maps."""
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def vary_leaf(x):
    missing = tuple(
      n for n in names(axis_name) if n in manual and n not in varying(x)
    )
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(vary_leaf, tree)


def vary_like(tree: Any, fn: Callable[[], Any]) -> Any:
  """Marks arrays as varying like those that `fn()` returns."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return tree
  # `jax.eval_shape` loses what varies if some axes are left to the compiler.
  results = iter(jax.make_jaxpr(fn)().out_avals)
  return jax.tree.map(lambda x: vary(x, tuple(next(results).mat.varying)), tree)


def fold_in_index(key: jax.Array, axis_names: Iterable[str]) -> jax.Array:
  """Returns a key of this replica, for drawing only: it must not be stored."""
  for name in axis_names:
    key = jax.random.fold_in(key, axis_index(name))
  return key


def random_like(
  key: jax.Array,
  theta: Any,
  sampler: Callable[..., jax.Array],
  axis_name: AxisName,
) -> Any:
  """Draws arrays like those of a tree, with their sharding.

  Args:
    key: PRNG key of this replica.
    theta: Real floating point arrays. Parts of one array that is divided over
      an axis other than `axis_name` get independent draws.
    sampler: `jax.random.normal` or the like. Narrow dtypes are drawn in float32
      and rounded, because a draw in bfloat16 has few distinct values.
    axis_name: The axes over which theta is replicated.
  """

  def draw(key, x):
    key = fold_in_index(key, other_axes(x, axis_name))
    wide = _coordinates.wider(x.dtype, jnp.float32)
    sharding = jax.typeof(x).sharding
    return sampler(key, x.shape, wide, out_sharding=sharding).astype(x.dtype)

  return jax.tree.map(draw, optax.tree.split_key_like(key, theta), theta)


def with_auto_axes(
  fn: Callable[..., jax.Array], like: jax.Array
) -> Callable[..., jax.Array]:
  """Lets the compiler shard `fn` in a mesh with AxisType.Explicit, too.

  Args:
    fn: May contain operations without a sharding rule.
    like: Has the sharding of what `fn` returns.

  Returns:
    A function of the same arguments.
  """
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return fn
  return jax.sharding.auto_axes(fn, out_sharding=jax.typeof(like).sharding)


def total(x: Any, axis_names: Iterable[str]) -> Any:
  """Sums over the axes, if there are any; a Python number once per replica."""
  return jax.lax.psum(x, tuple(axis_names))


def mean(tree: Any, axis_name: AxisName) -> Any:
  """Averages floating point arrays over the axes, in one collective."""
  axes = names(axis_name)
  return jax.lax.pmean(tree, axes) if axes else tree
