"""The optimizers, `sophia`, `sophiaw` and `sophia_g`, as plain chains."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _eigenbasis
from sophia_optax import _gauss_newton_bartlett
from sophia_optax import _hutchinson
from sophia_optax import _microbatched
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
  adam_b2: jax.typing.ArrayLike | None = None,
  refresh_before_update: bool = False,
  target_win_rate: jax.typing.ArrayLike | None = None,
  diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The Sophia optimizer: momentum divided by the curvature, then clipped.

  .. math::
    \theta_{t+1} = \theta_t - \eta \left( \mathrm{clip}\left(
    \frac{\hat m_t}{\max(\gamma h, \epsilon)}, -c, c \right)
    + \lambda \theta_t \right)

  Here m̂ is the EMA (exponential moving average) of the gradient and h is the
  EMA of estimates of the Hessian diagonal. A *refresh* adds a new estimate to
  h; see :func:`sophia_optax.scale_by_sophia`. This function is a drop-in
  replacement for :func:`optax.contrib.sophia` and computes the same numbers.

  The default estimator is Hutchinson's (Sophia-H). It needs the loss of the
  current batch as a function of the parameters::

    tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)[0])

  The learning rate and weight decay are added to the arguments of
  :func:`sophia_optax.scale_by_sophia`, which describes all others and those of
  ``update``.

  Args:
    learning_rate: Step size η, a number or a schedule. Any sign is accepted,
      as in :func:`optax.contrib.sophia`.
    b1: Decay rate of m.
    b2: Decay rate of h.
    eps: Lower bound of the denominator.
    weight_decay: Rate λ of the decoupled weight decay, a number or a schedule,
      also of any sign. The learning rate multiplies it.
    weight_decay_mask: Parameters to decay: a tree of booleans with the
      structure of the parameters or a prefix of it, or a function that returns
      such a tree for a tree like the parameters. None means all. Integer
      parameters never decay.
    gamma: Scale γ of the curvature. Tune it so that the win rate, the fraction
      of coordinates that are not clipped, is 0.1 to 0.5.
    clip_threshold: Threshold c.
    update_interval: Interval between refreshes of h, in steps.
    hessian_diagonal_fn: Estimator of the Hessian diagonal.
    mu_dtype: dtype of m.
    verbose: Whether to print the win rate.
    print_win_rate_every_n_steps: Interval between prints, in steps.
    nu_dtype: dtype of h.
    bias_correction: Whether to correct m for its initialization at zero.
    nu_bias_correction: Whether to correct h for its initialization at zero.
    nesterov: Whether to use Nesterov momentum.
    adam_b2: Decay rate of a second moment that limits the update.
    refresh_before_update: Whether a refresh comes before the update.
    target_win_rate: Target for the win rate, to which γ is adjusted.
    diagnostics: Whether to measure for :func:`sophia_optax.diagnose`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs
    ``params`` and the extra arguments of the estimator.

  Raises:
    ValueError: If a hyperparameter is out of range, unless it is an array. In
      ``update``, if ``params`` or an argument of the estimator is missing.

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
  scaling = _sophia.scale_by_sophia(
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
    adam_b2=adam_b2,
    refresh_before_update=refresh_before_update,
    target_win_rate=target_win_rate,
    diagnostics=diagnostics,
  )
  return _descent(scaling, learning_rate, weight_decay, weight_decay_mask)


def _descent(scaling, learning_rate, weight_decay, mask):
  """Chains a scaling with weight decay and the learning rate."""
  _checks.number_or_schedule('learning_rate', learning_rate)
  _checks.number_or_schedule('weight_decay', weight_decay)
  # Partial functions, because Equinox makes pytrees of plain ones, which optax
  # would take for trees of booleans.
  decays = functools.partial(_decays, mask)
  has_rate = functools.partial(_coordinates.where_differentiable)
  return optax.chain(
    scaling,
    optax.add_decayed_weights(weight_decay, decays),
    optax.masked(optax.scale_by_learning_rate(learning_rate), has_rate),
  )


def _decays(mask, params):
  """Returns which parameters decay: those in the mask, if differentiable."""
  # A function gets all parameters. A tree can be callable, too.
  if any(map(callable, jax.tree.leaves(mask))):
    mask = mask(params)
  is_differentiable = _coordinates.where_differentiable(params)
  if mask is None:
    return is_differentiable
  return jax.tree.map(
    lambda m, tree: jax.tree.map(lambda x: bool(m) and x, tree),
    mask,
    is_differentiable,
  )


_CURVATURES: dict[str, dict[str, Any]] = {
  'gauss_newton': {
    'hessian_diagonal_fn': (
      _gauss_newton_bartlett.gauss_newton_bartlett_estimator_diag_hessian()
    ),
    'gamma': 0.1,
    'target_win_rate': 0.3,
  },
  'hessian': {
    'hessian_diagonal_fn': _hutchinson.hutchinson_estimator_diag_hessian(),
    'gamma': 0.05,
    'target_win_rate': 0.45,
  },
}


def sophiaw(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  *,
  mu_dtype: Any | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  curvature: str | optax.GradientTransformation | None = 'gauss_newton',
  curvature_fraction: float = 0.25,
  curvature_parts: int = 8,
  eigenbasis: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Sophia with the arguments of AdamW, and settings that need no tuning.

  .. math::
    \theta_{t+1} = \theta_t - \eta \left( \mathrm{clip}\left(
    \frac{\tilde m_t}{\max(\gamma h, \sqrt{\hat v_t}, \epsilon)}, -1, 1
    \right) + \lambda \theta_t \right)

  with Nesterov momentum m̃ and the second moment v of :func:`optax.nadamw`. It
  is :func:`sophia_optax.sophia` with ``nesterov``, corrected m and h,
  ``adam_b2``, ``b2=0.95``, a refresh of h every 10 steps, and a γ that adapts.
  It has the arguments of :func:`optax.adamw` except ``eps_root`` and
  ``nesterov``. Pass the values that you have for AdamW, and the batch to
  ``update``::

    tx.update(grads, state, params, predict_fn=predict_fn, batch=batch)

  ``predict_fn(params, batch)`` returns the outputs of the model, here logits.
  The optimizer takes the examples 0, 4, 8, ... of ``batch`` for the curvature,
  and averages estimates on up to 8 parts of them. ``batch`` is a tree of
  arrays, all with a leading axis of examples. Use a closure for other values.
  Without ``batch`` the curvature is that of ``predict_fn(params)``.

  Args:
    learning_rate: Step size η, a number or a schedule.
    b1: Decay rate of m.
    b2: Decay rate of v. It is not the ``b2`` of :func:`sophia_optax.sophia`.
    eps: Lower bound of the denominator. Without a curvature it is added to the
      denominator, as in Adam.
    mu_dtype: dtype of m.
    weight_decay: Rate λ of the decoupled weight decay.
    mask: Parameters to decay, see :func:`sophia_optax.sophia`.
    curvature: ``'gauss_newton'`` for logits over classes
      (:func:`sophia_optax.gauss_newton_bartlett_estimator_diag_hessian`);
      ``'hessian'`` for any loss, in which case ``update`` needs ``obj_fn``
      in place of ``predict_fn``
      (:func:`sophia_optax.hutchinson_estimator_diag_hessian`); or an estimator,
      such as one of these with other arguments. None means no curvature: the
      optimizer is :func:`optax.nadamw`, or with ``eigenbasis`` SOAP, and
      ``update`` needs no more than theirs.
    curvature_fraction: Fraction of the batch for the curvature, in (0, 1]. It
      is rounded to 1 / n for a whole number n.
    curvature_parts: Largest number of parts. The number is reduced to a divisor
      of the number of examples.
    eigenbasis: Whether to take momentum, curvature and limit in the eigenbasis
      of each matrix, see :func:`sophia_optax.in_eigenbasis`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs
    ``params`` and the arguments of the estimator.

  Raises:
    ValueError: If an argument is out of range, unless it is traced. In
      ``update``, if ``params`` or an argument of the estimator is missing.
    TypeError: If ``curvature_fraction`` or ``curvature_parts`` is an array.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sophia_optax
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> batch = {'x': x, 'y': jnp.argmax(x, axis=-1)}
    >>> predict_fn = lambda w, batch: batch['x'] @ w
    >>> loss_fn = lambda w, batch: jnp.mean(
    ...     optax.softmax_cross_entropy_with_integer_labels(
    ...         predict_fn(w, batch), batch['y']))
    >>> tx = sophia_optax.sophiaw(learning_rate=0.05)
    >>> w = jnp.zeros((3, 3))
    >>> state = tx.init(w)
    >>> step = jax.jit(lambda w, s: tx.update(
    ...     jax.grad(loss_fn)(w, batch), s, w,
    ...     predict_fn=predict_fn, batch=batch))
    >>> for _ in range(100):
    ...   updates, state = step(w, state)
    ...   w = optax.apply_updates(w, updates)
    >>> print(bool(loss_fn(w, batch) < 0.2))
    True

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023
  """
  _checks.static(
    curvature_fraction=curvature_fraction, curvature_parts=curvature_parts
  )
  if curvature is None:
    scaling = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=True)
  else:
    settings = _CURVATURES['gauss_newton'] | {'hessian_diagonal_fn': curvature}
    if isinstance(curvature, str):
      _checks.one_of('curvature', curvature, _CURVATURES)
      settings = _CURVATURES[curvature]
    estimator = _microbatched.on_part_of_batch(
      settings['hessian_diagonal_fn'],
      stride=_checks.whole_number(
        '1 / curvature_fraction', round(1 / curvature_fraction), 1
      ),
      max_parts=_checks.whole_number('curvature_parts', curvature_parts, 1),
    )
    scaling = _sophia.scale_by_sophia(
      b1=b1,
      b2=0.95,
      eps=eps,
      mu_dtype=mu_dtype,
      nu_bias_correction=True,
      nesterov=True,
      adam_b2=b2,
      **(settings | {'hessian_diagonal_fn': estimator}),
    )
  if eigenbasis:
    scaling = _eigenbasis.in_eigenbasis(scaling)
  return _descent(scaling, learning_rate, weight_decay, mask)


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
  bias_correction: bool = False,
  nu_bias_correction: bool = False,
  nesterov: bool = False,
  adam_b2: jax.typing.ArrayLike | None = None,
  target_win_rate: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The Sophia-G optimizer, with the arguments of PyTorch's ``SophiaG``.

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    \theta_{t+1} &= (1 - \eta \lambda)\, \theta_t - \eta\,
    \mathrm{sign}(m_t) \min\left(
    \frac{|m_t|}{\max(\rho h, 10^{-15})}, 1\right)

  By default there is no bias correction of m. h is an EMA of estimates of the
  curvature, refreshed after the update of steps 0, k, 2k, .... It averages
  B ĝ ⊙ ĝ, where ĝ is a gradient with sampled labels and B its number of
  predictions. PyTorch's h averages ĝ ⊙ ĝ, and its ``step`` takes B as ``bs``.
  PyTorch adds 1e-15 to ρ h. The results differ only where h is negative or
  nearly zero.

  The default estimator needs the outputs of the model on the current batch as
  a function of the parameters::

    tx.update(grads, state, params, predict_fn=lambda p: model(p, batch))

  Use :func:`jax.jit` in place of PyTorch's ``capturable``, and
  :func:`optax.inject_hyperparams` in place of its ``dynamic``.

  Args:
    learning_rate: Step size η, at least 0, or a schedule.
    b1: Decay rate of m.
    b2: Decay rate of the EMA of the curvature, applied at each refresh.
    rho: Scale ρ of the curvature, at least 0, or a schedule. The other
      functions of this library call it ``gamma``.
    weight_decay: Rate λ of the decoupled weight decay, at least 0, or a
      schedule.
    weight_decay_mask: Parameters to decay, see :func:`sophia_optax.sophia`.
    update_interval: Interval k between refreshes of h, in steps.
    maximize: Whether to maximize the objective instead of minimizing it.
      Gradients and ``obj_fn`` are those of the objective, and are negated. The
      Gauss-Newton-Bartlett estimate does not depend on the sign.
    hessian_diagonal_fn: Estimator of the diagonal of the curvature.
    mu_dtype: dtype of m.
    nu_dtype: dtype of h.
    bias_correction: Whether to correct m for its initialization at zero.
      PyTorch's ``SophiaG`` does not.
    nu_bias_correction: Whether to correct h for its initialization at zero.
    nesterov: Whether to use Nesterov momentum, as in :func:`optax.nadamw` if
      ``bias_correction`` is set.
    adam_b2: Decay rate of a second moment that limits the update.
    target_win_rate: Target for the win rate, to which ρ is adjusted.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs
    ``params`` and the extra arguments of the estimator.

  Raises:
    ValueError: If a hyperparameter is out of range, unless it is an array. In
      ``update``, if ``params`` or an argument of the estimator is missing.

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
    eps=1e-15,
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    gamma=rho,
    update_interval=update_interval,
    hessian_diagonal_fn=hessian_diagonal_fn,
    mu_dtype=mu_dtype,
    nu_dtype=nu_dtype,
    bias_correction=bias_correction,
    nu_bias_correction=nu_bias_correction,
    nesterov=nesterov,
    adam_b2=adam_b2,
    target_win_rate=target_win_rate,
  )
  return _maximizing(tx) if maximize else tx


def _maximizing(tx):
  """Returns an optimizer that minimizes the negated objective."""
  negated = optax.masked(
    optax.scale(-1), functools.partial(_coordinates.where_differentiable)
  )
  tx = optax.chain(negated, tx)

  def negative(fn):
    def negative_fn(*args):
      value = fn(*args)
      if isinstance(value, tuple):  # The loss and aux.
        return (-value[0], *value[1:])
      return -value

    return negative_fn

  def update_fn(updates, state, params=None, **extra_args):
    for name in ('obj_fn', 'value_fn'):
      if extra_args.get(name) is not None:
        extra_args[name] = negative(extra_args[name])
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)
