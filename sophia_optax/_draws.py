"""Random draws: where their key comes from, and averages over several."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_key(random_seed: Any | None) -> jax.Array:
  """Returns a key that belongs to the caller alone, so that it may be donated.

  Args:
    random_seed: An integer, a raw or a typed PRNG key. None means 0.
  """
  if random_seed is None:
    random_seed = 0
  dtype = getattr(random_seed, 'dtype', np.result_type(type(random_seed)))
  if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    if not jnp.issubdtype(dtype, jnp.integer):
      raise TypeError(
        'random_seed must be an integer or a PRNG key, got'
        f' {random_seed!r}. Pass for example random_seed=0 or'
        ' random_seed=jax.random.key(0).'
      )
    if np.ndim(random_seed) == 0:
      return jax.random.PRNGKey(random_seed)
  return jnp.copy(random_seed)


def average_over_draws(
  draw: Callable[[jax.Array], Any],
  like: Any,
  key: jax.Array,
  num_samples: int,
) -> Any:
  """Averages `draw(key)` over `num_samples` keys, holding one draw at a time.

  Args:
    draw: Takes a PRNG key, returns a tree of floating point arrays.
    like: A tree of the same structure, shapes and dtypes.
    key: Is used as it is for one draw, and split for several.
    num_samples: Number of draws.
  """
  if num_samples == 1:
    return draw(key)

  def add_draw(total, subkey):
    return optax.tree.add(total, draw(subkey)), None

  total = optax.tree.zeros_like(like)
  total, _ = jax.lax.scan(add_draw, total, jax.random.split(key, num_samples))
  return optax.tree.scale(1 / num_samples, total)
