"""Averages over replicas: the only module that names device axes.

Estimates are averaged over a mapped axis (`jax.pmap`, `jax.shard_map`) in three
moves: draw with a key of one's own, differentiate as if the parameters were
one's own, take the mean. Without the second, differentiating parameters that
`shard_map` knows to be replicated sums over the replicas already, and the mean
would be too large by their number.

`shard_map` keeps account of the axes over which an array varies, unless
check_vma=False. That is how parameters which are themselves divided over some
other axis are seen here. `jax.pmap` keeps no account; it has one axis only.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
  """Returns the names of the axes: none, one or several."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_axes(axis_name: AxisName):
  """Raises unless the axes are mapped, and any other one is accounted for."""
  mesh = jax.sharding.get_abstract_mesh()
  for name in names(axis_name):
    try:
      index = jax.lax.axis_index(name)
    except NameError:
      raise ValueError(
        f'axis_name must be that of a mapped axis, got {name!r}; the axes of'
        f' the mesh here are {mesh.axis_names}. Call update under jax.pmap or'
        ' jax.shard_map with an axis of that name, or leave axis_name out:'
        ' jit with sharded arrays needs none.'
      ) from None
    others = [
      n
      for n in mesh.manual_axes
      if n not in names(axis_name) and mesh.shape[n] > 1
    ]
    if name in mesh.manual_axes and name not in varying(index) and others:
      raise ValueError(
        'axis_name must have every axis over which the parameters are'
        f' replicated, got {axis_name!r} beside the axes {others}. If the'
        ' parameters are divided over those, leave check_vma=True in'
        ' jax.shard_map, which shows it; otherwise add them to axis_name.'
      )


def fold_in_index(key: jax.Array, axis_names: Iterable[str]) -> jax.Array:
  """A key of this replica's own, to draw with and never to store."""
  for name in axis_names:
    key = jax.random.fold_in(key, jax.lax.axis_index(name))
  return key


def varying(x: jax.Array) -> frozenset[str]:
  """The axes over which x differs, as far as `shard_map` keeps account."""
  return jax.typeof(x).mat.varying


def other_axes(x: jax.Array, axis_name: AxisName) -> tuple[str, ...]:
  """The axes beside `axis_name` over which x differs, as far as is known."""
  return tuple(sorted(varying(x).difference(names(axis_name))))


def vary(tree: Any, axis_name: AxisName) -> Any:
  """Makes arrays that are replicated this replica's own, for `shard_map`."""
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def vary_leaf(x):
    missing = tuple(
      n for n in names(axis_name) if n in manual and n not in varying(x)
    )
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(vary_leaf, tree)


def vary_alike(tree: Any, fn: Callable[..., Any], *args: Any) -> Any:
  """Makes arrays vary like those of `fn(*args)`, to carry them in a scan."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return tree
  return jax.tree.map(
    lambda x, like: vary(x, other_axes(like, ())),
    tree,
    jax.eval_shape(fn, *args),
  )


def with_auto_axes(
  fn: Callable[..., jax.Array], like: jax.Array
) -> Callable[..., jax.Array]:
  """Lets the compiler divide fn, in a mesh of AxisType.Explicit too.

  Args:
    fn: May have steps for which there is no rule of sharding.
    like: Has the sharding of what `fn` returns.

  Returns:
    A function of the same arguments.
  """
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return fn
  return jax.sharding.auto_axes(fn, out_sharding=jax.typeof(like).sharding)


def total(x: Any, axis_names: Iterable[str]) -> Any:
  """Sums over the axes, if there are any; a number counts once a replica."""
  return jax.lax.psum(x, tuple(axis_names))


def sum_over_shards(
  fn: Callable[[jax.Array], jax.Array], tree: Any, like: jax.Array
) -> tuple[jax.Array, float]:
  """Sums a number over the leaves of a tree and all parts that they have.

  Args:
    fn: Takes the part of a leaf that is here, returns a float32 number.
    tree: The leaves, of which some may be divided over axes.
    like: Varies over axes over which there is to be no sum.

  Returns:
    The sum, which varies like `like`, and the number of entries of the tree, a
    float as it may be too large for int32.
  """
  sums: dict[tuple[str, ...], Any] = {}
  size = 0.0
  for x in jax.tree.leaves(tree):
    axes = other_axes(x, tuple(varying(like)))
    sums[axes] = sums.get(axes, 0.0) + fn(x)
    size += float(x.size) * total(1, axes)
  sums = {axes: total(x, axes) for axes, x in sums.items()}
  summed = sum(sums.values(), jnp.zeros([], jnp.float32))
  return vary(summed, tuple(varying(like))), size


def check_averaged(estimate: Any, nu: Any):
  """Raises if an estimate differs between replicas where its EMA does not."""
  for e, h in zip(*map(jax.tree.leaves, (estimate, nu)), strict=True):
    if axes := other_axes(e, tuple(varying(h))):
      raise ValueError(
        'The Hessian diagonal estimate must be the same on all replicas, got'
        f' one that differs along {list(axes)}. Pass axis_name to the'
        ' estimator, or chain average_over_replicas behind your own.'
      )


def check_local(loss: jax.Array, theta: Any, axis_name: AxisName):
  """Raises unless differentiating the loss stays on this replica.

  Args:
    loss: What obj_fn returned.
    theta: What it was computed from, varying over the axes of `axis_name`.
    axis_name: The axes over which the estimate is averaged afterwards.
  """
  leaves = jax.tree.leaves(theta)
  own = frozenset.intersection(*map(varying, leaves)) if leaves else frozenset()
  averaged = own.intersection(names(axis_name)) - varying(loss)
  if averaged:
    raise ValueError(
      'obj_fn must return the loss of the local shard, got one that is'
      f' the same on all of {sorted(averaged)}. Leave out its pmean or'
      ' psum: the estimate is averaged over these axes afterwards.'
    )
  summed = varying(loss) - own
  if leaves and summed:
    raise ValueError(
      f'obj_fn must return a loss that is the same on all of {sorted(summed)}'
      ', over which parameters are replicated: their derivatives are sums'
      ' over these axes. Pass the axes of the data as axis_name to the'
      ' estimator, and average the loss over any other one.'
    )


def mean(tree: Any, axis_name: AxisName) -> Any:
  """Averages the floating point arrays of a tree over the axes, at once."""
  leaves, structure = jax.tree.flatten(tree)
  inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x, jnp.inexact)]
  averages = jax.lax.pmean([leaves[i] for i in inexact], names(axis_name))
  for i, x in zip(inexact, averages, strict=True):
    leaves[i] = x
  return jax.tree.unflatten(structure, leaves)


class AveragedEstimator(optax.GradientTransformationExtraArgs):
  """An estimator that averages over replicas, as the last thing it does.

  Attributes:
    local: The estimator of one replica, which is not averaged.
    axis_name: The axes over which `update` averages.
  """

  local: optax.GradientTransformationExtraArgs
  axis_name: AxisName


def averaged(
  local: optax.GradientTransformationExtraArgs, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
  """Averages what an estimator of one replica returns.

  Args:
    local: Differentiates with respect to varying parameters and draws with a
      key of its own, but keeps its state equal on all replicas.
    axis_name: The axes. None leaves the estimator as it is.

  Returns:
    The estimator; `unaveraged` takes it apart again.
  """
  if axis_name is None:
    return local

  def update_fn(updates, state, params=None, **extra_args):
    estimate, state = local.update(updates, state, params, **extra_args)
    return mean(estimate, axis_name), state

  estimator = AveragedEstimator(local.init, update_fn)
  estimator.local, estimator.axis_name = local, axis_name
  return estimator


def unaveraged(
  estimator: optax.GradientTransformation,
) -> tuple[optax.GradientTransformationExtraArgs, AxisName]:
  """Returns the estimator of one replica, and the axes to average over."""
  if isinstance(estimator, AveragedEstimator):
    return estimator.local, estimator.axis_name
  return optax.with_extra_args_support(estimator), None


def average_over_replicas(
  axis_name: str | tuple[str, ...],
) -> optax.GradientTransformation:
  r"""Averages an estimate over replicas, each with its own shard of the data.

  .. math:: \hat h = \frac{1}{D} \sum_{d=1}^D \hat h_d

  This is what ``axis_name`` does in the estimators of this library, for those
  that you write: ``optax.chain(estimator, average_over_replicas('data'))``.
  The estimator sees the data of its replica only, and has to keep its state
  equal on all of them. Under :func:`jax.shard_map` it must differentiate with
  respect to parameters of the replica's own,
  ``jax.lax.pcast(params, 'data', to='varying')``: derivatives with respect to
  replicated parameters are sums over the replicas already.

  Args:
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`.

  Returns:
    An :class:`optax.GradientTransformation` without state. Integer leaves pass
    unchanged.

  Raises:
    ValueError: In ``update``, if there is no axis ``axis_name``, or if the
      estimate is the same on all replicas, where ``shard_map`` shows that.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from sophia_optax import average_over_replicas
    >>> estimator = optax.chain(
    ...     optax.stateless(lambda g, params: g**2),  # An estimator of yours.
    ...     average_over_replicas('data'))
    >>> def estimate(grads):
    ...   return estimator.update(grads, estimator.init(grads))[0]
    >>> grads = jnp.arange(4.0)
    >>> print(jax.vmap(estimate, axis_name='data')(grads))
    [3.5 3.5 3.5 3.5]
  """

  def update_fn(updates, state, params=None):
    del params
    check_axes(axis_name)
    for name in names(axis_name):
      tracked = name in varying(jax.lax.axis_index(name))
      for leaf in jax.tree.leaves(updates):
        inexact = jnp.issubdtype(leaf, jnp.inexact)
        if tracked and inexact and name not in varying(leaf):
          raise ValueError(
            'The estimate must be that of the local shard, got one that is'
            f' the same on all of {name!r}. Differentiate with respect to'
            f' jax.lax.pcast(params, {name!r}, to="varying"), and leave out'
            ' any pmean or psum: derivatives with respect to replicated'
            ' parameters are sums already.'
          )
    return mean(updates, axis_name), state

  return optax.GradientTransformation(
    lambda params: optax.EmptyState(), update_fn
  )
