"""The squared gradient as a biased estimate of the curvature."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates


def squared_gradient_estimator_diag_hessian(
  batch_size: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the curvature as the square of the training gradient.

  .. math:: \hat h = B\, g \odot g

  This estimator needs no extra argument, so Sophia with it works wherever AdamW
  works, and it adds almost no cost. But it is biased, because g is the gradient
  for the labels of the data. Products of different predictions are zero on
  average only for labels drawn from the model. B g ⊙ g therefore estimates the
  empirical Fisher plus B - 1 times the square of the full gradient. Far from a
  minimum, the squared full gradient dominates. At a minimum the full gradient
  is zero. If the model also fits the data, the empirical Fisher is close to the
  Gauss-Newton diagonal, which
  :func:`sophia_optax.gauss_newton_bartlett_estimator_diag_hessian` estimates
  without bias.

  Args:
    batch_size: Number B of predictions that the gradient averages over, greater
      than 0. For a language model, count tokens, not sequences. With gradient
      accumulation, count those of all micro-batches.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose ``update`` returns
    the estimate in place of the gradients, with leaves like those of
    :func:`sophia_optax.hutchinson_estimator_diag_hessian`. If the gradients are
    those of s times the loss, pass ``loss_scale=s`` to ``update``.

  Raises:
    ValueError: If ``batch_size`` is not positive. In ``update``, if ``params``
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

  def update_fn(updates, state, params=None, *, loss_scale=None, **extra_args):
    del extra_args
    _checks.given('params', params, 'the squared gradient estimator')
    grads = _coordinates.unscale(
      _coordinates.widen(_coordinates.split(params, updates)), loss_scale
    )
    squares = jax.tree.map(
      lambda g: jnp.asarray(batch_size, g.dtype) * jnp.square(g), grads
    )
    return _coordinates.join(_coordinates.zeros_like(params), squares), state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )
