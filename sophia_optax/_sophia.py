"""Sophia's update rule: momentum divided by the curvature, then clipped.

Symbols, all shaped like the parameters θ:

  g       gradient
  m, mu   EMA of g with decay b1; m̂ = m / (1 - b1^t)
  ĥ       one estimate of the Hessian diagonal, from the estimator
  h, nu   EMA of ĥ with decay b2, refreshed every k = update_interval steps
  u       clip(m̂ / max(γ h, ε), -c, c), the update
  v       EMA of g² with decay adam_b2; with it √v̂ is also in the maximum

A step computes g -> m -> (every k steps: estimator -> ĥ -> h) -> u. The
formulas act on trees of real coordinates, see `_coordinates`.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    mu: EMA of the gradients, a tree like the parameters, in ``mu_dtype``.
    nu: EMA of the Hessian diagonal, a tree like the parameters, in
      ``nu_dtype``. For a complex leaf, the real part holds the curvature of the
      real part and the imaginary part that of the imaginary part.
    hessian_fn_state: State of the estimator.
    win_rate: Fraction of coordinates that were not clipped at the last refresh,
      shape (), float32.
    nonfinite_count: Number of refreshes whose estimate had entries, such as NaN
      and infinity, that were ignored, shape (), int32.
    refresh_count: Number of refreshes, shape (), int32.
    gamma_factor: Factor by which ``target_win_rate`` has multiplied ``gamma``,
      shape (), float32. None without a target.
    negative_fraction: Fraction of coordinates with negative h after the last
      refresh, shape (), float32. None without ``diagnostics``.
    by_leaf: Win rate and negative fraction of each parameter array, in the
      order of ``jax.tree.leaves``, shape (number of arrays, 2), float32. None
      without ``diagnostics``.
    second_moment: EMA of the squares of the gradients, a tree like the
      parameters, in float32, or the parameter's dtype if that is wider. The
      parts of a complex leaf hold the squares of its gradient's parts. None
      without ``adam_b2``.
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
  second_moment: optax.Updates | None = None


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
  adam_b2: jax.typing.ArrayLike | None = None,
  refresh_before_update: bool = False,
  target_win_rate: jax.typing.ArrayLike | None = None,
  diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales gradients according to the Sophia algorithm.

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    \hat m_t = m_t / (1 - \beta_1^t) \\
    u_t &= \mathrm{clip}\left(\hat m_t / \max(\gamma h_{t-1}, \epsilon),
    -c, c\right) \\
    h_t &= \beta_2 h_{t-1} + (1 - \beta_2) \hat h_t
    \text{ if } (t - 1) \bmod k = 0, \text{ else } h_{t-1}

  For learning rate and weight decay, see :func:`sophia_optax.sophia`.

  Every k steps, a *refresh* adds an estimate ĥ of the Hessian diagonal to h.
  As in :func:`optax.contrib.sophia`, the refresh comes after the update of its
  step. The first update therefore uses h = 0 and is a sign update. Pass
  ``refresh_before_update=True`` for the order of the paper. NaN and infinite
  entries of an estimate are ignored: h keeps its value there.

  The *win rate* is the fraction of coordinates that are not clipped. Each
  refresh measures it for the update of its step; other steps do not. Read it
  with ``optax.tree.get(state, 'win_rate')``. The paper's authors tune ``gamma``
  for a win rate between 0.1 and 0.5. A larger ``gamma`` raises it.

  With ``target_win_rate``, γ is ``gamma`` times a factor that starts at 1. Each
  refresh multiplies the factor by a number between 1/4 and 4, to bring the win
  rate to the target. Coordinates whose gradient is zero, such as embedding rows
  that are not in the batch, are left out of this win rate. Coordinates with
  h ≤ 0, or with m of a magnitude below ``clip_threshold * eps``, are included,
  but γ does not affect them. The target for the remaining coordinates is
  therefore adjusted so that the overall win rate reaches ``target_win_rate``.
  The adjusted target stays between 0.1 and 0.9. Read the factor with
  ``optax.tree.get(state, 'gamma_factor')``. It stays between 1e-10 and 1e10.

  With ``adam_b2`` = β, an update is at most as large as that of Adam with an ε
  of 0, element by element:

  .. math::
    u_t &= \mathrm{clip}\left(\hat m_t / \max(\gamma h_{t-1},
    \sqrt{\hat v_t}, \epsilon), -c, c\right) \\
    v_t &= \beta v_{t-1} + (1 - \beta) g_t^2, \qquad
    \hat v_t = v_t / (1 - \beta^t)

  So AdamW's learning rate and warm-up suit Sophia too. v is one more array for
  each parameter array, as in Adam. The win rate is still that without v.

  If gradients and ``obj_fn`` are those of s times the loss, which prevents
  underflow in half precision, pass ``loss_scale=s`` to ``update``. It divides
  the gradients and the estimate by s in float32.

  By default the number of steps decides whether to refresh h, in a
  :func:`jax.lax.cond`. To decide it yourself, pass ``refresh`` to ``update``;
  ``update_interval`` then has no effect. With a Python bool there is no
  conditional: ``refresh=True`` compiles a step that refreshes, and
  ``refresh=False`` one that neither calls the estimator nor needs its
  arguments. An array is the condition of a :func:`jax.lax.cond`. With
  ``may_refresh=False`` the step never refreshes h, see
  :class:`sophia_optax.MultiSteps`.

  Conjugate the gradients of complex parameters, as for every optax optimizer.
  Their real and imaginary parts are clipped separately. Integer parameters get
  a zero update.

  Args:
    b1: Decay rate of m, in [0, 1).
    b2: Decay rate of h, in [0, 1), applied at each refresh. Per step it is
      about ``1 - (1 - b2) / update_interval``.
    eps: Lower bound ε of the denominator, greater than 0.
    gamma: Scale γ of the curvature, at least 0, or a schedule. With 0 the
      update is ``clip(m / eps)``: sign momentum.
    clip_threshold: Threshold c, greater than 0. Updates are clipped to [-c, c].
      None means no clipping.
    update_interval: Interval k between refreshes of h, in steps.
    hessian_diagonal_fn: Estimator of the Hessian diagonal: a transformation
      whose ``update(grads, state, params, **extra_args)`` returns an estimate,
      a tree like ``params``, and its new state.
    mu_dtype: dtype of m for real parameters. None means the parameter's dtype.
    verbose: Whether to print the win rate.
    print_win_rate_every_n_steps: Interval between prints, in steps. 0 means no
      prints.
    nu_dtype: dtype of h for real parameters. None means float32, or the
      parameter's dtype if that is wider. In bfloat16 an EMA with decay 0.99
      stalls, because small changes are rounded away.
    bias_correction: Whether to divide m by ``1 - b1**t``. The paper does not.
    nu_bias_correction: Whether to divide h by ``1 - b2**n`` after n refreshes.
      Without it, h is only ``1 - b2`` times the estimate after the first
      refresh, so almost all coordinates of the first updates are clipped. n
      also counts refreshes that ignored entries of an estimate, so h stays too
      small in such an entry at first.
    nesterov: Whether to use Nesterov momentum in the form of
      :func:`optax.nadamw`: :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) +
      (1 - \beta_1) g_t / (1 - \beta_1^t)` replaces :math:`\hat m_t`. Without
      ``bias_correction`` neither term is divided.
    adam_b2: Decay rate β of the second moment v, in [0, 1). AdamW's b2 is a
      good value. None means no v.
    refresh_before_update: Whether a refresh comes before the update of its
      step, as in Algorithm 3 of the paper. By default it comes after it.
    target_win_rate: Target for the win rate, in (0, 1). γ is adjusted to reach
      it. None means that γ is ``gamma``.
    diagnostics: Whether each refresh also measures ``negative_fraction``, and
      both fractions for each parameter array, for
      :func:`sophia_optax.diagnose`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`SophiaState`. Its ``update`` needs ``params`` and the extra
    arguments of the estimator. Updates have the dtypes of the gradients.

  Raises:
    ValueError: If a hyperparameter is out of range, unless it is an array. In
      ``update``, if ``params`` is missing, if the gradient or the estimate is
      not a tree like it, if ``state`` is not what ``init`` returned, or if
      ``loss_scale`` is passed and the estimator does not divide by it.
    TypeError: If a hyperparameter is not a number, or ``hessian_diagonal_fn``
      is not a transformation. In ``update``, if ``refresh`` or ``may_refresh``
      is not a boolean, or if a gradient is complex and its parameter is not,
      or the reverse.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
    >>> tx = sophia_optax.scale_by_sophia(
    ...     gamma=1.0, refresh_before_update=True, b2=0.0)
    >>> x = jnp.array([0.5, 0.5])
    >>> updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, obj_fn=loss)
    >>> print(updates.round(3))  # Each entry is a Newton step, g / h.
    [0.5 0.5]

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023,
    Algorithm 3
  """
  _checks.decay('b1', b1)
  _checks.decay('b2', b2)
  _checks.positive('eps', eps)
  if adam_b2 is not None:
    _checks.decay('adam_b2', adam_b2)
  _checks.number_or_schedule('gamma', gamma, at_least=0)
  if clip_threshold is not None:
    _checks.positive('clip_threshold', clip_threshold)
  update_interval = _checks.whole_number_or_array(
    'update_interval', update_interval, at_least=1
  )
  print_interval = _checks.whole_number_or_array(
    'print_win_rate_every_n_steps', print_win_rate_every_n_steps, at_least=0
  )
  _checks.transformation('hessian_diagonal_fn', hessian_diagonal_fn)
  _checks.floating('mu_dtype', mu_dtype)
  _checks.floating('nu_dtype', nu_dtype)
  if target_win_rate is not None:
    _checks.fraction('target_win_rate', target_win_rate)
    if (np.isscalar(gamma) and gamma == 0) or clip_threshold is None:
      raise ValueError(
        'target_win_rate needs gamma greater than 0 and a clip_threshold, got'
        f' gamma={gamma!r} and clip_threshold={clip_threshold!r}. Pass both, or'
        ' leave target_win_rate out.'
      )
  estimator = optax.with_extra_args_support(hessian_diagonal_fn)

  def gamma_of(state):
    # As in optax, schedules get the number of steps before this one.
    gamma_t = gamma(state.count - 1) if callable(gamma) else gamma
    if target_win_rate is not None:
      gamma_t = jnp.asarray(gamma_t, jnp.float32) * state.gamma_factor
    if nu_bias_correction:  # Corrects γ, because h occurs only in γ h.
      num_refreshes = jnp.maximum(state.refresh_count, 1).astype(jnp.float32)
      correction = 1 - jnp.asarray(b2, jnp.float32) ** num_refreshes
      gamma_t = jnp.asarray(gamma_t, jnp.float32) / correction
    return gamma_t

  def momentum_of(state, grads):
    def corrected(tree, count):
      return _bias_corrected(tree, b1, count) if bias_correction else tree

    if not nesterov:
      return corrected(state.mu, state.count)
    ahead = corrected(state.mu, optax.safe_increment(state.count))
    return jax.tree.map(
      lambda g, m: _ema(b1, g, m), corrected(grads, state.count), ahead
    )

  def ratios_of(state, grads, *bounds):
    """Returns m̂ / max(γ h, ε). Trees of other lower bounds may follow."""
    gamma_t = gamma_of(state)

    def ratio(m, h, *bounds):
      h = h.astype(m.dtype)
      denominator = jnp.maximum(_cast(gamma_t, h) * h, _cast(eps, h))
      for bound in bounds:
        denominator = jnp.maximum(denominator, bound.astype(m.dtype))
      return m / denominator

    return jax.tree.map(ratio, momentum_of(state, grads), state.nu, *bounds)

  def clip(ratio):
    if clip_threshold is None:
      return ratio
    c = _cast(clip_threshold, ratio)
    return jnp.clip(ratio, -c, c)

  def wins(ratio):
    if clip_threshold is None:
      return jnp.full_like(ratio, True, bool)
    return jnp.abs(ratio) < _cast(clip_threshold, ratio)

  def steer(new, grads, has_gradient):
    def outcome(has_gradient, m, h, ratio):
      floor = _cast(clip_threshold, m) * _cast(eps, m)
      return _gamma.outcome(
        # Without a gradient m decays to 0, and the coordinate wins at any γ.
        counted=has_gradient & jnp.isfinite(ratio),
        # Uses m, because m̂ would be kept in memory. It matters only near ε.
        affected=(h > 0) & (jnp.abs(m) >= floor),
        won=wins(ratio),
      )

    ratios = ratios_of(new, grads)
    outcomes = jax.tree.map(outcome, has_gradient, new.mu, new.nu, ratios)
    target = jnp.asarray(target_win_rate, jnp.float32)
    return _gamma.steer(new.gamma_factor, target, outcomes)

  def measure(new, used, grads, params):
    # `fraction` reads one leaf at a time, so not all ratios are in memory.
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
      second_moment=(
        None if adam_b2 is None else _coordinates.zeros_like(params)
      ),
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
    _check_state(state)
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
    if adam_b2 is not None:
      second_moment = jax.tree.map(
        lambda g, v: _ema(adam_b2, jnp.square(g).astype(v.dtype), v),
        grads,
        _coordinates.split(params, state.second_moment),
      )
      old = old._replace(second_moment=second_moment)

    if refresh is None:
      refresh = state.count % _as_int(update_interval) == 0
    _checks.boolean('refresh', refresh)
    _checks.boolean('may_refresh', may_refresh)
    is_due = _all(refresh, may_refresh)
    estimator_args = updates, params
    if is_due is True:
      # Makes the estimate wait for the gradient. Without a conditional, XLA may
      # compute both at the same time, with the activations of both in memory.
      # The update does not wait: XLA for TPUs would then need more memory.
      estimator_args = jax.lax.optimization_barrier(estimator_args)

    def refresh_state(old):
      if refresh_before_update:
        # Recompute m here. If the conditional used the m from outside, XLA
        # would write it to memory before the conditional on every step.
        old = old._replace(mu=averaged_gradient())
      grads_in, params_in = estimator_args
      estimates = functools.partial(
        estimator.update,
        grads_in,
        old.hessian_fn_state,
        params_in,
        **extra_args,
      )
      estimate, hessian_fn_state = estimates()
      if loss_scale is not None and not request.is_granted:
        _check_unscaled(estimates, loss_scale)
      _checks.same_shapes('The Hessian diagonal estimate', estimate, params)
      _checks.averaged(estimate, state.nu)
      new = _average(b2, old, _coordinates.split(params, estimate))
      new = new._replace(hessian_fn_state=hessian_fn_state)
      if target_win_rate is not None:
        has_gradient = jax.tree.map(lambda g: g != 0, raw)
        new = new._replace(gamma_factor=steer(new, grads, has_gradient))
      used = new if refresh_before_update else old
      return measure(new, used, grads, params)

    new = _cond(is_due, refresh_state, old)
    used = new if refresh_before_update else old
    if verbose:
      ratios = ratios_of(used, grads)
      _print_every(_as_int(print_interval), old.count, wins, ratios)
    bounds = []
    if adam_b2 is not None:
      corrected = _bias_corrected(old.second_moment, adam_b2, old.count)
      bounds.append(jax.tree.map(jnp.sqrt, corrected))
      new = new._replace(
        second_moment=_coordinates.join(state.second_moment, old.second_moment)
      )
    clipped = jax.tree.map(clip, ratios_of(used, grads, *bounds))
    updates = _coordinates.join(updates, clipped)
    mu = _coordinates.join(state.mu, new.mu)
    return updates, new._replace(mu=mu, nu=_coordinates.join(state.nu, new.nu))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def states_in(state: optax.OptState) -> list[SophiaState]:
  """Returns all SophiaStates in an optimizer state."""
  is_sophia = lambda x: isinstance(x, SophiaState)
  return list(filter(is_sophia, jax.tree.leaves(state, is_leaf=is_sophia)))


def find_state(state: optax.OptState) -> SophiaState:
  """Returns the only SophiaState in an optimizer state, or raises."""
  found = states_in(state)
  if len(found) != 1:
    raise ValueError(
      'state must contain exactly one SophiaState, got a'
      f' {type(state).__name__} that contains {len(found)}. {_FIX_STATE}'
    )
  return found[0]


def _check_state(state):
  if not isinstance(state, SophiaState):
    got = f'a {type(state).__name__}'
    raise ValueError(f'state must be a SophiaState, got {got}. {_FIX_STATE}')


_FIX_STATE = (
  'Pass the state that init or update returned, as in update(grads, state,'
  ' params). Restore checkpoints into the structure that init returns.'
)


def _all(*conditions):
  """Whether all conditions hold; a bool if Python bools alone decide it."""
  traced = [c for c in conditions if isinstance(c, jax.Array)]
  known = [c for c in conditions if not isinstance(c, jax.Array)]
  return all(known) and functools.reduce(operator.and_, traced, True)


def _cond(is_due, refresh_state, old):
  """Refreshes the state if a refresh is due.

  The count, m and v bypass the conditional, which would copy them. Do not
  compute anything from them before it, such as m̂: XLA would keep that in memory
  for both branches.
  """
  if not isinstance(is_due, jax.Array):
    return refresh_state(old) if is_due else old
  names = 'count', 'mu', 'second_moment'
  rest = {name: getattr(old, name) for name in names}
  without = dict.fromkeys(rest)
  new = jax.lax.cond(
    is_due,
    lambda state: refresh_state(state._replace(**rest))._replace(**without),
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


def _bias_corrected(tree, decay, count):
  """Divides by 1 - decay^count. The decay may be an array of any dtype."""
  decay = jnp.asarray(decay, float)
  return optax.tree.bias_correction(tree, decay, count.astype(decay.dtype))


def _ema(decay, new, old):
  """Returns the next exponential moving average, in the wider dtype.

  As in optax, `decay * old` is computed in the dtype of `old`.
  """
  dtype = _coordinates.wider(new.dtype, old.dtype)
  decayed = (_cast(decay, old) * old).astype(dtype)
  new = new.astype(dtype)
  return (1 - _cast(decay, new)) * new + decayed


def _average(b2, old, estimate):
  """Adds an estimate to the average h, except where h would not be finite."""

  def average(e, h):
    return _ema(b2, e, _coordinates.widen(h)).astype(h.dtype)

  def finite(new, h):
    return jnp.where(jnp.isfinite(new), new, h)

  def is_nonfinite(x):  # One number, not an array of booleans.
    largest = jnp.max(jnp.abs(x), initial=0)
    return (~jnp.isfinite(largest)).astype(jnp.float32)

  def narrower(e, new):
    # In the dtype of the estimate, h is finite where the estimate is. XLA for
    # TPUs would write the new h to memory twice if it were counted there.
    return e if e.dtype == new.dtype else new

  estimate = optax.tree.cast_like(estimate, _coordinates.widen(old.nu))
  nu = jax.tree.map(average, estimate, old.nu)
  counted = jax.tree.map(narrower, estimate, nu)
  nonfinite = _fractions.sum_over_shards(is_nonfinite, counted, old.count)
  return old._replace(
    nu=jax.tree.map(finite, nu, old.nu),
    nonfinite_count=old.nonfinite_count + (nonfinite > 0).astype(jnp.int32),
    refresh_count=old.refresh_count + 1,
  )


def _gradient_of(param, grad):
  """Returns zeros for integer parameters, where `jax.grad` returns float0."""
  own, got = jnp.result_type(param), jnp.result_type(grad)
  if not _coordinates.is_differentiable(param):
    return jnp.zeros_like(param, dtype=own)
  kind = jnp.complexfloating if _coordinates.is_complex(param) else jnp.floating
  if not jnp.issubdtype(got, kind):
    raise TypeError(
      'The gradient must be complex for complex and real for other parameters,'
      f' in floating point, got {got} for a parameter in {own}. Cast it.'
    )
  return grad


def _print_every(n, count, wins, ratios):
  """Prints the win rate every n steps; never if n is 0. n may be an array."""
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


def _check_unscaled(estimates, loss_scale):
  """Raises if an estimator does not use `loss_scale`, so can't divide by it."""
  if not _estimator.uses(lambda s: estimates(loss_scale=s)[0], loss_scale):
    raise ValueError(
      'loss_scale needs an estimator that divides its estimate by it, got one'
      ' that ignores it. Write the estimator with'
      ' sophia_optax.sampled_estimator, or divide by the argument loss_scale of'
      ' its update. Or unscale the gradients before the optimizer, and pass'
      ' neither loss_scale nor a scaled obj_fn.'
    )
