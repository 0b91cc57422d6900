"""How γ is steered to a win rate.

A coordinate wins, that is, is not clipped, if |m̂| < c max(γ h, ε). γ has an
effect on that where h > 0 and |m̂| >= c ε. There the condition is r < γ with
r = |m̂| / (c h), and the fraction w of these coordinates that win is the
distribution function of r at γ.

If log r is logistic with scale s around μ,

  logit w(γ) = (log γ - μ) / s,

and log γ ← log γ + s (logit w* - logit w) reaches the target w* in one step.
Here s is taken as 1/2. If the true scale is larger, each step reduces the
distance by a factor of 1 - 1 / (2 s); down to s = 1/4 the steps do not
oscillate for long. A step is limited to a factor of 4: far from the target w is
0 or 1, which tells the direction but not the distance.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _fractions

_GAIN = 0.5
_LONGEST_STEP = 4.0
# Without these bounds, a target that is out of reach, because too many of the
# other coordinates lose or win, would move γ in one direction without end.
_REACH = (0.1, 0.9)
_FACTORS = (1e-10, 1e10)


def steer(
  factor: jax.Array, target: jax.Array, *, counted: Any, affected: Any, won: Any
) -> jax.Array:
  """Returns the next factor of γ.

  Args:
    factor: The present one, which varies over the axes over which not to sum.
    target: The win rate that is wanted, in (0, 1).
    counted: Tree of booleans: the coordinates that the win rate is of.
    affected: Those on which γ has an effect.
    won: Those that win.
  """

  def outcome(counted, affected, won):  # In one byte, to be read once.
    bits = 1 + 2 * affected.astype(jnp.int8) + 4 * won.astype(jnp.int8)
    return jnp.where(counted, bits, 0)

  def count_outcomes(x):
    return jnp.stack([_fractions.count((x & i) == i) for i in (1, 2, 6, 4)])

  outcomes = jax.tree.map(outcome, counted, affected, won)
  counts = _fractions.sum_over_shards(count_outcomes, outcomes, factor)
  counts = jnp.broadcast_to(counts, 4)  # Of no coordinates it is a number.
  return _steer(factor, target, *(counts[1:] / jnp.maximum(counts[0], 1)))


def _steer(factor, target, affected, affected_won, won):
  """The law; the last three are fractions of the coordinates counted."""
  some = jnp.maximum(affected, jnp.finfo(affected.dtype).tiny)
  others = won - affected_won
  target = jnp.clip((target - others) / some, *_REACH)
  logit = jax.scipy.special.logit
  distance = logit(target) - logit(affected_won / some)
  longest = jnp.log(_LONGEST_STEP)
  step = jnp.clip(_GAIN * distance, -longest, longest)
  # Where γ has no effect on any coordinate, it stays as it is.
  factor *= jnp.exp(jnp.where(affected > 0, step, 0.0))
  return jnp.clip(factor, *_FACTORS)
