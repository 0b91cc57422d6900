"""Scaling of updates by Sophia's clipped, preconditioned momentum.

Symbols, all shaped like the parameters θ:

  g       gradient
  m, mu   EMA of g with decay b1; m̂ = m / (1 - b1^t)
  ĥ       one estimate of the Hessian diagonal, from the estimator
  h, nu   EMA of ĥ with decay b2, refreshed every k = update_interval steps
  u       clip(m̂ / max(γ h, ε), -c, c), the update

The way of the data: g -> m -> (every k steps: estimator -> ĥ -> h) -> u.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates
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
    gamma: Scale of the curvature where ``target_win_rate`` steers it, shape (),
      float32. None where it is fixed.
    negative_fraction: Fraction of coordinates whose entry of h was negative
      after the last refresh, shape (), float32. None without ``diagnostics``.
  """

  count: jax.Array  # type: ignore[assignment]  # Not tuple.count.
  mu: optax.Updates
  nu: optax.Updates
  hessian_fn_state: Any
  win_rate: jax.Array
  nonfinite_count: jax.Array
  refresh_count: jax.Array
  gamma: jax.Array | None = None
  negative_fraction: jax.Array | None = None


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
  that is NaN or infinite is left out, and h keeps its value there.

  The win rate, the fraction of coordinates that are not clipped, is measured
  inside the refresh, for the update of that very step: a step that does not
  refresh pays nothing for it. Read it with
  ``optax.tree.get(state, 'win_rate')``. The paper's authors tune ``gamma``
  until it lies between 0.1 and 0.5; a larger ``gamma`` raises it. With
  ``target_win_rate`` every refresh steers ``gamma`` to it, by at most a factor
  of 4, from wherever it begins: ``optax.tree.get(state, 'gamma')``.

  With ``update(..., loss_scale=s)`` gradients and ``obj_fn`` are those of s
  times the loss, which keeps them from underflow in half precision. They are
  divided by s again, in float32. With ``update(..., may_refresh=False)`` this
  step does not refresh h, see :class:`sophia_optax.MultiSteps`.

  Gradients of complex parameters have to be conjugated, as for every optax
  optimizer; their real and imaginary parts are clipped apart. Integer
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
    refresh_before_update: Whether a step that refreshes h uses the new h
      already, as in Algorithm 3 of the paper.
    target_win_rate: Win rate, in (0, 1), that ``gamma`` is steered to, from the
      ``gamma`` given. None means that it stays as it is.
    diagnostics: Whether each refresh measures ``negative_fraction``, too.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`SophiaState`, whose ``update`` needs ``params`` and the extra
    arguments of the estimator. Updates have the dtypes of the gradients.

  Raises:
    ValueError: If a hyperparameter that is not an array is out of its range;
      in ``update``, if ``params`` is missing or the estimate is not like it.
    TypeError: If a hyperparameter is not a number, or ``hessian_diagonal_fn``
      not a transformation.

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
  if not callable(gamma):
    _checks.not_negative('gamma', gamma)
  if clip_threshold is not None:
    _checks.positive('clip_threshold', clip_threshold)
  update_interval = _checks.whole_number(
    'update_interval', update_interval, at_least=1
  )
  _checks.whole_number(
    'print_win_rate_every_n_steps', print_win_rate_every_n_steps, at_least=0
  )
  _checks.transformation('hessian_diagonal_fn', hessian_diagonal_fn)
  if target_win_rate is not None:
    _checks.fraction('target_win_rate', target_win_rate)
    _checks.steerable(gamma, clip_threshold)
  estimator = optax.with_extra_args_support(hessian_diagonal_fn)

  def ratios_of(mu, nu, gamma, count):
    decay = b1 if bias_correction else None
    return precondition(mu, nu, gamma, eps, decay, count)

  def clip(u):
    if clip_threshold is None:
      return u
    return jnp.clip(u, -_cast(clip_threshold, u), _cast(clip_threshold, u))

  def measure_win_rate(ratios, like):
    return fraction(lambda ratio: wins(ratio, clip_threshold), ratios, like)

  def steer(mu, nu, gamma, count, like):
    """The next γ, and all counts that it needs in one sum over shards."""
    ratios = ratios_of(mu, nu, gamma, count)

    def outcome(r, h):  # 1 for positive curvature, 2 for a win, 3 for both.
      won = wins(r, clip_threshold)
      return (h > 0).astype(jnp.int8) + 2 * won.astype(jnp.int8)

    def count_outcomes(x):
      return jnp.stack([_count(x % 2 == 1), _count(x == 3), _count(x > 1)])

    counts, size = _collectives.sum_over_shards(
      count_outcomes, jax.tree.map(outcome, ratios, nu), like
    )
    fractions = jnp.broadcast_to(counts / max(size, 1), 3)  # 0 of no leaves.
    target = jnp.asarray(target_win_rate, jnp.float32)
    return _gamma.steer(gamma, target, *fractions)

  def init_fn(params):
    mu = optax.tree.zeros_like(params)
    if mu_dtype is not None:
      mu = _coordinates.zeros_like(params, mu_dtype)
    return SophiaState(
      count=jnp.zeros([], jnp.int32),
      mu=mu,
      nu=_coordinates.zeros_like(params, nu_dtype),
      hessian_fn_state=estimator.init(params),
      win_rate=jnp.zeros([], jnp.float32),
      nonfinite_count=jnp.zeros([], jnp.int32),
      refresh_count=jnp.zeros([], jnp.int32),
      gamma=None
      if target_win_rate is None
      else jnp.asarray(gamma, jnp.float32),
      negative_fraction=(jnp.zeros([], jnp.float32) if diagnostics else None),
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    loss_scale=None,
    may_refresh=True,
    **extra_args,
  ):
    _checks.given('params', params, 'scale_by_sophia')
    count = jnp.asarray(optax.safe_increment(state.count))
    _checks.dense('The gradient', updates)
    _checks.same_shapes('The gradient', updates, params)
    grads = jax.tree.map(_gradient_of, params, updates)
    mu = jax.tree.map(
      lambda g, m: _ema(b1, g, m),
      _coordinates.unscale(
        _coordinates.widen(_coordinates.split(params, grads)), loss_scale
      ),
      _coordinates.split(params, state.mu),
    )

    # Schedules count the steps before this one, as optax's do.
    scheduled = gamma(state.count) if callable(gamma) else gamma

    def scale(steered):
      return scheduled if target_win_rate is None else steered

    def refresh(old):
      estimate, hessian_fn_state = estimator.update(
        grads,
        old.hessian_fn_state,
        params=params,
        **({} if loss_scale is None else {'loss_scale': loss_scale}),
        **extra_args,
      )
      _checks.same_shapes('The Hessian diagonal estimate', estimate, params)
      _collectives.check_averaged(estimate, old.nu)
      old_nu = _coordinates.split(params, old.nu)
      nu, num_nonfinite = _average_finite(
        b2, _coordinates.split(params, estimate), old_nu, old.win_rate
      )
      steered = old.gamma
      if target_win_rate is not None:
        steered = steer(mu, nu, steered, count, old.win_rate)
      used = (nu, steered) if refresh_before_update else (old_nu, old.gamma)
      ratios = ratios_of(mu, used[0], scale(used[1]), count)
      negative_fraction = old.negative_fraction
      if diagnostics:
        negative_fraction = fraction(is_negative, nu, old.win_rate)
      return old._replace(
        nu=_coordinates.join(old.nu, nu),
        hessian_fn_state=hessian_fn_state,
        win_rate=measure_win_rate(ratios, old.win_rate),
        nonfinite_count=jnp.where(
          num_nonfinite == 0,
          old.nonfinite_count,
          optax.safe_increment(old.nonfinite_count),
        ),
        refresh_count=optax.safe_increment(old.refresh_count),
        gamma=steered,
        negative_fraction=negative_fraction,
      )

    new = jax.lax.cond(
      (state.count % update_interval == 0) & may_refresh,
      refresh,
      lambda old: old,
      state._replace(count=None, mu=None),  # What a refresh has no part in.
    )

    used = new if refresh_before_update else state
    ratios = ratios_of(
      mu, _coordinates.split(params, used.nu), scale(used.gamma), count
    )
    if verbose:
      _print_every(
        print_win_rate_every_n_steps, count, measure_win_rate, ratios
      )
    updates = _coordinates.join(grads, jax.tree.map(clip, ratios))
    return updates, new._replace(
      count=count, mu=_coordinates.join(state.mu, mu)
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def precondition(mu, nu, gamma, eps, decay, count):
  """The update before it is clipped; all trees are coordinates.

  Args:
    mu: m.
    nu: h.
    gamma: Scale of the curvature.
    eps: Smallest denominator.
    decay: That of m, to correct its bias. None means that it is not corrected.
    count: Number t of steps taken.

  Returns:
    The ratios m / max(γ h, ε).
  """
  if decay is not None:
    decay = jnp.asarray(decay, float)
    mu = optax.tree.bias_correction(mu, decay, count.astype(decay.dtype))

  def ratio(m, h):
    h = h.astype(m.dtype)
    return m / jnp.maximum(_cast(gamma, h) * h, _cast(eps, h))

  return jax.tree.map(ratio, mu, nu)


def wins(ratio, clip_threshold):
  """Which coordinates are not clipped."""
  if clip_threshold is None:
    return jnp.full_like(ratio, True, bool)
  return jnp.abs(ratio) < _cast(clip_threshold, ratio)


def is_negative(h):
  return h < 0


def fraction(condition, tree, like):
  """Of the coordinates, over all shards, that meet a condition."""
  met, size = _collectives.sum_over_shards(
    lambda x: _count(condition(x)), tree, like
  )
  return met / max(size, 1.0)


def _count(condition):
  """How often it is true, of any number of entries.

  Exact over the last axes, as many as uint32 can count, and in float32 over the
  others: float32 alone stops at 2^24, int32 at 2^31.
  """
  shape = condition.shape
  axis = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) < 2**32)
  rows = jnp.sum(condition, tuple(range(axis, len(shape))), jnp.uint32)
  return jnp.sum(rows, dtype=jnp.float32)


def _cast(value, like):
  """Gives a hyperparameter with a dtype of its own the one that it meets."""
  if hasattr(value, 'dtype'):
    return jnp.asarray(value, like.dtype)
  return value


def _ema(decay, new, old):
  """Exponential moving average, in the wider dtype of the two.

  The decayed part is a product in the dtype of the average, as in optax.
  """
  dtype = _coordinates.wider(new.dtype, old.dtype)
  decayed = (_cast(decay, old) * old).astype(dtype)
  new = new.astype(dtype)
  return (1 - _cast(decay, new)) * new + decayed


def _average_finite(decay, estimate, old, like):
  """The EMA of an estimate's finite entries; how many leaves have others."""
  estimate = optax.tree.cast_like(estimate, old)

  def average(e, h):
    new = _ema(decay, _coordinates.widen(e), _coordinates.widen(h))
    return jnp.where(jnp.isfinite(e), new.astype(h.dtype), h)

  def is_nonfinite(e):
    largest = jnp.max(jnp.abs(e), initial=0)
    return (~jnp.isfinite(largest)).astype(jnp.float32)

  num_nonfinite, _ = _collectives.sum_over_shards(is_nonfinite, estimate, like)
  return jax.tree.map(average, estimate, old), num_nonfinite


def _gradient_of(param, grad):
  """An integer parameter has none: `jax.grad` gives float0, others guess."""
  if _coordinates.is_differentiable(param):
    return grad
  return jnp.zeros_like(param, dtype=jnp.result_type(param))


def _print_every(n, count, measure_win_rate, ratios):
  """Prints the win rate on every n-th step; n may be an array, 0 is never."""
  if not isinstance(n, jax.Array) and n == 0:
    return
  jax.lax.cond(
    (n > 0) & (count % jnp.maximum(n, 1) == 0),
    lambda r: jax.debug.print(
      'Sophia optimizer win rate: {}', measure_win_rate(r, count)
    ),
    lambda r: None,
    ratios,
  )
