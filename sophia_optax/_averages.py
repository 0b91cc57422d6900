"""Averages of estimates over draws, parts of a batch and replicas.

The average of M independent unbiased estimates is unbiased and has 1/M of the
variance.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates


def over_draws(
  draw: Callable[[jax.Array], Any], key: jax.Array, num_samples: int, zeros: Any
) -> Any:
  """Averages `draw(key)` over `num_samples` keys, one draw at a time.

  Args:
    draw: Takes a PRNG key and returns a tree of floating point arrays.
    key: PRNG key. It is split only if there are several draws.
    num_samples: Number of draws.
    zeros: Zeros like the result of `draw`, in float32 or wider.
  """
  if num_samples == 1:
    return _coordinates.widen(draw(key))

  def add_draw(total, subkey):
    return optax.tree.add(total, _coordinates.widen(draw(subkey))), None

  keys = jax.random.split(key, num_samples)
  total, _ = jax.lax.scan(add_draw, zeros, keys)
  return optax.tree.scale(1 / num_samples, total)


def split_batch(
  batch: Any,
  label_mask: jax.Array | None,
  num_parts: int,
  axis_name: _collectives.AxisName = None,
) -> tuple[dict[str, Any], jax.Array]:
  """Splits a batch into equal parts: part m holds batch[m::num_parts].

  Args:
    batch: Tree of arrays, all with a leading axis of n examples.
    label_mask: Predictions to count, or None for all.
    num_parts: Number M of parts, a divisor of n.
    axis_name: The axes over which estimates are averaged afterwards.

  Returns:
    A dict of `batch` and, if given, `label_mask`, with shapes (M, n / M, ...);
    and the weights of the parts, (M,), float32: the fraction of the counted
    predictions that is in each part.
  """
  size = _leading_axis(batch, num_parts)
  split = lambda x: cut(x, num_parts)
  parts = {'batch': jax.tree.map(split, batch)}
  if label_mask is None:
    return parts, jnp.full(num_parts, 1 / num_parts)
  shape = (size, *jnp.shape(label_mask)[1:])
  _checks.broadcasts('label_mask', label_mask, shape)
  mask = split(jnp.broadcast_to(jnp.asarray(label_mask, bool), shape))
  counts = jnp.sum(mask.reshape(num_parts, -1), axis=1, dtype=jnp.float32)
  axes = _collectives.other_axes(counts, axis_name)
  counts = _collectives.total(counts, axes)
  weights = counts / jnp.maximum(jnp.sum(counts), 1.0)
  return parts | {'label_mask': mask}, weights


def cut(x: jax.Array, num_parts: int, axis: int = 0) -> jax.Array:
  """Cuts an axis of size n into M parts, shape (M, ..., n / M, ...).

  Part m holds the entries m, m + M, m + 2 M, .... If the axis is sharded over
  devices, it stays sharded in each part.
  """
  shape = (*x.shape[:axis], -1, num_parts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def over_parts(
  estimate: Callable[..., tuple[Any, Any]],
  parts: dict[str, Any],
  weights: jax.Array,
  zeros: Any,
  state: Any,
) -> tuple[Any, Any]:
  """Averages `estimate(state, **part)`, one part at a time.

  Args:
    estimate: Returns an estimate and the next state.
    parts: The dict that `split_batch` returns.
    weights: Weights of the parts, (M,).
    zeros: Zeros like the estimate. The average has their dtypes.
    state: The initial state.

  Returns:
    The weighted average and the final state.
  """

  def add_part(carry, xs):
    total, state = carry
    part, weight = xs
    new, state = estimate(state, **part)
    add = lambda t, e: t + weight.astype(t.dtype) * jnp.asarray(e, t.dtype)
    return (jax.tree.map(add, total, new), state), None

  return jax.lax.scan(add_part, (zeros, state), (parts, weights))[0]


def _leading_axis(batch, num_parts):
  """Returns the size of the leading axis, or raises if it does not split."""
  shapes = {np.shape(x) for x in jax.tree.leaves(batch)}
  sizes = {shape[:1] for shape in shapes}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      'batch must contain arrays with the same leading axis, got shapes'
      f' {sorted(shapes)}. Use a closure for values without an axis of'
      ' examples.'
    )
  ((size,),) = sizes
  if size % num_parts:
    raise ValueError(
      f'A batch of {size} examples must split into {num_parts} equal parts,'
      f' but {num_parts} does not divide {size}. Choose a divisor of {size} as'
      ' num_microbatches.'
    )
  return size


def average_over_replicas(
  axis_name: str | tuple[str, ...],
) -> optax.GradientTransformation:
  r"""Averages an estimate over replicas, each with its own shard of the data.

  .. math:: \hat h = \frac{1}{D} \sum_{d=1}^D \hat h_d

  Chain it after an estimator that you wrote:
  ``optax.chain(estimator, average_over_replicas('data'))``. The estimators of
  this library do the same if you pass them ``axis_name``. Your estimator sees
  only the data of its replica, and must keep its state equal on all replicas.
  Under :func:`jax.shard_map` it must differentiate with respect to
  ``jax.lax.pcast(params, 'data', to='varying')``, because derivatives with
  respect to replicated parameters are already sums over the replicas.

  Args:
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`.

  Returns:
    An :class:`optax.GradientTransformation` without state. It leaves integer
    leaves unchanged.

  Raises:
    ValueError: In ``update``, if there is no axis ``axis_name``, or if
      ``shard_map`` tracks that the estimate is the same on all replicas.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from sophia_optax import average_over_replicas
    >>> estimator = optax.chain(
    ...     optax.stateless(lambda g, params: g**2),  # Your estimator.
    ...     average_over_replicas('data'))
    >>> def estimate(grads):
    ...   return estimator.update(grads, estimator.init(grads))[0]
    >>> grads = jnp.arange(4.0)
    >>> print(jax.vmap(estimate, axis_name='data')(grads))
    [3.5 3.5 3.5 3.5]
  """

  def average(updates, params):
    del params
    _checks.mapped_axes(axis_name)
    estimate = _coordinates.split(updates, updates)
    for name in _collectives.names(axis_name):
      tracked = name in _collectives.varying(_collectives.axis_index(name))
      for leaf in jax.tree.leaves(estimate):
        if tracked and name not in _collectives.varying(leaf):
          raise ValueError(
            'The estimate must be computed from the local shard, got one that'
            f' is the same along the axis {name!r}. Differentiate with respect'
            f' to jax.lax.pcast(params, {name!r}, to="varying"), and remove'
            ' any pmean or psum. Derivatives with respect to replicated'
            ' parameters are already sums over the axis.'
          )
    mean = _collectives.mean(estimate, axis_name)
    return _coordinates.join(updates, mean)

  return optax.stateless(average)
