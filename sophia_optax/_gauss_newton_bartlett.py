"""The Gauss-Newton-Bartlett estimator of the curvature's diagonal.

z     outputs of the model, such as logits (batch, T, V) or means (batch,)
B     number of predictions that count; one prediction is V logits or one mean
J     Jacobian of one prediction with respect to the parameters θ
s     score of one prediction: the gradient of -log p(y | z) with respect to z,
      for a label y drawn from the model; E[s] = 0, E[s sᵀ] = S
ĝ     gradient of the mean of -log p(y | z), that is Σ Jᵀ s / B
ĥ     B ĝ ⊙ ĝ; E[ĥ] = diag(Σ Jᵀ S J) / B, because scores of different
      predictions are independent, so their products are zero on average
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
from sophia_optax import _outputs
from sophia_optax import likelihoods

GaussNewtonBartlettState = _estimator.EstimatorState


def gauss_newton_bartlett_estimator_diag_hessian(
  random_seed: Any | None = None,
  *,
  likelihood: (
    str | likelihoods.Likelihood | Callable[[jax.Array, jax.Array], jax.Array]
  ) = 'categorical',
  num_samples: int = 1,
  num_chunks: int | None = None,
  has_aux: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the Gauss-Newton diagonal with labels sampled from the model.

  .. math::
    \hat h = B\, \hat g \odot \hat g, \qquad
    \hat g = \nabla_\theta \frac{1}{B} \sum_{b=1}^B -\log p(\hat y_b \mid z_b),
    \qquad \hat y_b \sim p(\cdot \mid z_b)

  for B predictions with outputs z and sampled labels ŷ. The estimate is
  unbiased for the diagonal of the Gauss-Newton matrix of the mean loss, and
  never negative. It takes one forward and one backward pass and no second
  derivative. Its standard deviation is about √2 times its mean, for any B. To
  reduce it, average ``num_samples`` draws, each for one more backward pass, or
  use :func:`sophia_optax.microbatched` at no extra cost.

  With labels of the data in place of sampled ones the estimate would be biased,
  see :func:`sophia_optax.squared_gradient_estimator_diag_hessian`.

  ``update(grads, state, params, predict_fn=...)`` returns the estimate in place
  of the gradients. It has the structure of ``params`` and leaves like those of
  :func:`sophia_optax.hutchinson_estimator_diag_hessian`. ``update`` accepts:

  * ``predict_fn(params)``: returns the outputs of the model, logits or means,
    of any rank. With ``batch=`` it is called as ``predict_fn(params, batch)``.
  * ``label_mask``: booleans, True for the predictions to count. It broadcasts
    to the outputs without the axis of classes. If it masks all predictions, the
    estimate is zero.
  * ``full_params``: all parameters, needed if :func:`optax.masked` or
    :func:`optax.partition` hides some.
  * ``loss_scale``: a factor for the backward pass that prevents underflow. The
    estimate does not depend on it.
  * ``head_fn(params, hidden)``: the head of the model, see below.

  With many classes, logits take the most memory. Pass ``num_chunks=M`` to have
  only those of one chunk in memory at a time. Then ``predict_fn`` must return
  the final hidden states, of shape (..., N, D). ``head_fn(params, hidden)``
  computes the outputs for a chunk of them, of shape (..., N / M, D); it gets
  all parameters, because embeddings may be tied. The first draw takes no extra
  FLOPs; each further draw computes the head again. Chunk m contains the
  positions m, m + M, m + 2 M, ... of the axis of size N, so a sharded axis
  stays sharded in each chunk. The estimate differs only in the random labels;
  with ``num_chunks=1`` it is identical.

  With ``axis_name``, ``predict_fn`` returns the outputs of the local shard.
  Each replica draws its own labels, and the estimates, each with the B of its
  shard, are averaged. So D replicas divide the variance by D. The state stays
  equal on all replicas.

  Args:
    random_seed: Seed of the labels: an integer, a raw or a typed PRNG key. None
      means 0.
    likelihood: Distribution of the labels given the outputs:
      ``'categorical'`` (logits over the last axis), ``'bernoulli'`` (logits),
      ``'gaussian'`` (means, scale 1), a
      :class:`sophia_optax.likelihoods.Likelihood`, or a function
      ``(key, outputs) -> scores`` for predictions that are single numbers. It
      gets outputs in float32 or wider.
    num_samples: Number of draws to average, all from one forward pass.
    num_chunks: Number M of chunks in which ``head_fn`` computes the outputs, a
      divisor of N. None means that ``predict_fn`` returns all outputs.
    has_aux: Whether ``predict_fn`` returns ``(outputs, aux)``. aux is ignored.
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`
      over which the parameters are replicated and the data is divided. None for
      a single device and for :func:`jax.jit` with sharded arrays. Parameters
      may be divided over another axis of a ``shard_map`` with
      ``check_vma=True``. Predictions that are divided over that axis are
      combined into one estimate.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`GaussNewtonBartlettState`.

  Raises:
    ValueError: If ``num_samples`` or ``num_chunks`` is less than 1 or
      ``likelihood`` is unknown. In ``update``, if ``params``, ``predict_fn`` or
      a required ``full_params`` is missing, if ``label_mask`` does not
      broadcast to the predictions, if there is no axis ``axis_name``, or if
      only one of ``num_chunks`` and ``head_fn`` is given.
    TypeError: In ``update``, if ``predict_fn`` returns a tuple without
      ``has_aux``, or if ``num_chunks`` does not divide N.

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
    >>> exact = jnp.mean(inputs**2, axis=0)  # For the loss (x·w - y)² / 2.
    >>> print(bool(jnp.allclose(estimate, exact, rtol=0.2)))
    True

    A language model with tied embeddings, as two functions:

    >>> params = {'embedding': jax.random.normal(jax.random.key(1), (50, 8))}
    >>> tokens = jnp.arange(64).reshape(4, 16) % 50
    >>> hidden_fn = lambda p: jnp.tanh(p['embedding'][tokens])  # (4, 16, 8)
    >>> head_fn = lambda p, hidden: hidden @ p['embedding'].T
    >>> estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    ...     num_chunks=8)  # Only logits of shape (4, 2, 50) are in memory.
    >>> estimate, _ = estimator.update(
    ...     None, estimator.init(params), params,
    ...     predict_fn=hidden_fn, head_fn=head_fn)
    >>> print(estimate['embedding'].shape)
    (50, 8)

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023,
    Algorithm 2
  """
  draw_score, event_ndim = _resolve(likelihood)
  if num_chunks is not None:
    num_chunks = _checks.whole_number('num_chunks', num_chunks, 1)

  def make_draw(
    theta, predict, tools, /, *, label_mask, loss_scale, head_fn=None, **rest
  ):
    del rest
    _check_together(head_fn, num_chunks)
    head = lambda theta, hidden: head_fn(tools.params_of(theta), hidden)

    if num_chunks is None:
      outputs = _outputs.at_once(predict, theta)
    elif num_chunks == 1:
      outputs = _outputs.at_once(lambda t: head(t, predict(t)), theta)
    else:
      outputs = _outputs.in_chunks(predict, head, theta, num_chunks)
    wide = _coordinates.wider(outputs.like.dtype, jnp.float32)
    mask = _mask_of_predictions(label_mask, outputs.shape, event_ndim)
    # Predictions that are divided over other axes are part of one estimate.
    axes = _collectives.other_axes(outputs.like, axis_name)
    count = _collectives.total(jnp.sum(mask.astype(wide)), axes)
    count = jnp.maximum(count, 1)  # B
    # The backward pass computes √B ĝ, whose square is ĥ. In half precision B ĝ
    # could overflow and ĝ² underflow. With a loss_scale, which is chosen for
    # the gradient, it computes loss_scale ĝ.
    root_of_count = jnp.sqrt(count)
    scale, gain = 1 / root_of_count, None
    if loss_scale is not None:
      scale = jnp.asarray(loss_scale, wide) / count
      gain = scale * root_of_count

    def score(key, outputs, mask):
      draw_here = _collectives.with_auto_axes(draw_score, outputs)
      scores = scale * draw_here(key, outputs.astype(wide))
      scores = jnp.where(mask, scores, 0)  # Padding may hold NaN.
      return scores.astype(outputs.dtype)

    def draw(key):
      key = _collectives.fold_in_index(key, axes)
      root = _coordinates.unscale(outputs.vjp(score, key, mask), gain)
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
  """Returns a function that draws scores, and the `event_ndim`."""
  if isinstance(likelihood, likelihoods.Likelihood):
    return likelihood.draw_score, likelihood.event_ndim
  if callable(likelihood):
    return likelihood, 0
  _checks.one_of('likelihood', likelihood, likelihoods.BY_NAME)
  return _resolve(likelihoods.BY_NAME[likelihood])


def _check_together(head_fn, num_chunks):
  if (head_fn is None) != (num_chunks is None):
    given = 'head_fn' if num_chunks is None else f'num_chunks={num_chunks}'
    raise ValueError(
      f'head_fn and num_chunks must be used together, got only {given}. Pass'
      ' num_chunks=8 to the estimator and head_fn=lambda params, hidden: hidden'
      ' @ params["head"] to update, or remove both.'
    )


def _mask_of_predictions(label_mask, shape, event_ndim):
  """Returns the mask of predictions, with axes of size 1 for the event."""
  predictions = shape[: len(shape) - event_ndim]
  if label_mask is None:
    label_mask = True
  mask = jnp.broadcast_to(jnp.asarray(label_mask, bool), predictions)
  return mask.reshape(predictions + (1,) * event_ndim)
