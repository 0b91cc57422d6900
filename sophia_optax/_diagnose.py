"""What Sophia's state looks like inside, module by module."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates
from sophia_optax import _sophia


class ModuleDiagnosis(NamedTuple):
  """What :func:`diagnose` finds in one module; each has shape (), float32.

  Attributes:
    win_rate: Fraction of coordinates that m and h leave unclipped.
    negative_fraction: Fraction of coordinates whose entry of h is negative.
    nonfinite_fraction: Fraction of coordinates whose m or h is NaN or infinite.
    curvature_norm: Euclidean norm of h.
  """

  win_rate: jax.Array
  negative_fraction: jax.Array
  nonfinite_fraction: jax.Array
  curvature_norm: jax.Array


def diagnose(
  state: optax.OptState,
  *,
  b1: jax.typing.ArrayLike = 0.965,
  eps: jax.typing.ArrayLike = 1e-8,
  gamma: optax.ScalarOrSchedule = 0.01,
  clip_threshold: jax.typing.ArrayLike | None = 1.0,
  bias_correction: bool = True,
  depth: int = 1,
) -> dict[str, ModuleDiagnosis]:
  r"""Looks into the state of Sophia, one module at a time.

  .. math::
    \text{win rate} = \frac{1}{n} \left| \left\{ i : \left|
    \frac{\hat m_i}{\max(\gamma h_i, \epsilon)} \right| < c \right\} \right|,
    \qquad \text{negative fraction} =
    \frac{1}{n} \left| \left\{ i : h_i < 0 \right\} \right|

  with the m and h that the last step left, over the n coordinates of a module:
  a pure function, to be called when there is something to log, also under
  :func:`jax.jit`. What concerns all modules is in the state itself:
  ``optax.tree.get(state, name)`` for the names 'win_rate', 'refresh_count',
  'nonfinite_count', with ``target_win_rate`` 'gamma', and with
  ``diagnostics=True`` 'negative_fraction'.

  Args:
    state: Any optimizer state with one :class:`SophiaState` in it.
    b1: As given to the optimizer, like the following ones. For ``sophia_g``
      that is ``gamma=rho, eps=1e-15, bias_correction=False``.
    eps: Smallest denominator.
    gamma: Scale of the curvature; of no consequence where it is in the state.
    clip_threshold: Largest magnitude c of an update. None means no clipping.
    bias_correction: Whether m is corrected for its start at zero.
    depth: Number of keys, from the top of the parameters down, that name a
      module: 2 for Flax's ``{'params': {'Dense_0': ...}}``.

  Returns:
    A :class:`ModuleDiagnosis` for each module, by name.

  Raises:
    ValueError: If there is no :class:`SophiaState` or more than one, or
      ``depth`` is less than 1.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> params = {'convex': jnp.ones(2), 'saddle': jnp.ones(2)}
    >>> def loss_fn(p):
    ...   signs = jnp.array([1.0, -1.0])
    ...   return jnp.sum(p['convex']**2) + jnp.sum(signs * p['saddle']**2)
    >>> tx = sophia_optax.sophia(0.1, gamma=2.0, b2=0.0)
    >>> grads = jax.grad(loss_fn)(params)
    >>> _, state = tx.update(grads, tx.init(params), params, obj_fn=loss_fn)
    >>> for name, found in sophia_optax.diagnose(state, gamma=2.0).items():
    ...   print(name, found.win_rate, found.negative_fraction)
    convex 1.0 0.0
    saddle 0.5 0.5
  """
  is_sophia = lambda x: isinstance(x, _sophia.SophiaState)
  found = [s for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)]
  if len(found) != 1:
    raise ValueError(
      'state must hold one SophiaState, got one that holds'
      f' {len(found)}. Pass the state of an optimizer with Sophia in it, or'
      ' the part of it that you mean.'
    )
  (sophia,) = found
  depth = _checks.whole_number('depth', depth, at_least=1)
  scale = gamma(sophia.count - 1) if callable(gamma) else gamma
  if sophia.gamma is not None:
    scale = sophia.gamma

  modules: dict[str, list[tuple[Any, Any]]] = {}
  paths, nu = jax.tree.leaves_with_path(sophia.mu), jax.tree.leaves(sophia.nu)
  for (path, m), h in zip(paths, nu, strict=True):
    name = jax.tree_util.keystr(path[:depth], simple=True, separator='/')
    modules.setdefault(name, []).append((m, h))

  def look_into(leaves):
    like = [m for m, _ in leaves]
    mu = _coordinates.widen(_coordinates.split(like, like))
    nu = _coordinates.split(like, [h for _, h in leaves])

    def fraction(condition, tree):
      return _sophia.fraction(condition, tree, sophia.count)

    def is_finite(m, h):
      return jnp.isfinite(m) & jnp.isfinite(h)

    squares, _ = _collectives.sum_over_shards(
      lambda h: jnp.sum(jnp.square(h), dtype=jnp.float32), nu, sophia.count
    )
    decay = b1 if bias_correction else None
    return ModuleDiagnosis(
      win_rate=fraction(
        lambda ratio: _sophia.wins(ratio, clip_threshold),
        _sophia.precondition(mu, nu, scale, eps, decay, sophia.count),
      ),
      negative_fraction=fraction(_sophia.is_negative, nu),
      nonfinite_fraction=fraction(
        lambda finite: ~finite, jax.tree.map(is_finite, mu, nu)
      ),
      curvature_norm=jnp.sqrt(squares),
    )

  return {name: look_into(leaves) for name, leaves in modules.items()}
