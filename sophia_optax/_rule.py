"""Sophia's formulas: momentum divided by the curvature, then clipped.

Symbols, all shaped like the parameters θ:

  g       gradient
  m, mu   EMA of g with decay b1; m̂ = m / (1 - b1^t)
  ĥ       one estimate of the Hessian diagonal, from the estimator
  h, nu   EMA of ĥ with decay b2, refreshed every k = update_interval steps
  u       clip(m̂ / max(γ h, ε), -c, c), the update
  v       EMA of g² with decay adam_b2; with it √v̂ is also in the maximum

Trees hold real coordinates, see `_coordinates`. A state is a `SophiaState` of
such trees.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Rule:
  """The hyperparameters of `scale_by_sophia`, and the formulas with them."""

  b1: Any
  b2: Any
  eps: Any
  gamma: Any
  clip_threshold: Any
  bias_correction: bool
  nu_bias_correction: bool
  nesterov: bool
  adam_b2: Any

  def __post_init__(self):
    _checks.decay('b1', self.b1)
    _checks.decay('b2', self.b2)
    _checks.positive('eps', self.eps)
    _checks.number_or_schedule('gamma', self.gamma, at_least=0)
    if self.clip_threshold is not None:
      _checks.positive('clip_threshold', self.clip_threshold)
    if self.adam_b2 is not None:
      _checks.decay('adam_b2', self.adam_b2)

  def mean_gradient(self, mu: Any, grads: Any) -> Any:
    """Returns the next m."""
    return jax.tree.map(lambda g, m: ema(self.b1, g, m), grads, mu)

  def accumulate(self, state: Any, grads: Any) -> Any:
    """Returns the state of the next step: m and v include g, h is as it was."""
    mu, second_moment = self.mean_gradient(state.mu, grads), None
    if self.adam_b2 is not None:
      second_moment = jax.tree.map(
        lambda g, v: ema(self.adam_b2, jnp.square(g).astype(v.dtype), v),
        grads,
        state.second_moment,
      )
    count = optax.safe_increment(state.count)
    return state._replace(count=count, mu=mu, second_moment=second_moment)

  def curvature(self, nu: Any, estimate: Any) -> Any:
    """Returns the next h, which is not finite where the estimate is not."""

    def average(e, h):
      return ema(self.b2, e, _coordinates.widen(h)).astype(h.dtype)

    return jax.tree.map(average, estimate, nu)

  def momentum(self, state: Any, grads: Any) -> Any:
    """Returns m̂, or with Nesterov momentum the m̂ one step ahead."""

    def corrected(tree, count):
      if not self.bias_correction:
        return tree
      return _bias_corrected(tree, self.b1, count)

    if not self.nesterov:
      return corrected(state.mu, state.count)
    ahead = corrected(state.mu, optax.safe_increment(state.count))
    grads = corrected(grads, state.count)
    return jax.tree.map(lambda g, m: ema(self.b1, g, m), grads, ahead)

  def scale(self, state: Any) -> Any:
    """Returns γ, times `gamma_factor` and divided by the correction of h."""
    # As in optax, schedules get the number of steps before this one.
    gamma = self.gamma(state.count - 1) if callable(self.gamma) else self.gamma
    if state.gamma_factor is not None:
      gamma = jnp.asarray(gamma, jnp.float32) * state.gamma_factor
    if self.nu_bias_correction:  # h occurs only in γ h.
      num_refreshes = jnp.maximum(state.refresh_count, 1).astype(jnp.float32)
      correction = 1 - jnp.asarray(self.b2, jnp.float32) ** num_refreshes
      gamma = jnp.asarray(gamma, jnp.float32) / correction
    return gamma

  def ratios(self, state: Any, grads: Any, *bounds: Any) -> Any:
    """Returns m̂ / max(γ h, ε). Trees of other lower bounds may follow."""
    gamma = self.scale(state)

    def ratio(m, h, *bounds):
      h = h.astype(m.dtype)
      denominator = jnp.maximum(_cast(gamma, h) * h, _cast(self.eps, h))
      for bound in bounds:
        denominator = jnp.maximum(denominator, bound.astype(m.dtype))
      return m / denominator

    return jax.tree.map(ratio, self.momentum(state, grads), state.nu, *bounds)

  def update(self, state: Any, grads: Any) -> Any:
    """Returns u."""
    bounds = []
    if self.adam_b2 is not None:
      v = _bias_corrected(state.second_moment, self.adam_b2, state.count)
      # At 0 the derivative of a square root is infinite.
      positive = lambda v: jnp.maximum(v, jnp.finfo(v.dtype).tiny)
      bounds.append(jax.tree.map(lambda v: jnp.sqrt(positive(v)), v))

    def clip(ratio):
      if self.clip_threshold is None:
        return ratio
      c = _cast(self.clip_threshold, ratio)
      return jnp.clip(ratio, -c, c)

    return jax.tree.map(clip, self.ratios(state, grads, *bounds))

  def wins(self, ratio: jax.Array) -> jax.Array:
    """Returns where an update without v is not clipped."""
    if self.clip_threshold is None:
      return jnp.full_like(ratio, True, bool)
    return jnp.abs(ratio) < _cast(self.clip_threshold, ratio)

  def feels_gamma(self, m: jax.Array, h: jax.Array) -> jax.Array:
    """Returns where γ decides whether an update is clipped."""
    # Uses m, because m̂ would be kept in memory. It matters only near ε.
    floor = _cast(self.clip_threshold, m) * _cast(self.eps, m)
    return (h > 0) & (jnp.abs(m) >= floor)


def ema(decay: Any, new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns the next exponential moving average, in the wider dtype.

  As in optax, `decay * old` is computed in the dtype of `old`.
  """
  dtype = _coordinates.wider(new.dtype, old.dtype)
  decayed = (_cast(decay, old) * old).astype(dtype)
  new = new.astype(dtype)
  return (1 - _cast(decay, new)) * new + decayed


def _bias_corrected(tree, decay, count):
  """Divides by 1 - decay^count. The decay may be an array of any dtype."""
  decay = jnp.asarray(decay, float)
  return optax.tree.bias_correction(tree, decay, count.astype(decay.dtype))


def _cast(value, like):
  """Casts an array hyperparameter to the dtype of the operand."""
  return jnp.asarray(value, like.dtype) if hasattr(value, 'dtype') else value
