"""The win rate: measures it, prints it, and steers γ to a target.

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
from sophia_optax import _refresh
from sophia_optax import _rule

_GAIN = 0.5
_LONGEST_STEP = 4.0
# Bounds on the target for the coordinates that γ affects. If too many of the
# others lose or win, the target can't be reached. Without bounds γ would then
# grow or shrink forever.
_TARGETS = (0.1, 0.9)
_FACTORS = (1e-10, 1e10)


def measure(rule: _rule.Rule, state: Any, grads: Any) -> jax.Array:
  """Returns the win rate, float32."""
  # `fraction` reads one leaf at a time, so not all ratios are in memory.
  ratios = rule.ratios(state, grads)
  return _fractions.fraction(rule.wins, ratios, state.count)


def measure_by_leaf(
  rule: _rule.Rule, state: Any, grads: Any, params: Any
) -> jax.Array:
  """Returns the win rate of each array in `params`, float32."""
  fractions = jax.tree.map(
    lambda _, ratio: _fractions.fraction(rule.wins, ratio, state.count),
    params,
    rule.ratios(state, grads),
  )
  return jnp.array(jax.tree.leaves(fractions), jnp.float32)


def print_every(rule: _rule.Rule, state: Any, grads: Any, n: Any):
  """Prints the win rate every n steps; never if n is 0. n may be an array."""
  if not isinstance(n, jax.Array) and n == 0:
    return
  _refresh.conditional(
    (n > 0) & (state.count % jnp.maximum(n, 1) == 0),
    lambda _: jax.debug.print(
      'Sophia optimizer win rate: {}', measure(rule, state, grads)
    ),
    None,
  )


def steer(rule: _rule.Rule, state: Any, grads: Any, target: Any) -> jax.Array:
  """Returns the next `gamma_factor`, which brings the win rate to the target.

  Axes over which the current factor varies are not summed over.
  """

  def counts(g, m, h, ratio):
    # Without a gradient m decays to 0, and the coordinate wins at any γ.
    counted = (g != 0) & jnp.isfinite(ratio)
    affected, won = rule.feels_gamma(m, h), rule.wins(ratio)
    # XLA for TPUs writes this array once and reads it for every count. It would
    # read all the trees for each of four conditions.
    outcome = 1 + 2 * affected.astype(jnp.int8) + won.astype(jnp.int8)
    outcome = jnp.where(counted, outcome, 0)
    return jnp.stack([_fractions.count(outcome == i) for i in (1, 2, 3, 4)])

  sums = _fractions.sum_over_shards(
    counts,
    state.gamma_factor,
    grads,
    state.mu,
    state.nu,
    rule.ratios(state, grads),
  )
  # Without any coordinates, the sum is a scalar.
  sums = jnp.broadcast_to(sums, 4)
  return next_factor(state.gamma_factor, jnp.asarray(target, sums.dtype), *sums)


def next_factor(
  factor: jax.Array,
  target: jax.Array,
  others_lost: jax.Array,
  others_won: jax.Array,
  lost: jax.Array,
  won: jax.Array,
) -> jax.Array:
  """Returns the next factor of γ.

  Args:
    factor: The current factor.
    target: Target for the win rate of all coordinates, in (0, 1).
    others_lost: Number of coordinates that γ does not affect and that lose.
    others_won: Number of those that win.
    lost: Number of coordinates that γ affects and that lose.
    won: Number of those that win.
  """
  affected = lost + won
  number = jnp.maximum(affected, 1)
  # The affected coordinates make up for what the others lack.
  missing = target * (others_lost + others_won) - others_won
  target = jnp.clip(target + missing / number, *_TARGETS)
  logit = jax.scipy.special.logit
  longest = jnp.log(_LONGEST_STEP)
  distance = logit(target) - logit(won / number)
  step = jnp.clip(_GAIN * distance, -longest, longest)
  # If γ affects no coordinate, it does not change.
  factor *= jnp.exp(jnp.where(affected > 0, step, 0.0))
  return jnp.clip(factor, *_FACTORS)
