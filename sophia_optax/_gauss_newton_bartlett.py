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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates
from sophia_optax import _draws
from sophia_optax import likelihoods


class GaussNewtonBartlettState(NamedTuple):
  """State of the Gauss-Newton-Bartlett estimator.

  Attributes:
    key: PRNG key of the next labels, raw (shape (2,), uint32) or typed (shape
      ()), as it was given.
  """

  key: jax.Array


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
  num_samples = _checks.whole_number('num_samples', num_samples, at_least=1)
  draw_score, event_ndim = _resolve(likelihood)

  def init_fn(params):
    del params
    return GaussNewtonBartlettState(key=_draws.make_key(random_seed))

  def update_fn(
    updates,
    state,
    params=None,
    *,
    predict_fn=None,
    batch=None,
    label_mask=None,
    full_params=None,
    loss_scale=None,
    obj_fn=None,
    **extra_args,
  ):
    del updates, extra_args
    user = 'the Gauss-Newton-Bartlett estimator'
    _checks.given('params', params, user)
    _checks.given('predict_fn', predict_fn, user, ('obj_fn', obj_fn))
    args = () if batch is None else (batch,)
    _checks.callable_with(
      'predict_fn', predict_fn, ('params', 'batch')[: 1 + len(args)]
    )
    _checks.complete('predict_fn', params, full_params)
    _collectives.check_axes(axis_name)

    def predict(theta):
      p = _coordinates.fill(_coordinates.join(params, theta), full_params)
      outputs = _checks.without_aux('predict_fn', predict_fn(p, *args), has_aux)
      _checks.real_array('predict_fn', outputs, event_ndim)
      return outputs

    theta = _collectives.vary(_coordinates.split(params, params), axis_name)
    outputs, vjp = jax.vjp(predict, theta)
    # Predictions that are divided over some other axis belong to one estimate.
    axes = _collectives.other_axes(outputs, axis_name)
    predictions = outputs.shape[: outputs.ndim - event_ndim]
    if label_mask is not None:
      _checks.broadcasts('label_mask', label_mask, predictions)
    wide = _coordinates.wider(outputs.dtype, jnp.float32)
    mask = jnp.asarray(True if label_mask is None else label_mask, bool)
    mask = jnp.broadcast_to(mask, predictions).astype(wide)
    count = _collectives.total(jnp.sum(mask), axes)
    weight = mask / jnp.sqrt(jnp.maximum(count, 1))
    weight = weight.reshape(predictions + (1,) * event_ndim)

    def draw(key):
      # √B ĝ, as B ĝ in half precision could overflow where ĝ² vanishes.
      draw_here = _collectives.with_auto_axes(draw_score, outputs)
      scores = weight * draw_here(key, outputs.astype(wide))
      scores = jnp.where(weight > 0, scores, 0)  # Padding may hold NaN.
      if loss_scale is not None:
        scores *= jnp.asarray(loss_scale, wide)
      (root,) = vjp(scores.astype(outputs.dtype))
      root = _coordinates.unscale(_coordinates.widen(root), loss_scale)
      return jax.tree.map(jnp.square, root)

    key, subkey = jax.random.split(state.key)
    subkey = _collectives.fold_in_index(
      subkey, (*_collectives.names(axis_name), *axes)
    )
    mean = _draws.average_over_draws(
      draw, _coordinates.widen(theta), subkey, num_samples
    )
    estimate = _coordinates.join(_coordinates.zeros_like(params), mean)
    return estimate, GaussNewtonBartlettState(key=key)

  return _collectives.averaged(
    optax.GradientTransformationExtraArgs(init_fn, update_fn), axis_name
  )


def _resolve(likelihood):
  """Returns what draws the scores, and how many axes one prediction has."""
  if isinstance(likelihood, likelihoods.Likelihood):
    return likelihood.draw_score, likelihood.event_ndim
  if callable(likelihood):
    return likelihood, 0
  _checks.one_of('likelihood', likelihood, likelihoods.BY_NAME)
  return _resolve(likelihoods.BY_NAME[likelihood])
