"""Scaling of updates by Sophia's clipped, preconditioned momentum.

Symbols, all shaped like the parameters θ:

  g       gradient
  m, mu   EMA of g with decay b1; m̂ = m / (1 - b1^t)
  ĥ       one estimate of the Hessian diagonal, from the estimator
  h, nu   EMA of ĥ with decay b2, refreshed every k = update_interval steps
  u       clip(m̂ / max(γ h, ε), -c, c), the update

A step computes g -> m -> (every k steps: estimator -> ĥ -> h) -> u. Inside,
trees are in coordinates, see `_coordinates`.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _estimator
from sophia_optax import _fractions
from sophia_optax import _gamma
from sophia_optax import _hutchinson


class SophiaState(NamedTuple):
  """State of :func:`scale_by_sophia`.

  Attributes:
    count: Number of steps taken, shape (), int32.
    mu: EMA of the gradients, like the parameters, in ``mu_dtype``.
    nu: EMA of the Hessian diagonal, like the parameters, in ``nu_dtype``. For
      a complex leaf, the curvature of its real part in the real part, that of
      its imaginary part in the imaginary part.
    hessian_fn_state: State of the estimator.
    win_rate: Fraction of coordinates that the update of the last refresh step
      did not clip, shape (), float32.
    nonfinite_count: Number of refreshes whose estimate had an entry that was
      not finite and so was left out, shape (), int32.
    refresh_count: Number of refreshes, shape (), int32.
    gamma_factor: Factor by which ``target_win_rate`` has multiplied ``gamma``,
      shape (), float32. None without a target.
    negative_fraction: Fraction of coordinates whose entry of h was negative
      after the last refresh, shape (), float32. None without ``diagnostics``.
    by_leaf: Win rate and negative fraction of each parameter, in the order of
      ``jax.tree.leaves``, shape (number of parameters, 2), float32. None
      without ``diagnostics``.
  """

  count: jax.Array  # type: ignore[assignment]  # Not tuple.count.
  mu: optax.Updates
  nu: optax.Updates
  hessian_fn_state: Any
  win_rate: jax.Array
  nonfinite_count: jax.Array
  refresh_count: jax.Array
  gamma_factor: jax.Array | None = None
  negative_fraction: jax.Array | None = None
  by_leaf: jax.Array | None = None


def scale_by_sophia(
  b1: jax.typing.ArrayLike = 0.965,
  b2: jax.typing.ArrayLike = 0.99,
  eps: jax.typing.ArrayLike = 1e-8,
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
  refresh_before_update: bool = False,
  target_win_rate: jax.typing.ArrayLike | None = None,
  diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales gradients to Sophia's updates, without learning rate and decay.

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    \hat m_t = m_t / (1 - \beta_1^t) \\
    u_t &= \mathrm{clip}\left(\hat m_t / \max(\gamma h_{t-1}, \epsilon),
    -c, c\right) \\
    h_t &= \beta_2 h_{t-1} + (1 - \beta_2) \hat h_t
    \text{ if } (t - 1) \bmod k = 0, \text{ else } h_{t-1}

  The update of a step uses the h of before that step, as in
  :func:`optax.contrib.sophia`, so the first one is a sign update;
  ``refresh_before_update`` is the order of the paper. An entry of an estimate
  that is NaN or infinite is ignored, and h keeps its value there.

  The win rate, the fraction of coordinates that are not clipped, is measured at
  each refresh, for the update of that step; other steps do not pay for it. Read
  it with ``optax.tree.get(state, 'win_rate')``. The paper's authors tune
  ``gamma`` until it lies between 0.1 and 0.5; a larger ``gamma`` raises it.

  With ``target_win_rate``, γ is ``gamma`` times a factor that starts at 1. Each
  refresh changes the factor by at most 4, so that the win rate of the
  coordinates with a gradient reaches the target. Coordinates whose gradient is
  zero, such as embedding rows that are not in the batch, win at any γ and do
  not count. Where γ has no effect, because h is not positive or m̂ is below
  ``clip_threshold * eps``, a coordinate counts, but the others must reach the
  target; their own win rate stays between 0.1 and 0.9. The factor is
  ``optax.tree.get(state, 'gamma_factor')``, and stays between 1e-10 and 1e10.

  With ``update(..., loss_scale=s)`` gradients and ``obj_fn`` are those of s
  times the loss, which prevents underflow in half precision. They are divided
  by s in float32.

  With ``update(..., refresh=...)`` the caller decides whether this step
  refreshes h, and ``update_interval`` has no effect. Without it the count of
  steps decides, in a :func:`jax.lax.cond`. A Python bool leaves nothing to
  decide: ``refresh=False`` compiles a step without the estimator, which needs
  none of its arguments, and ``refresh=True`` one without a conditional. An
  array is the condition of a :func:`jax.lax.cond`. With
  ``update(..., may_refresh=False)`` the step does not refresh h either way, see
  :class:`sophia_optax.MultiSteps`.

  Gradients of complex parameters must be conjugated, as for every optax
  optimizer; their real and imaginary parts are clipped separately. Integer
  parameters get a zero update.

  Args:
    b1: Decay rate of m, in [0, 1).
    b2: Decay rate of h per refresh, in [0, 1). Per step it is about
      ``1 - (1 - b2) / update_interval``.
    eps: Smallest denominator, greater than 0.
    gamma: Scale of the curvature, at least 0, or a schedule of it. With 0 the
      update is ``clip(m / eps)``: sign momentum.
    clip_threshold: Largest magnitude c of an update, greater than 0. None means
      no clipping.
    update_interval: Number k of steps from one refresh of h to the next.
    hessian_diagonal_fn: Estimator of the Hessian diagonal, a transformation
      whose ``update(grads, state, params, **extra_args)`` returns an estimate
      like ``params``, and its state.
    mu_dtype: dtype of m for real parameters. None means that of the parameter.
    verbose: Whether to print the win rate.
    print_win_rate_every_n_steps: Number of steps from one print to the next. 0
      means none.
    nu_dtype: dtype of h for real parameters. None means float32, or that of the
      parameter if it is wider: in bfloat16 an EMA with decay 0.99 stalls.
    bias_correction: Whether to divide m by ``1 - b1**t``. The paper does not.
    nu_bias_correction: Whether to divide h by ``1 - b2**n`` after n refreshes.
      Otherwise h starts a factor of ``1 - b2`` too small, and the first steps
      are sign descent.
    nesterov: Whether to use Nesterov's momentum, in the form that
      :func:`optax.nadamw` has: :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) +
      (1 - \beta_1) g_t / (1 - \beta_1^t)` takes the place of
      :math:`\hat m_t`. Without ``bias_correction`` nothing is divided.
    refresh_before_update: Whether a step that refreshes h uses the new h
      already, as in Algorithm 3 of the paper.
    target_win_rate: Win rate, in (0, 1), to which γ is steered. None means that
      γ is ``gamma``.
    diagnostics: Whether each refresh also measures ``negative_fraction``, and
      both fractions of each parameter, for :func:`sophia_optax.diagnose`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`SophiaState`, whose ``update`` needs ``params`` and the extra
    arguments of the estimator. Updates have the dtypes of the gradients.

  Raises:
    ValueError: If a hyperparameter that is not an array is out of its range;
      in ``update``, if ``params`` is missing, if the gradient or the estimate
      is not like it, if ``state`` is not what ``init`` returned, or if
      ``loss_scale`` is passed with an estimator that does not divide by it.
    TypeError: If a hyperparameter is not a number, or ``hessian_diagonal_fn``
      not a transformation; in ``update``, if ``refresh`` or ``may_refresh`` is
      not a boolean.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
    >>> tx = sophia_optax.scale_by_sophia(
    ...     gamma=1.0, refresh_before_update=True, b2=0.0)
    >>> x = jnp.array([0.5, 0.5])
    >>> updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, obj_fn=loss)
    >>> print(updates.round(3))  # Newton's step, whatever the curvature.
    [0.5 0.5]

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023,
    Algorithm 3
  """
  _checks.decay('b1', b1)
  _checks.decay('b2', b2)
  _checks.positive('eps', eps)
  _checks.number_or_schedule('gamma', gamma, at_least=0)
  if clip_threshold is not None:
    _checks.positive('clip_threshold', clip_threshold)
  update_interval = _checks.whole_number(
    'update_interval', update_interval, at_least=1
  )
  print_interval = _checks.whole_number(
    'print_win_rate_every_n_steps', print_win_rate_every_n_steps, at_least=0
  )
  _checks.transformation('hessian_diagonal_fn', hessian_diagonal_fn)
  if target_win_rate is not None:
    _checks.fraction('target_win_rate', target_win_rate)
    is_zero = isinstance(gamma, (int, float)) and gamma == 0
    if is_zero or clip_threshold is None:
      raise ValueError(
        'target_win_rate needs gamma greater than 0, which it multiplies, and a'
        f' clip_threshold; got {gamma!r} and {clip_threshold!r}.'
      )
  estimator = optax.with_extra_args_support(hessian_diagonal_fn)

  def gamma_of(used):
    # Schedules count the steps before this one, as optax's do.
    gamma_t = gamma(used.count - 1) if callable(gamma) else gamma
    if target_win_rate is not None:
      gamma_t = jnp.asarray(gamma_t, jnp.float32) * used.gamma_factor
    if nu_bias_correction:  # Of h, which occurs as γ h only.
      num_refreshes = jnp.maximum(used.refresh_count, 1).astype(jnp.float32)
      correction = 1 - jnp.asarray(b2, jnp.float32) ** num_refreshes
      gamma_t = jnp.asarray(gamma_t, jnp.float32) / correction
    return gamma_t

  def momentum_of(used, grads):
    def corrected(tree, count):
      if not bias_correction:
        return tree
      decay = jnp.asarray(b1, float)
      count = count.astype(decay.dtype)
      return optax.tree.bias_correction(tree, decay, count)

    if not nesterov:
      return corrected(used.mu, used.count)
    ahead = corrected(used.mu, optax.safe_increment(used.count))
    return jax.tree.map(
      lambda g, m: _ema(b1, g, m), corrected(grads, used.count), ahead
    )

  def ratios_of(used, grads):
    gamma_t = gamma_of(used)

    def ratio(m, h):
      h = h.astype(m.dtype)
      return m / jnp.maximum(_cast(gamma_t, h) * h, _cast(eps, h))

    return jax.tree.map(ratio, momentum_of(used, grads), used.nu)

  def clip(ratio):
    if clip_threshold is None:
      return ratio
    c = _cast(clip_threshold, ratio)
    return jnp.clip(ratio, -c, c)

  def wins(ratio):
    if clip_threshold is None:
      return jnp.full_like(ratio, True, bool)
    return jnp.abs(ratio) < _cast(clip_threshold, ratio)

  def steered(new, grads, has_gradient):
    def outcome(has_gradient, m, h, ratio):
      floor = _cast(clip_threshold, m) * _cast(eps, m)
      return _gamma.outcome(
        # Without a gradient m fades, and the coordinate wins whatever γ is.
        counted=has_gradient & jnp.isfinite(ratio),
        affected=(h > 0) & (jnp.abs(m) >= floor),
        won=wins(ratio),
      )

    # m and not m̂, which would be held in memory: near ε it makes no difference.
    ratios = ratios_of(new, grads)
    outcomes = jax.tree.map(outcome, has_gradient, new.mu, new.nu, ratios)
    target = jnp.asarray(target_win_rate, jnp.float32)
    return _gamma.steer(new.gamma_factor, target, outcomes)

  def measured(new, used, grads, params):
    # Leaf by leaf: all ratios at once would be held in memory.
    ratios, like = ratios_of(used, grads), new.count
    new = new._replace(win_rate=_fractions.fraction(wins, ratios, like))
    if not diagnostics:
      return new
    is_negative = lambda h: h < 0

    def by_leaf(condition, tree):
      fraction = lambda _, leaf: _fractions.fraction(condition, leaf, like)
      return jax.tree.leaves(jax.tree.map(fraction, params, tree))

    columns = by_leaf(wins, ratios), by_leaf(is_negative, new.nu)
    return new._replace(
      negative_fraction=_fractions.fraction(is_negative, new.nu, like),
      by_leaf=jnp.array(columns, jnp.float32).T,
    )

  def init_fn(params):
    mu = optax.tree.zeros_like(params)
    if mu_dtype is not None:
      mu = _coordinates.zeros_like(params, mu_dtype)
    number = lambda dtype: jnp.zeros([], dtype)
    size = len(jax.tree.leaves(params))
    return SophiaState(
      count=number(jnp.int32),
      mu=mu,
      nu=_coordinates.zeros_like(params, nu_dtype),
      hessian_fn_state=estimator.init(params),
      win_rate=number(jnp.float32),
      nonfinite_count=number(jnp.int32),
      refresh_count=number(jnp.int32),
      gamma_factor=(
        None if target_win_rate is None else jnp.ones([], jnp.float32)
      ),
      negative_fraction=number(jnp.float32) if diagnostics else None,
      by_leaf=jnp.zeros((size, 2), jnp.float32) if diagnostics else None,
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    loss_scale=None,
    refresh=None,
    may_refresh=True,
    **extra_args,
  ):
    _checks.given('params', params, 'scale_by_sophia')
    find_state(state)
    _checks.same_shapes('The gradient', updates, params)
    request = _estimator.Request()
    if loss_scale is not None:
      extra_args |= {'loss_scale': loss_scale, 'sophia_request': request}
    updates = jax.tree.map(_gradient_of, params, updates)
    raw = _coordinates.split(params, updates)
    grads = _coordinates.unscale(_coordinates.widen(raw), loss_scale)
    mu = _coordinates.split(params, state.mu)

    def averaged_gradient():
      return jax.tree.map(lambda g, m: _ema(b1, g, m), grads, mu)

    old = state._replace(
      count=optax.safe_increment(state.count),
      mu=averaged_gradient(),
      nu=_coordinates.split(params, state.nu),
    )

    def refreshed(old):
      if refresh_before_update:
        # The update comes after the conditional. An m from outside would be
        # written to memory before it, on every step.
        old = old._replace(mu=averaged_gradient())
      estimate, hessian_fn_state = estimator.update(
        updates, old.hessian_fn_state, params=params, **extra_args
      )
      if loss_scale is not None:
        _check_unscaled(hessian_diagonal_fn, request)
      _checks.same_shapes('The Hessian diagonal estimate', estimate, params)
      _checks.averaged(estimate, state.nu)
      new = _average(b2, old, _coordinates.split(params, estimate))
      new = new._replace(hessian_fn_state=hessian_fn_state)
      if target_win_rate is not None:
        has_gradient = jax.tree.map(lambda g: g != 0, raw)
        new = new._replace(gamma_factor=steered(new, grads, has_gradient))
      used = new if refresh_before_update else old
      return measured(new, used, grads, params)

    if refresh is None:
      refresh = state.count % _as_int(update_interval) == 0
    _checks.boolean('refresh', refresh)
    _checks.boolean('may_refresh', may_refresh)
    new = _cond(_all(refresh, may_refresh), refreshed, old)
    ratios = ratios_of(new if refresh_before_update else old, grads)
    if verbose:
      _print_every(_as_int(print_interval), old.count, wins, ratios)
    updates = _coordinates.join(updates, jax.tree.map(clip, ratios))
    mu = _coordinates.join(state.mu, new.mu)
    return updates, new._replace(mu=mu, nu=_coordinates.join(state.nu, new.nu))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_state(state: optax.OptState) -> SophiaState:
  """Returns the one SophiaState in a state, or raises."""
  is_sophia = lambda x: isinstance(x, SophiaState)
  found = [s for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)]
  if len(found) != 1:
    raise ValueError(
      'state must hold one SophiaState, as init and update return it, got a'
      f' {type(state).__name__} that holds {len(found)}. The order is'
      ' update(grads, state, params). Restore a checkpoint into the structure'
      ' that init returns.'
    )
  return found[0]


def _all(*conditions):
  """Whether all hold, as a bool if tracing knows it and as an array if not."""
  traced = [c for c in conditions if isinstance(c, jax.Array)]
  known = [c for c in conditions if not isinstance(c, jax.Array)]
  return all(known) and functools.reduce(operator.and_, traced, True)


def _cond(is_due, refreshed, old):
  """Refreshes the state if it is due.

  The count and m do not pass through the conditional, which would copy them.
  What is computed from them, as m̂, is not computed before it either: XLA would
  keep it in memory for both branches.
  """
  if not isinstance(is_due, jax.Array):
    return refreshed(old) if is_due else old
  rest = {'count': old.count, 'mu': old.mu}
  without = dict.fromkeys(rest)
  new = jax.lax.cond(
    is_due,
    lambda state: refreshed(state._replace(**rest))._replace(**without),
    lambda state: state,
    old._replace(**without),
  )
  return new._replace(**rest)


def _cast(value, like):
  """Casts an array hyperparameter to the dtype of the operand."""
  if hasattr(value, 'dtype'):
    return jnp.asarray(value, like.dtype)
  return value


def _as_int(value):
  """Casts an array hyperparameter to int32: counts need its precision."""
  if hasattr(value, 'dtype'):
    return jnp.round(value).astype(jnp.int32)
  return value


def _ema(decay, new, old):
  """Exponential moving average, in the wider dtype of the two.

  The decayed part is a product in the dtype of the average, as in optax.
  """
  dtype = _coordinates.wider(new.dtype, old.dtype)
  decayed = (_cast(decay, old) * old).astype(dtype)
  new = new.astype(dtype)
  return (1 - _cast(decay, new)) * new + decayed


def _average(b2, old, estimate):
  """Averages the finite entries of an estimate into h."""

  def average(e, h):
    new = _ema(b2, _coordinates.widen(e), _coordinates.widen(h))
    return jnp.where(jnp.isfinite(e), new.astype(h.dtype), h)

  def is_nonfinite(e):  # One number, not an array of booleans.
    largest = jnp.max(jnp.abs(e), initial=0)
    return (~jnp.isfinite(largest)).astype(jnp.float32)

  estimate = optax.tree.cast_like(estimate, old.nu)
  nonfinite = _fractions.sum_over_shards(is_nonfinite, estimate, old.count)
  return old._replace(
    nu=jax.tree.map(average, estimate, old.nu),
    nonfinite_count=old.nonfinite_count + (nonfinite > 0).astype(jnp.int32),
    refresh_count=old.refresh_count + 1,
  )


def _gradient_of(param, grad):
  """Integer parameters get a zero gradient; `jax.grad` returns float0."""
  if _coordinates.is_differentiable(param):
    return grad
  return jnp.zeros_like(param, dtype=jnp.result_type(param))


def _print_every(n, count, wins, ratios):
  """Prints the win rate on every n-th step; n may be an array, 0 is never."""
  if not isinstance(n, jax.Array) and n == 0:
    return
  jax.lax.cond(
    (n > 0) & (count % jnp.maximum(n, 1) == 0),
    lambda r: jax.debug.print(
      'Sophia optimizer win rate: {}', _fractions.fraction(wins, r, count)
    ),
    lambda r: None,
    ratios,
  )


def _check_unscaled(estimator, request):
  """Raises if an estimator did not divide its estimate by `loss_scale`."""
  if not request.is_granted and not _estimator.names_loss_scale(estimator):
    raise ValueError(
      'loss_scale needs an estimator that divides by it, got one that ignores'
      ' it. Write it with sophia_optax.sampled_estimator, or give its update an'
      ' argument loss_scale; or unscale the gradients before the optimizer, and'
      ' pass neither loss_scale nor a scaled obj_fn.'
    )
