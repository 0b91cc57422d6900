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
# Bounds of the target of the coordinates on which γ has an effect. Without them
# a target that is out of reach, because too many of the others lose or win,
# would move γ in one direction without end.
_TARGETS = (0.1, 0.9)
_FACTORS = (1e-10, 1e10)


def outcome(
  counted: jax.Array, affected: jax.Array, won: jax.Array
) -> jax.Array:
  """Returns the outcome of coordinates, int8.

  0 is not counted, 1 lost, 2 won, 3 and 4 are lost and won where γ has an
  effect. One array of bytes is smaller than three conditions.

  Args:
    counted: Whether the win rate is also that of this coordinate.
    affected: Whether γ has an effect on it.
    won: Whether it wins.
  """
  code = 1 + 2 * affected.astype(jnp.int8) + won.astype(jnp.int8)
  return jnp.where(counted, code, 0)


def steer(factor: jax.Array, target: jax.Array, outcomes: Any) -> jax.Array:
  """Returns the next factor of γ.

  Args:
    factor: The present one, which varies over the axes over which not to sum.
    target: The win rate that is wanted, in (0, 1).
    outcomes: Tree of the outcomes of the coordinates.
  """

  def sums(x):
    missing = jnp.where(x == 1, target, jnp.where(x == 2, target - 1, 0))
    count = _fractions.count
    return jnp.stack([count(x > 2), count(x == 4), jnp.sum(missing)])

  sums_of_all = _fractions.sum_over_shards(sums, outcomes, factor)
  # Of no coordinates at all it is a number.
  return _steer(factor, target, *jnp.broadcast_to(sums_of_all, 3))


def _steer(factor, target, affected, won, missing):
  """The law, given how many coordinates are affected and how many of these won.

  `missing` is the target times the number of the other coordinates, minus the
  number of these that won: what the affected ones have to win in addition.
  """
  number = jnp.maximum(affected, 1)
  target = jnp.clip(target + missing / number, *_TARGETS)
  logit = jax.scipy.special.logit
  longest = jnp.log(_LONGEST_STEP)
  distance = logit(target) - logit(won / number)
  step = jnp.clip(_GAIN * distance, -longest, longest)
  # Where γ has no effect on any coordinate, it stays as it is.
  factor *= jnp.exp(jnp.where(affected > 0, step, 0.0))
  return jnp.clip(factor, *_FACTORS)
