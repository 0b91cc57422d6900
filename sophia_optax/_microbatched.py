"""`microbatched`: averages an estimator over parts of the batch."""

import jax
import optax

from sophia_optax import _averages
from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates


def microbatched(
  estimator: optax.GradientTransformation, num_microbatches: int
) -> optax.GradientTransformationExtraArgs:
  r"""Averages an estimator over parts of the batch, each with its own draw.

  .. math:: \hat h = \frac{1}{M} \sum_{m=1}^M \hat h(\text{batch}[m::M])

  The M parts take the FLOPs of the whole batch and the memory for the
  activations of one part. For the Gauss-Newton-Bartlett estimator the average
  has 1/M of the variance of one estimate on the whole batch, because the
  relative standard deviation of an estimate, √2, does not depend on the size of
  its batch. The gain is smaller for Hutchinson's estimator if the Hessians of
  the parts differ. Its variance is the sum of squared off-diagonal entries, and
  these are larger in the Hessian of a part than in the Hessian of the whole
  batch, where they partly cancel.

  ``update(grads, state, params, batch=..., **extra_args)`` passes each part of
  ``batch``, and of ``label_mask`` if given, to the estimator. ``obj_fn`` and
  ``predict_fn`` are therefore called with ``(params, batch)``. The split is
  strided, so a batch whose leading axis is sharded over devices stays sharded.
  With ``label_mask``, parts are weighted by their number of predictions that
  count. If ``estimator`` is a chain that begins with an estimator of this
  library, the other transformations act on the average over the parts. A
  wrapper around an estimator of this library must forward extra arguments: it
  gets ``microbatches``, with all parts, in place of ``batch``.

  Args:
    estimator: The estimator to average.
    num_microbatches: Number M of parts. It must divide the leading axis of
      every array in ``batch``.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with the state of
    ``estimator``.

  Raises:
    ValueError: If ``num_microbatches`` is less than 1. In ``update``, if
      ``batch`` is missing or can't be split into equal parts.

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
  num_parts = _checks.whole_number('num_microbatches', num_microbatches, 1)
  inner = optax.with_extra_args_support(estimator)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    batch=None,
    label_mask=None,
    microbatches=None,
    **extra_args,
  ):
    _checks.given('params', params, 'microbatched')
    if microbatches is None:
      _checks.given('batch', batch, 'microbatched')
      microbatches = _averages.one_microbatch(batch, label_mask)
    microbatches = _averages.split(microbatches, num_parts)

    def estimate(state, **arguments):
      return inner.update(updates, state, params, **arguments, **extra_args)

    if optax.tree.get_all_with_path(state, 'EstimatorState'):
      # A sampled estimator averages over replicas only once.
      return estimate(state, microbatches=microbatches)
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros, state = _collectives.vary_like(
      (_coordinates.zeros_like(params), state), lambda: estimate(state, **first)
    )
    return _averages.over_microbatches(estimate, microbatches, zeros, state)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def on_part_of_batch(
  estimator: optax.GradientTransformation, stride: int, max_parts: int
) -> optax.GradientTransformationExtraArgs:
  """Estimates on every `stride`-th example, in as many microbatches as fit.

  Without `batch`, the estimator gets all arguments as they are.

  Args:
    estimator: The estimator.
    stride: Distance of the examples. Strided examples of a batch that is
      sharded over devices stay where they are.
    max_parts: Largest number of microbatches. It is reduced to a divisor of the
      number of examples.
  """
  inner = optax.with_extra_args_support(estimator)

  def update_fn(
    updates, state, params=None, *, batch=None, label_mask=None, **extra_args
  ):
    if batch is None:
      if label_mask is not None:
        extra_args['label_mask'] = label_mask
      return inner.update(updates, state, params, **extra_args)
    whole = _averages.one_microbatch(batch, label_mask)
    part = jax.tree.map(lambda x: x[:, ::stride], whole)
    size = jax.tree.leaves(part)[0].shape[1]
    num_parts = max(n for n in range(1, max_parts + 1) if size % n == 0)
    return microbatched(inner, num_parts).update(
      updates, state, params, microbatches=part, **extra_args
    )

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)
