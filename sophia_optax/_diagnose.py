"""Diagnostics of Sophia's state for each module of a model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _fractions


class ModuleDiagnosis(NamedTuple):
  """Result of :func:`diagnose` for one module.

  Every field has shape () and dtype float32.

  Attributes:
    win_rate: Fraction of coordinates that were not clipped at the last refresh.
    negative_fraction: Fraction of coordinates with negative h after the last
      refresh.
    nonfinite_fraction: Fraction of coordinates whose m or h is NaN or infinite.
    curvature_norm: Euclidean norm of h.
  """

  win_rate: jax.Array
  negative_fraction: jax.Array
  nonfinite_fraction: jax.Array
  curvature_norm: jax.Array


def diagnose(
  state: optax.OptState, *, depth: int = 1
) -> dict[str, ModuleDiagnosis]:
  r"""Measures win rate and curvature in the state of Sophia, for each module.

  .. math::
    \text{win rate} = \frac{1}{n} \left| \left\{ i : \left|
    \frac{\hat m_i}{\max(\gamma h_i, \epsilon)} \right| < c \right\} \right|,
    \qquad \text{negative fraction} =
    \frac{1}{n} \left| \left\{ i : h_i < 0 \right\} \right|

  over the n coordinates of a module. The optimizer measures the win rate of
  each parameter array at each refresh. This function averages it over the
  arrays of a module, and computes the other figures from the current m and h.
  Call it when you log, inside or outside of :func:`jax.jit`.

  The win rate of the whole model is also in the state. Read it with
  ``optax.tree.get(state, 'win_rate')``; other names are 'refresh_count',
  'nonfinite_count' and, with ``target_win_rate``, 'gamma_factor'.

  Args:
    state: An optimizer state with one :class:`SophiaState`, from an optimizer
      with ``diagnostics=True``. If it has an axis of replicas, as from
      :func:`jax.pmap`, pass the state of one of them.
    depth: Number of keys, from the root of the parameters, that identify a
      module: 2 for Flax's ``{'params': {'Dense_0': ...}}``, and 0 for the whole
      model as one module, whose name is ''.

  Returns:
    A :class:`ModuleDiagnosis` for each module, by name. If the parameters are a
    single array, its name is ''. Before the first refresh, win rate, negative
    fraction and norm are 0.

  Raises:
    ValueError: If ``state`` has no :class:`SophiaState`, if the optimizer does
      not have ``diagnostics=True``, if ``state`` has an axis of replicas, or if
      ``depth`` is negative.
    KeyError: If ``state`` has several :class:`SophiaState`.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> params = {'convex': jnp.ones(2), 'saddle': jnp.ones(2)}
    >>> def loss_fn(p):
    ...   signs = jnp.array([1.0, -1.0])
    ...   return jnp.sum(p['convex']**2) + jnp.sum(signs * p['saddle']**2)
    >>> tx = sophia_optax.sophia(
    ...     0.1, gamma=2.0, b2=0.0, refresh_before_update=True,
    ...     diagnostics=True)
    >>> grads = jax.grad(loss_fn)(params)
    >>> _, state = tx.update(grads, tx.init(params), params, obj_fn=loss_fn)
    >>> for name, found in sophia_optax.diagnose(state).items():
    ...   print(name, found.win_rate, found.negative_fraction)
    convex 1.0 0.0
    saddle 0.5 0.5
  """
  sophia = optax.tree.get(state, 'SophiaState')
  if sophia is None or sophia.by_leaf is None or sophia.by_leaf.ndim != 1:
    raise ValueError(
      'diagnose needs the state of one replica, from an optimizer with'
      ' diagnostics=True. Pass diagnostics=True to the optimizer. Take one'
      ' replica of a mapped state, as in jax.tree.map(lambda x: x[0], state).'
    )
  depth = _checks.whole_number('depth', depth, 0)

  modules: dict[str, list[tuple[Any, ...]]] = {}
  mu, nu = jax.tree.leaves_with_path(sophia.mu), jax.tree.leaves(sophia.nu)
  for (path, m), h, win_rate in zip(mu, nu, sophia.by_leaf, strict=True):
    name = jax.tree_util.keystr(path[:depth], simple=True, separator='/')
    modules.setdefault(name, []).append((m, h, win_rate))
  return {name: _diagnose(leaves) for name, leaves in modules.items()}


def _diagnose(leaves):
  """Diagnoses one module, from (m, h, win rate) of each parameter array."""
  mu, nu, win_rates = map(list, zip(*leaves, strict=True))
  like = win_rates[0]
  mu, nu = _coordinates.split(mu, mu), _coordinates.split(mu, nu)
  nu = _coordinates.widen(nu)
  sizes = jnp.array([_fractions.size(h, like) for h in nu], jnp.float32)
  is_finite = lambda m, h: jnp.isfinite(m) & jnp.isfinite(h)
  squares = _fractions.sum_over_shards(
    lambda h: jnp.sum(jnp.square(h), dtype=jnp.float32), like, nu
  )
  return ModuleDiagnosis(
    win_rate=sizes @ jnp.stack(win_rates) / jnp.maximum(jnp.sum(sizes), 1),
    negative_fraction=_fractions.fraction(lambda h: h < 0, nu, like),
    nonfinite_fraction=_fractions.fraction(
      jnp.logical_not, jax.tree.map(is_finite, mu, nu), like
    ),
    curvature_norm=jnp.sqrt(squares),
  )
