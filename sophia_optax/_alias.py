"""Optimizers: chains of the parts."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _gauss_newton_bartlett
from sophia_optax import _hutchinson
from sophia_optax import _sophia


def sophia(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.965,
  b2: jax.typing.ArrayLike = 0.99,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
  gamma: optax.ScalarOrSchedule = 0.01,
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
  nu_bias_correction: bool = False,
  nesterov: bool = False,
  max_update_rms: jax.typing.ArrayLike | None = None,
  refresh_before_update: bool = False,
  target_win_rate: jax.typing.ArrayLike | None = None,
  diagnostics: bool = False,
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

  Any extra argument of ``update`` is forwarded to the estimator.

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
    gamma: Scale of the curvature, at least 0, or a schedule of it; tune it for
      a win rate of 0.1 to 0.5.
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
    nu_bias_correction: Whether h is corrected for its start at zero.
    nesterov: Whether to use Nesterov's momentum, as in :func:`optax.nadamw`.
    max_update_rms: Largest root mean square of the update of each parameter
      array, greater than 0, before weight decay and learning rate. A larger
      update is scaled down, see :func:`optax.clip_by_block_rms`. AdamW's
      updates have about 0.3, so with 0.3 its learning rate can be kept. Each
      part of an array that ``shard_map`` divides is scaled by itself. None
      means no limit.
    refresh_before_update: Whether a step that refreshes h uses the new h
      already, as in Algorithm 3 of the paper.
    target_win_rate: Win rate, in (0, 1), to which γ is steered, see
      :func:`sophia_optax.scale_by_sophia`. None means that γ is ``gamma``.
    diagnostics: Whether each refresh also measures what
      :func:`sophia_optax.diagnose` shows.

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
    >>> @jax.jit
    ... def step(x, state):
    ...   grads = jax.grad(loss)(x)
    ...   updates, state = tx.update(grads, state, x, obj_fn=loss)
    ...   return optax.apply_updates(x, updates), state
    >>> for _ in range(100):
    ...   x, state = step(x, state)
    >>> print(bool(loss(x) < 0.1))
    True

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023
  """
  _checks.number_or_schedule('learning_rate', learning_rate)
  _checks.number_or_schedule('weight_decay', weight_decay)
  limits = []
  if max_update_rms is not None:
    _checks.positive('max_update_rms', max_update_rms)
    limits.append(optax.clip_by_block_rms(max_update_rms))
  tx = optax.chain(
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
      nu_bias_correction=nu_bias_correction,
      nesterov=nesterov,
      refresh_before_update=refresh_before_update,
      target_win_rate=target_win_rate,
      diagnostics=diagnostics,
    ),
    optax.masked(
      optax.chain(
        *limits,
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
      ),
      _coordinates.where_differentiable,  # Integers stay as they are.
    ),
  )

  def update_fn(updates, state, params=None, **extra_args):
    _sophia.find_state(state)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def sophia_g(
  learning_rate: optax.ScalarOrSchedule = 1e-4,
  b1: jax.typing.ArrayLike = 0.965,
  b2: jax.typing.ArrayLike = 0.99,
  rho: optax.ScalarOrSchedule = 0.04,
  weight_decay: optax.ScalarOrSchedule = 0.1,
  *,
  weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
  update_interval: jax.typing.ArrayLike = 10,
  maximize: bool = False,
  hessian_diagonal_fn: optax.GradientTransformation = (
    _gauss_newton_bartlett.gauss_newton_bartlett_estimator_diag_hessian()
  ),
  mu_dtype: Any | None = None,
  nu_dtype: Any | None = None,
  nu_bias_correction: bool = False,
  nesterov: bool = False,
  max_update_rms: jax.typing.ArrayLike | None = None,
  refresh_before_update: bool = False,
  target_win_rate: jax.typing.ArrayLike | None = None,
  diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The Sophia-G optimizer, with the arguments of PyTorch's ``SophiaG``.

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    \theta_{t+1} &= (1 - \eta \lambda)\, \theta_t - \eta\,
    \mathrm{sign}(m_t) \min\left(\frac{|m_t|}{\rho h + 10^{-15}}, 1\right)

  without a bias correction of m, and with the EMA h of the estimate refreshed
  after the step on steps 0, k, 2k, .... Here h holds B ĝ ⊙ ĝ with the number B
  of predictions in it; PyTorch's holds ĝ ⊙ ĝ and its ``step`` takes B as
  ``bs``.

  The default estimator needs the outputs of the model on the current batch::

    tx.update(grads, state, params, predict_fn=lambda p: model(p, batch))

  What PyTorch calls ``capturable`` is :func:`jax.jit`, and what it calls
  ``dynamic`` is :func:`optax.inject_hyperparams`.

  Args:
    learning_rate: Step size η, at least 0, or a schedule.
    b1: Decay rate of the EMA of the gradient, in [0, 1).
    b2: Decay rate of the EMA of the curvature per refresh, in [0, 1).
    rho: Scale ρ of the curvature, at least 0, or a schedule of it; ``gamma``
      elsewhere.
    weight_decay: Rate λ of the decoupled weight decay, at least 0, or a
      schedule.
    weight_decay_mask: Where to decay, see :func:`sophia_optax.sophia`.
    update_interval: Number k of steps from one refresh of h to the next.
    maximize: Whether to ascend. An estimator such as Hutchinson's is then given
      the negated ``obj_fn``; the Gauss-Newton-Bartlett estimate does not depend
      on the direction.
    hessian_diagonal_fn: Estimator of the curvature's diagonal.
    mu_dtype: dtype of m for real parameters. None means that of the parameter.
    nu_dtype: dtype of h for real parameters. None means float32, or that of the
      parameter if it is wider.
    nu_bias_correction: Whether h is corrected for its start at zero.
    nesterov: Whether to use Nesterov's momentum, as in :func:`optax.nadamw`,
      without a bias correction.
    max_update_rms: Largest root mean square of the update of each parameter,
      see :func:`sophia_optax.sophia`. None means no limit.
    refresh_before_update: Whether a step that refreshes h uses the new h
      already, as in Algorithm 3 of the paper.
    target_win_rate: Win rate, in (0, 1), to which γ is steered, see
      :func:`sophia_optax.scale_by_sophia`. None means that γ is ``rho``.
    diagnostics: Whether each refresh also measures what
      :func:`sophia_optax.diagnose` shows.

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
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> labels = jnp.argmax(x, axis=-1)
    >>> predict = lambda w: x @ w
    >>> loss = lambda w: jnp.mean(
    ...     optax.softmax_cross_entropy_with_integer_labels(predict(w), labels))
    >>> tx = sophia_optax.sophia_g(learning_rate=0.05, weight_decay=0.0)
    >>> w = jnp.zeros((3, 3))
    >>> state = tx.init(w)
    >>> step = jax.jit(lambda w, s: tx.update(
    ...     jax.grad(loss)(w), s, w, predict_fn=predict))
    >>> for _ in range(100):
    ...   updates, state = step(w, state)
    ...   w = optax.apply_updates(w, updates)
    >>> print(bool(loss(w) < 0.2))
    True

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023

    `The authors' PyTorch code <https://github.com/Liuhong99/Sophia>`_
  """
  _checks.number_or_schedule('learning_rate', learning_rate, at_least=0)
  _checks.number_or_schedule('rho', rho, at_least=0)
  _checks.number_or_schedule('weight_decay', weight_decay, at_least=0)
  tx = sophia(
    learning_rate,
    b1,
    b2,
    # Where ρ h is as small as this, all but tiny updates are clipped, and the
    # larger of the two is as good as their sum.
    eps=1e-15,
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    gamma=rho,
    update_interval=update_interval,
    hessian_diagonal_fn=hessian_diagonal_fn,
    mu_dtype=mu_dtype,
    nu_dtype=nu_dtype,
    bias_correction=False,
    nu_bias_correction=nu_bias_correction,
    nesterov=nesterov,
    max_update_rms=max_update_rms,
    refresh_before_update=refresh_before_update,
    target_win_rate=target_win_rate,
    diagnostics=diagnostics,
  )
  return _maximizing(tx) if maximize else tx


def _maximizing(tx):
  """The optimizer of the negated objective, given the objective."""

  def update_fn(updates, state, params=None, *, obj_fn=None, **extra_args):
    def negated(*args):
      value = obj_fn(*args)
      return (-value[0], *value[1:]) if isinstance(value, tuple) else -value

    if obj_fn is not None:
      extra_args['obj_fn'] = negated
    negate = lambda g: -g if _coordinates.is_differentiable(g) else g
    updates = jax.tree.map(negate, updates)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)
