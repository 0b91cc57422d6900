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


def one_microbatch(batch: Any, label_mask: Any | None) -> dict[str, Any]:
  """Returns the whole batch in the form that `split` takes and returns.

  Args:
    batch: Tree of arrays, all with a leading axis of n examples.
    label_mask: Predictions to count, broadcasts to (n, ...). None means all.

  Returns:
    `batch` and, if given, `label_mask`, with shapes (M, n, ...) for M = 1
    microbatch.
  """
  shapes = {np.shape(x) for x in jax.tree.leaves(batch)}
  sizes = {shape[:1] for shape in shapes}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      'batch must contain arrays with the same leading axis, got shapes'
      f' {sorted(shapes)}. Use a closure for values without an axis of'
      ' examples.'
    )
  arguments = {'batch': batch}
  if label_mask is not None:
    shape = (*sizes.pop(), *jnp.shape(label_mask)[1:])
    mask = jnp.broadcast_to(jnp.asarray(label_mask, bool), shape)
    arguments['label_mask'] = mask
  return jax.tree.map(lambda x: x[None], arguments)


def split(microbatches: dict[str, Any], num_parts: int) -> dict[str, Any]:
  """Splits each of M microbatches into N equal parts, strided.

  Args:
    microbatches: Arrays of shape (M, n, ...).
    num_parts: Number N of parts, a divisor of n.

  Returns:
    The same with shapes (M N, n / N, ...).
  """
  size = jax.tree.leaves(microbatches)[0].shape[1]
  if size % num_parts:
    raise ValueError(
      f'A batch of {size} examples must split into {num_parts} equal parts,'
      f' but {num_parts} does not divide {size}. Choose a divisor of {size} as'
      ' num_microbatches.'
    )

  def split_leaf(x):
    parts = cut(x, num_parts, axis=1)  # (N, M, n / N, ...)
    return parts.reshape(-1, *parts.shape[2:])

  return jax.tree.map(split_leaf, microbatches)


def cut(x: jax.Array, num_parts: int, axis: int = 0) -> jax.Array:
  """Cuts an axis of size n into M parts, shape (M, ..., n / M, ...).

  Part m holds the entries m, m + M, m + 2 M, .... If the axis is sharded over
  devices, it stays sharded in each part.
  """
  shape = (*x.shape[:axis], -1, num_parts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def over_microbatches(
  estimate: Callable[..., tuple[Any, Any]],
  microbatches: dict[str, Any],
  zeros: Any,
  state: Any,
  axis_name: _collectives.AxisName = None,
) -> tuple[Any, Any]:
  """Averages `estimate(state, **microbatch)`, one microbatch at a time.

  A microbatch has the weight of its predictions that count.

  Args:
    estimate: Returns an estimate and the next state.
    microbatches: Arrays with a leading axis of M microbatches.
    zeros: Zeros like the estimate. The average has their dtypes.
    state: The initial state.
    axis_name: The axes over which the average is averaged afterwards.

  Returns:
    The weighted average and the final state.
  """

  def add(carry, xs):
    total, state = carry
    microbatch, weight = xs
    new, state = estimate(state, **microbatch)
    add_leaf = lambda t, e: t + weight.astype(t.dtype) * jnp.asarray(e, t.dtype)
    return (jax.tree.map(add_leaf, total, new), state), None

  xs = microbatches, _weights(microbatches, axis_name)
  return jax.lax.scan(add, (zeros, state), xs)[0]


def _weights(microbatches, axis_name):
  """Returns the fraction of predictions in each microbatch, (M,), float32."""
  num_parts = len(jax.tree.leaves(microbatches)[0])
  if 'label_mask' not in microbatches:
    return jnp.full(num_parts, 1 / num_parts)
  mask = microbatches['label_mask'].reshape(num_parts, -1)
  counts = jnp.sum(mask, axis=1, dtype=jnp.float32)
  axes = _collectives.other_axes(counts, axis_name)
  counts = _collectives.total(counts, axes)
  return counts / jnp.maximum(jnp.sum(counts), 1.0)


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
