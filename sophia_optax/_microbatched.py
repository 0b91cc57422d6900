"""Averages of an estimator over parts of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates


def microbatched(
  estimator: optax.GradientTransformation, num_microbatches: int
) -> optax.GradientTransformationExtraArgs:
  r"""Averages an estimator over parts of the batch, each with its own draw.

  .. math:: \hat h = \frac{1}{M} \sum_{m=1}^M \hat h(\text{batch}[m::M])

  The parts cost together what the batch costs and need the activations of one
  part only. The Gauss-Newton-Bartlett estimate has a standard deviation of √2
  of its mean whatever the size of its batch, so M estimates of 1/M of the batch
  have together 1/M of the variance of one estimate of the whole. Hutchinson's
  gains as much only where the Hessians of the parts are like that of the whole:
  entries off the diagonal that average out over the batch are larger in a part.

  ``update(grads, state, params, batch=..., **extra_args)`` hands each part of
  ``batch``, and of ``label_mask`` if there is one, to the estimator, so
  ``obj_fn`` and ``predict_fn`` are called with ``(params, batch)``. The split
  is strided, so a batch whose leading axis is sharded over devices stays so.
  With ``label_mask`` parts weigh by the number of predictions that count.

  Args:
    estimator: The estimator of one part.
    num_microbatches: Number M of parts. Has to divide the leading axis of every
      array in ``batch``.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with the state of
    ``estimator``.

  Raises:
    ValueError: If ``num_microbatches`` is less than 1; in ``update``, if
      ``batch`` is missing or can't be split into equal parts.
    TypeError: If ``estimator`` is not a transformation.

  Example:
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> estimator = sophia_optax.microbatched(
    ...     sophia_optax.hutchinson_estimator_diag_hessian(), 2)
    >>> w = jnp.array(1.0)
    >>> estimate, _ = estimator.update(
    ...     None, estimator.init(w), w, batch=jnp.array([1.0, 2.0, 3.0, 4.0]),
    ...     obj_fn=lambda w, x: jnp.mean(x * w**2))
    >>> print(estimate)
    5.0
  """
  _checks.transformation('estimator', estimator)
  num_microbatches = _checks.whole_number(
    'num_microbatches', num_microbatches, at_least=1
  )
  # Replicas average once, after the parts.
  inner, axis_name = _collectives.unaveraged(estimator)

  def split(x):  # (n, ...) to (M, n / M, ...), part m holding x[m::M]
    return jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    batch: Any = None,
    label_mask: jax.Array | None = None,
    **extra_args,
  ):
    _checks.given('params', params, 'microbatched')
    _checks.given('batch', batch, 'microbatched')
    size = _checks.leading_axis('batch', batch, num_microbatches)
    parts = {'batch': jax.tree.map(split, batch)}
    weights = jnp.full(num_microbatches, 1 / num_microbatches)
    if label_mask is not None:
      shape = (size, *jnp.shape(label_mask)[1:])
      _checks.broadcasts('label_mask', label_mask, shape)
      mask = split(jnp.broadcast_to(jnp.asarray(label_mask, bool), shape))
      parts['label_mask'] = mask
      counts = jnp.sum(
        mask.reshape(num_microbatches, -1), axis=1, dtype=jnp.float32
      )
      counts = _collectives.total(
        counts, _collectives.other_axes(counts, axis_name)
      )
      weights = counts / jnp.maximum(jnp.sum(counts), 1.0)

    def add_part(carry, part_and_weight):
      total, state = carry
      part, weight = part_and_weight
      estimate, state = inner.update(
        updates, state, params, **part, **extra_args
      )
      total = jax.tree.map(
        lambda t, e: t + weight.astype(t.dtype) * e.astype(t.dtype),
        total,
        estimate,
      )
      return (total, state), None

    xs = (parts, weights)
    carry = (_coordinates.zeros_like(params), state)
    carry, _ = _collectives.vary_alike(
      (carry, None), add_part, carry, jax.tree.map(lambda x: x[0], xs)
    )
    return jax.lax.scan(add_part, carry, xs)[0]

  return _collectives.averaged(
    optax.GradientTransformationExtraArgs(inner.init, update_fn), axis_name
  )
