"""The Gauss-Newton-Bartlett estimator of the curvature's diagonal.

z     outputs of the model, one prediction each: logits (B, T, V), means (N,)
B     number of predictions that count
J     Jacobian of one prediction with respect to the parameters θ
s     score of one prediction: gradient of -log p(y | z) at a label y that is
      drawn from the model; E[s] = 0, E[s sᵀ] = S
ĝ     gradient of the mean of -log p(y | z), that is Σ Jᵀ s / B
ĥ     B ĝ ⊙ ĝ, so that E[ĥ] = diag(Σ Jᵀ S J) / B: scores of different
      predictions are independent, and their products vanish on average
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates
from sophia_optax import _estimator
from sophia_optax import likelihoods

GaussNewtonBartlettState = _estimator.EstimatorState


def gauss_newton_bartlett_estimator_diag_hessian(
  random_seed: Any | None = None,
  *,
  likelihood: (
    str | likelihoods.Likelihood | Callable[[jax.Array, jax.Array], jax.Array]
  ) = 'categorical',
  num_samples: int = 1,
  has_aux: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the Gauss-Newton diagonal with labels from the model itself.

  .. math::
    \hat h = B\, \hat g \odot \hat g, \qquad
    \hat g = \nabla_\theta \frac{1}{B} \sum_{b=1}^B -\log p(\hat y_b \mid z_b),
    \qquad \hat y_b \sim p(\cdot \mid z_b)

  With ``axis_name``, ``predict_fn`` returns the outputs of the local shard:
  each replica draws labels of its own, and the estimates, each with the B of
  its shard, are averaged, so that D replicas divide the variance by D. What is
  stored stays equal on all.

  The estimate is unbiased for the diagonal of the Gauss-Newton matrix of the
  mean loss, never negative, and needs one forward and one backward pass, no
  second derivative. Its standard deviation is about √2 of its mean whatever B
  is; averaging ``num_samples`` draws, each a further backward pass, or
  :func:`sophia_optax.microbatched` at no further cost, lower that.

  With the labels of the data instead of sampled ones this would be the
  empirical Fisher, which is another thing: see
  :func:`sophia_optax.squared_gradient_estimator_diag_hessian`.

  ``update(grads, state, params, predict_fn=...)`` returns the estimate in place
  of the gradients. ``predict_fn(params)`` returns the outputs of the model,
  logits or means, of any rank; with ``batch=`` it is called as
  ``predict_fn(params, batch)``. Where :func:`optax.masked` or
  :func:`optax.partition` hides parameters, ``full_params=`` has them all for
  ``predict_fn``. ``label_mask=`` says which predictions count; it broadcasts to
  the outputs without the axis of classes, and where all are masked the estimate
  is zero. ``loss_scale=`` multiplies what is sent backward through
  ``predict_fn``, against underflow; the estimate does not see it. The estimate
  has the structure of ``params``, with leaves as those of
  :func:`sophia_optax.hutchinson_estimator_diag_hessian`.

  Args:
    random_seed: Seed of the labels: an integer, a raw or a typed PRNG key. None
      means 0.
    likelihood: Distribution of the labels given the outputs:
      ``'categorical'`` (logits over the last axis), ``'bernoulli'`` (logits),
      ``'gaussian'`` (means, scale 1), a
      :class:`sophia_optax.likelihoods.Likelihood`, or a function
      ``(key, outputs) -> scores`` of predictions that are single numbers.
      Outputs reach it in float32 or wider.
    num_samples: Number of draws to average, all from one forward pass.
    has_aux: Whether ``predict_fn`` returns ``(outputs, aux)``. What is in aux
      is not used.
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`
      over which the parameters are replicated and the data is not. None for a
      single device and for :func:`jax.jit` with sharded arrays. Parameters may
      be divided over another axis of a ``shard_map`` with ``check_vma=True``;
      predictions that are divided over it too belong to one estimate.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`GaussNewtonBartlettState`.

  Raises:
    ValueError: If ``num_samples`` is less than 1 or ``likelihood`` is unknown;
      in ``update``, if ``params`` or ``predict_fn`` is missing, or
      ``full_params`` where parameters are hidden; if ``label_mask`` does not
      broadcast to the predictions, or there is no axis ``axis_name``.
    TypeError: In ``update``, if ``predict_fn`` can't be called with these
      arguments or returns something else than a floating point array.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> inputs = jax.random.normal(jax.random.key(0), (1000, 2))
    >>> w = jnp.array([1.0, -1.0])
    >>> estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    ...     likelihood='gaussian', num_samples=1000)
    >>> estimate, _ = estimator.update(
    ...     None, estimator.init(w), w, predict_fn=lambda w: inputs @ w)
    >>> exact = jnp.mean(inputs**2, axis=0)  # Of the loss (x·w - y)² / 2.
    >>> print(bool(jnp.allclose(estimate, exact, rtol=0.2)))
    True

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023,
    Algorithm 2
  """
  draw_score, event_ndim = _resolve(likelihood)

  def make_draw(theta, predict, *, label_mask, loss_scale, **extra_args):
    del extra_args
    outputs, pull_back = jax.vjp(predict, theta)  # (..., classes) or (...)
    if outputs.ndim < event_ndim:
      raise TypeError(
        f'predict_fn must return outputs with at least {event_ndim} axes for'
        f' this likelihood, got shape {outputs.shape}. The last axis of logits'
        ' is that of the classes.'
      )
    wide = _coordinates.wider(outputs.dtype, jnp.float32)
    mask = _mask_of_predictions(label_mask, outputs, event_ndim)
    # Predictions that are divided over another axis belong to one estimate.
    axes = _collectives.other_axes(outputs, axis_name)
    count = _collectives.total(jnp.sum(mask.astype(wide)), axes)
    count = jnp.maximum(count, 1)  # B
    # What is sent backward are the scores of √B ĝ: in half precision B ĝ can
    # overflow where ĝ² vanishes. With a loss_scale, which is chosen for the
    # gradient, they are those of loss_scale ĝ.
    root_of_count = jnp.sqrt(count)
    scale, gain = 1 / root_of_count, None
    if loss_scale is not None:
      scale = jnp.asarray(loss_scale, wide) / count
      gain = scale * root_of_count

    def draw(key):
      key = _collectives.fold_in_index(key, axes)
      draw_here = _collectives.with_auto_axes(draw_score, outputs)
      scores = scale * draw_here(key, outputs.astype(wide))
      scores = jnp.where(mask, scores, 0)  # Padding may hold NaN.
      (root,) = pull_back(scores.astype(outputs.dtype))
      root = _coordinates.unscale(_coordinates.widen(root), gain)
      return jax.tree.map(jnp.square, root)

    return draw

  return _estimator.sampled_estimator(
    make_draw,
    random_seed,
    fn_name='predict_fn',
    num_samples=num_samples,
    has_aux=has_aux,
    axis_name=axis_name,
  )


def _resolve(likelihood):
  """Returns the function that draws scores, and the axes of a prediction."""
  if isinstance(likelihood, likelihoods.Likelihood):
    return likelihood.draw_score, likelihood.event_ndim
  if likelihood is likelihoods.gaussian:
    raise TypeError('likelihood must be called: pass likelihoods.gaussian().')
  if callable(likelihood):
    return likelihood, 0
  _checks.one_of('likelihood', likelihood, likelihoods.BY_NAME)
  return _resolve(likelihoods.BY_NAME[likelihood])


def _mask_of_predictions(label_mask, outputs, event_ndim):
  """Returns which predictions count, with axes of size 1 for the event."""
  predictions = outputs.shape[: outputs.ndim - event_ndim]
  if label_mask is None:
    label_mask = True
  _checks.broadcasts('label_mask', label_mask, predictions)
  mask = jnp.broadcast_to(jnp.asarray(label_mask, bool), predictions)
  return mask.reshape(predictions + (1,) * event_ndim)
