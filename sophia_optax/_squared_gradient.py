"""The squared gradient as an estimate of curvature: the empirical Fisher."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates


def squared_gradient_estimator_diag_hessian(
  batch_size: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates curvature by the training gradient, squared.

  .. math:: \hat h = B\, g \odot g

  It needs no extra argument, so Sophia with it works wherever AdamW works, and
  it costs nothing. But it is biased: g is the gradient at the labels of the
  data, and only at labels drawn from the model are the products of different
  predictions zero on average. So B g ⊙ g estimates the empirical Fisher plus
  B times the square of the full gradient. Far from a minimum the second part
  dominates; at a minimum of a model that fits, both tend to the Gauss-Newton
  diagonal that
  :func:`sophia_optax.gauss_newton_bartlett_estimator_diag_hessian` estimates
  without bias.

  Args:
    batch_size: Number B of predictions that the loss averages over, greater
      than 0: tokens for a language model, not sequences.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose ``update`` returns
    the estimate in place of the gradients, with leaves as those of
    :func:`sophia_optax.hutchinson_estimator_diag_hessian`. With ``loss_scale=``
    the gradients are those of that many times the loss.

  Raises:
    ValueError: If ``batch_size`` is not positive; in ``update``, if ``params``
      is missing.

  Example:
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> estimator = sophia_optax.squared_gradient_estimator_diag_hessian(4)
    >>> w = jnp.zeros(2)
    >>> estimate, _ = estimator.update(
    ...     jnp.array([1.0, -3.0]), estimator.init(w), w)
    >>> print(estimate)
    [ 4. 36.]

  References:
    Kunstner et al., `Limitations of the Empirical Fisher Approximation for
    Natural Gradient Descent <https://arxiv.org/abs/1905.12558>`_, 2019
  """
  _checks.positive('batch_size', batch_size)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    loss_scale=None,
    sophia_request=None,
    **extra_args,
  ):
    del extra_args
    if sophia_request is not None:
      sophia_request.grant()
    _checks.given('params', params, 'the squared gradient estimator')
    grads = _coordinates.unscale(
      _coordinates.widen(_coordinates.split(params, updates)), loss_scale
    )
    squares = jax.tree.map(
      lambda g: jnp.asarray(batch_size, g.dtype) * jnp.square(g), grads
    )
    return _coordinates.join(_coordinates.zeros_like(params), squares), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )
