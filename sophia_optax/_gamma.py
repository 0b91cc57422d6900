"""The law by which γ is steered to a win rate.

A coordinate wins, that is, is not clipped, if |m̂| < c max(γ h, ε). Where h is
positive that is r = |m̂| / (c h) < γ, and the fraction w of these coordinates
that win is the distribution function of r at γ. Elsewhere γ has no say.

If log r is logistic with scale s around μ,

  logit w(γ) = (log γ - μ) / s,

and log γ ← log γ + s (logit w* - logit w) is the target in one step. Here s is
taken for 1/2. If it is larger, what is left of the distance shrinks with every
step by a factor of 1 - 1 / (2 s); down to s = 1/4 nothing oscillates for long.
A step by more than a factor of 4 is cut off there: far away w is 0 or 1, which
says the direction and no distance.
"""

import jax
import jax.numpy as jnp

_GAIN = 0.5
_LONGEST_STEP = 4.0
# A target that the coordinates with positive curvature can't reach, because too
# many others lose, or win, would drive γ away forever. It stays between these.
_REACH = (0.1, 0.9)


def steer(
  gamma: jax.Array,
  target: jax.Array,
  positive: jax.Array,
  positive_won: jax.Array,
  won: jax.Array,
) -> jax.Array:
  """Returns the next γ.

  Args:
    gamma: The present one.
    target: The win rate that is wanted, in (0, 1).
    positive: Fraction of coordinates whose curvature is positive.
    positive_won: Fraction of those, among all, that also win.
    won: Fraction that wins: the win rate.
  """
  some = jnp.maximum(positive, jnp.finfo(positive.dtype).tiny)
  others = won - positive_won
  target = jnp.clip((target - others) / some, *_REACH)
  logit = jax.scipy.special.logit
  distance = logit(target) - logit(positive_won / some)
  longest = jnp.log(_LONGEST_STEP)
  step = jnp.clip(_GAIN * distance, -longest, longest)
  # Without positive curvature there is nothing to learn.
  return gamma * jnp.exp(jnp.where(positive > 0, step, 0.0))
