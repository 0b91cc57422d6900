"""Adjusts γ so that the win rate reaches a target.

A coordinate wins, that is, is not clipped, if |m̂| < c max(γ h, ε). γ affects
coordinates with h > 0 and |m̂| >= c ε. Such a coordinate wins if r < γ, where
r = |m̂| / (c h). So the fraction w of them that win is the cumulative
distribution function of r at γ.

If log r has a logistic distribution with location μ and scale s, then

  logit w(γ) = (log γ - μ) / s,

and log γ ← log γ + s (logit w* - logit w) reaches the target w* in one step.
This module assumes s = 1/2. If the true scale is larger, each step multiplies
the distance to the target by 1 - 1 / (2 s). Between 1/4 and 1/2 the steps
oscillate, but converge. One step changes γ by at most a factor of 4, because
far from the target w is 0 or 1, which gives the direction but not the distance.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _fractions

_GAIN = 0.5
_LONGEST_STEP = 4.0
# Bounds on the target for the coordinates that γ affects. If too many of the
# others lose or win, the target can't be reached. Without bounds γ would then
# grow or shrink forever.
_TARGETS = (0.1, 0.9)
_FACTORS = (1e-10, 1e10)


def outcome(
  counted: jax.Array, affected: jax.Array, won: jax.Array
) -> jax.Array:
  """Returns a code for the outcome of each coordinate, int8.

  0: not counted; 1: lost; 2: won; 3: affected and lost; 4: affected and won.
  This array takes less memory than the three conditions.

  Args:
    counted: Whether the coordinate counts in the win rate.
    affected: Whether γ affects it.
    won: Whether it wins.
  """
  code = 1 + 2 * affected.astype(jnp.int8) + won.astype(jnp.int8)
  return jnp.where(counted, code, 0)


def steer(factor: jax.Array, target: jax.Array, outcomes: Any) -> jax.Array:
  """Returns the next factor of γ.

  Args:
    factor: The current factor. Axes over which it varies are not summed over.
    target: Target for the win rate, in (0, 1).
    outcomes: Tree of the codes that `outcome` returns.
  """

  def sums(x):
    count = _fractions.count
    missing = target * count(x == 1) + (target - 1) * count(x == 2)
    return jnp.stack([count(x > 2), count(x == 4), missing])

  sums_of_all = _fractions.sum_over_shards(sums, outcomes, factor)
  # Without any coordinates, the sum is a scalar.
  return _steer(factor, target, *jnp.broadcast_to(sums_of_all, 3))


def _steer(factor, target, affected, won, missing):
  """Returns the next factor, given sums over the coordinates.

  Args:
    factor: The current factor of γ.
    target: Target for the win rate of all counted coordinates.
    affected: Number of coordinates that γ affects.
    won: How many of these win.
    missing: Target times the number of the other coordinates, minus the number
      of those that win. The affected ones have to make up for it.
  """
  number = jnp.maximum(affected, 1)
  target = jnp.clip(target + missing / number, *_TARGETS)
  logit = jax.scipy.special.logit
  longest = jnp.log(_LONGEST_STEP)
  distance = logit(target) - logit(won / number)
  step = jnp.clip(_GAIN * distance, -longest, longest)
  # If γ affects no coordinate, it does not change.
  factor *= jnp.exp(jnp.where(affected > 0, step, 0.0))
  return jnp.clip(factor, *_FACTORS)
