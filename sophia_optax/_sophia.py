"""`scale_by_sophia`: the update rule as an optax transformation.

A step computes g -> m -> (every k steps: estimator -> ĥ -> h) -> u. `_rule` has
the symbols and the formulas, `_refresh` the step in parentheses.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _hutchinson
from sophia_optax import _refresh
from sophia_optax import _rule
from sophia_optax import _win_rate


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
    by_leaf: Win rate of each parameter array, in the order of
      ``jax.tree.leaves``, shape (number of arrays,), float32. None without
      ``diagnostics``.
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
  arguments. An array is the condition of a :func:`jax.lax.cond`.

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
    diagnostics: Whether each refresh also measures the win rate of each
      parameter array, for :func:`sophia_optax.diagnose`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`SophiaState`. Its ``update`` needs ``params`` and the extra
    arguments of the estimator. Updates have the dtypes of the gradients.

  Raises:
    ValueError: If a hyperparameter is out of range, unless it is an array. In
      ``update``, if ``params`` is missing, if the gradient or the estimate is
      not a tree like it, or if ``loss_scale`` is passed and the estimator does
      not divide by it.
    TypeError: In ``update``, if a gradient is complex and its parameter is not,
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
  rule = _rule.Rule(
    b1=b1,
    b2=b2,
    eps=eps,
    gamma=gamma,
    clip_threshold=clip_threshold,
    bias_correction=bias_correction,
    nu_bias_correction=nu_bias_correction,
    nesterov=nesterov,
    adam_b2=adam_b2,
  )
  interval = _checks.whole_number('update_interval', update_interval, 1)
  print_interval = _checks.whole_number(
    'print_win_rate_every_n_steps', print_win_rate_every_n_steps, 0
  )
  is_steered = target_win_rate is not None
  if is_steered:
    _checks.fraction('target_win_rate', target_win_rate)
    _check_steerable(rule)
  estimator = optax.with_extra_args_support(hessian_diagonal_fn)

  def init_fn(params):
    mu = optax.tree.zeros_like(params)
    if mu_dtype is not None:
      mu = _coordinates.zeros_like(params, mu_dtype)
    num_leaves = len(jax.tree.leaves(params))
    second_moment = None if adam_b2 is None else _coordinates.zeros_like(params)
    return SophiaState(
      count=jnp.zeros([], jnp.int32),
      mu=mu,
      nu=_coordinates.zeros_like(params, nu_dtype),
      hessian_fn_state=estimator.init(params),
      win_rate=jnp.zeros([], jnp.float32),
      nonfinite_count=jnp.zeros([], jnp.int32),
      refresh_count=jnp.zeros([], jnp.int32),
      gamma_factor=jnp.ones([], jnp.float32) if is_steered else None,
      by_leaf=jnp.zeros(num_leaves, jnp.float32) if diagnostics else None,
      second_moment=second_moment,
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
    _checks.same_shapes('The gradient', updates, params)
    _check_options(state, adam_b2, target_win_rate, diagnostics)
    if loss_scale is not None:
      extra_args['loss_scale'] = loss_scale
    updates = jax.tree.map(_gradient_of, params, updates)
    grads = _coordinates.widen(_coordinates.split(params, updates))
    grads = _coordinates.unscale(grads, loss_scale)
    before = _map_moments(lambda x: _coordinates.split(params, x), state)
    old = rule.accumulate(before, grads)
    due = _refresh.is_due(state.count, interval, refresh, may_refresh)
    inputs = updates, params
    if due is True:
      # Makes the estimate wait for the gradient. Without a conditional, XLA may
      # compute both at the same time, with the activations of both in memory.
      # The update does not wait: XLA for TPUs would then need more memory.
      inputs = jax.lax.optimization_barrier(inputs)

    # The only fork in the flow of data: the h that the update uses.
    choose = lambda old, new: new if refresh_before_update else old

    def refreshed(old):
      if refresh_before_update:
        # Recompute m here. If the conditional used the m from outside, XLA
        # would write it to memory before the conditional on every step.
        old = old._replace(mu=rule.mean_gradient(before.mu, grads))
      estimate, estimator_state = _estimate(estimator, old, *inputs, extra_args)
      new = _refresh.average(rule, old, estimate)
      new = new._replace(hessian_fn_state=estimator_state)
      if is_steered:
        factor = _win_rate.steer(rule, new, grads, target_win_rate)
        new = new._replace(gamma_factor=factor)
      used = choose(old, new)
      new = new._replace(win_rate=_win_rate.measure(rule, used, grads))
      if diagnostics:
        by_leaf = _win_rate.measure_by_leaf(rule, used, grads, params)
        new = new._replace(by_leaf=by_leaf)
      return new

    new = _refresh.when(due, refreshed, old)
    used = choose(old, new)
    if verbose:
      _win_rate.print_every(rule, used, grads, _refresh.whole(print_interval))
    updates = _coordinates.join(updates, rule.update(used, grads))
    return updates, _map_moments(_coordinates.join, state, new)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _map_moments(fn, *states):
  """Returns the last state with `fn` of m, of h and, if there is a v, of v."""
  moments = {
    name: fn(*(getattr(state, name) for state in states))
    for name in ('mu', 'nu', 'second_moment')
    if getattr(states[0], name) is not None
  }
  return states[-1]._replace(**moments)


def _estimate(estimator, state, grads, params, extra_args):
  """Returns the coordinates of an estimate, and the estimator's next state."""
  estimates = functools.partial(
    estimator.update, grads, state.hessian_fn_state, params
  )
  if 'loss_scale' in extra_args:
    _check_unscaled(estimates, **extra_args)
  estimate, estimator_state = estimates(**extra_args)
  _checks.same_shapes('The Hessian diagonal estimate', estimate, params)
  estimate = _coordinates.split(params, estimate)
  _checks.averaged(estimate, state.nu)
  return estimate, estimator_state


def _check_options(state, adam_b2, target_win_rate, diagnostics):
  """Raises unless the state has a field for each option, and no other."""
  for field, option, value in (
    ('second_moment', 'adam_b2', adam_b2),
    ('gamma_factor', 'target_win_rate', target_win_rate),
    ('by_leaf', 'diagnostics', diagnostics or None),
  ):
    found = getattr(state, field)
    if (value is None) != (found is None):
      raise ValueError(
        f'{option}={value!r} does not fit the state, whose {field} is'
        f' {"None" if found is None else "not None"}. To change an option of a'
        ' running job, copy the fields that stay into a new state:'
        ' optax.tree.set(tx.init(params), count=..., mu=..., nu=...).'
      )


def _check_steerable(rule):
  """Raises if no γ can change the win rate."""
  is_zero = np.isscalar(rule.gamma) and rule.gamma == 0
  if is_zero or rule.clip_threshold is None:
    raise ValueError(
      'target_win_rate needs gamma greater than 0 and a clip_threshold, got'
      f' gamma={rule.gamma!r} and clip_threshold={rule.clip_threshold!r}. Pass'
      ' both, or leave target_win_rate out.'
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


def _check_unscaled(estimates, loss_scale, **extra_args):
  """Raises if an estimator does not use `loss_scale`, so can't divide by it."""
  jaxpr = jax.make_jaxpr(
    lambda scale: estimates(loss_scale=scale, **extra_args)[0]
  )(loss_scale).jaxpr
  if not any(jaxpr.invars[0] in equation.invars for equation in jaxpr.eqns):
    raise ValueError(
      'loss_scale needs an estimator that divides its estimate by it, got one'
      ' that ignores it. Write the estimator with'
      ' sophia_optax.sampled_estimator, or divide by the argument loss_scale of'
      ' its update. Or unscale the gradients before the optimizer, and pass'
      ' neither loss_scale nor a scaled obj_fn.'
    )
