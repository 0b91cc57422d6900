"""Optimizers: chains of the parts."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sophia_optax import _coordinates
from sophia_optax import _hutchinson
from sophia_optax import _sophia


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    gamma: jax.typing.ArrayLike = 0.01,
    clip_threshold: jax.typing.ArrayLike | None = 1.0,
    update_interval: jax.typing.ArrayLike = 10,
    hessian_diagonal_fn: optax.GradientTransformation = (
        _hutchinson.hutchinson_estimator_diag_hessian()
    ),
    mu_dtype: Any | None = None,
    verbose: bool = False,
    print_win_rate_every_n_steps: jax.typing.ArrayLike = 0,
    *,
    nu_dtype: Any | None = None,
    bias_correction: bool = True,
    refresh_before_update: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The Sophia optimizer: clipped steps, preconditioned by the curvature.

  .. math::
    \theta_{t+1} = \theta_t - \eta \left( \mathrm{clip}\left(
    \frac{\hat m_t}{\max(\gamma h, \epsilon)}, -c, c \right)
    + \lambda \theta_t \right)

  with the EMA m̂ of the gradient and the EMA h of an estimate of the Hessian
  diagonal, see :func:`sophia_optax.scale_by_sophia`. It takes the place of
  :func:`optax.contrib.sophia` and computes the same numbers.

  The default estimator is Hutchinson's (Sophia-H). It needs the loss of the
  current batch as a function of the parameters alone::

    tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)[0])

  Any extra argument of ``update`` is handed on to the estimator.

  Args:
    learning_rate: Step size η, a number or a schedule.
    b1: Decay rate of the EMA of the gradient, in [0, 1).
    b2: Decay rate of the EMA of the Hessian diagonal per refresh, in [0, 1).
      Per step it is about ``1 - (1 - b2) / update_interval``.
    eps: Smallest denominator, greater than 0.
    weight_decay: Rate λ of the decoupled weight decay, which is scaled by the
      learning rate.
    weight_decay_mask: Where to decay: a tree of booleans like the parameters,
      a prefix of one, or a function that returns one given a tree like the
      parameters. None means everywhere. Integer parameters never decay.
    gamma: Scale of the curvature, at least 0; tune it for a win rate of 0.1 to
      0.5.
    clip_threshold: Largest magnitude c of an update before the learning rate,
      greater than 0. None means no clipping.
    update_interval: Number of steps from one refresh of h to the next.
    hessian_diagonal_fn: Estimator of the Hessian diagonal.
    mu_dtype: dtype of m for real parameters. None means that of the parameter.
    verbose: Whether to print the win rate.
    print_win_rate_every_n_steps: Number of steps from one print to the next. 0
      means none.
    nu_dtype: dtype of h for real parameters. None means float32, or that of the
      parameter if it is wider.
    bias_correction: Whether m is corrected for its start at zero.
    refresh_before_update: Whether a step that refreshes h uses the new h
      already, as in Algorithm 3 of the paper.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs
    ``params`` and the extra arguments of the estimator.

  Raises:
    ValueError: If a hyperparameter that is not an array is out of its range;
      in ``update``, if ``params`` or what the estimator needs is missing.
    TypeError: If an argument is of the wrong type.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sophia_optax
    >>> loss = lambda x: jnp.sum((x - 3.0) ** 2)
    >>> tx = sophia_optax.sophia(learning_rate=0.1)
    >>> x = jnp.array([1.0, 2.0])
    >>> state = tx.init(x)
    >>> for _ in range(100):
    ...   grads = jax.grad(loss)(x)
    ...   updates, state = tx.update(grads, state, x, obj_fn=loss)
    ...   x = optax.apply_updates(x, updates)
    >>> print(bool(loss(x) < 0.1))
    True

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023
  """
  return optax.chain(
      _sophia.scale_by_sophia(
          b1=b1,
          b2=b2,
          eps=eps,
          gamma=gamma,
          clip_threshold=clip_threshold,
          update_interval=update_interval,
          hessian_diagonal_fn=hessian_diagonal_fn,
          mu_dtype=mu_dtype,
          verbose=verbose,
          print_win_rate_every_n_steps=print_win_rate_every_n_steps,
          nu_dtype=nu_dtype,
          bias_correction=bias_correction,
          refresh_before_update=refresh_before_update,
      ),
      optax.masked(
          optax.chain(
              optax.add_decayed_weights(weight_decay, weight_decay_mask),
              optax.scale_by_learning_rate(learning_rate),
          ),
          _coordinates.where_differentiable,
      ),
  )
