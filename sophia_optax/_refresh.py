"""When h is refreshed, and how an estimate gets into it.

A refresh adds an estimate ĥ of the Hessian diagonal to h. It happens on steps
0, k, 2k, ..., or when the caller decides. Entries that are not finite never get
into h.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any

import jax
from jax import custom_batching
import jax.numpy as jnp
import optax

from sophia_optax import _coordinates
from sophia_optax import _fractions
from sophia_optax import _rule


def is_due(count: jax.Array, interval: Any, refresh: Any, may: Any) -> Any:
  """Returns whether to refresh; a bool unless it depends on a traced value.

  Args:
    count: Number of steps before this one.
    interval: Number of steps from one refresh to the next.
    refresh: The caller's decision. None means that the count decides.
    may: Whether a refresh is possible on this step.
  """
  if refresh is None:
    refresh = count % whole(interval) == 0
  conditions = list(map(known, (refresh, may)))
  traced = [c for c in conditions if not isinstance(c, bool)]
  is_excluded = any(c is False for c in conditions)
  return not is_excluded and functools.reduce(operator.and_, traced, True)


def known(condition: Any) -> Any:
  """Returns a bool unless the condition is traced.

  Outside of `jit`, a conditional of JAX would compile its branches in each
  call.
  """
  if isinstance(condition, jax.core.Tracer):
    return condition
  return bool(condition)


def whole(value: Any) -> Any:
  """Casts an array hyperparameter to int32: counts need its precision."""
  if hasattr(value, 'dtype'):
    return jnp.round(value).astype(jnp.int32)
  return value


def when(due: Any, refreshed: Callable[[Any], Any], state: Any) -> Any:
  """Returns `refreshed(state)` if a refresh is due, else `state`.

  The count, m and v bypass the conditional, which would copy them. Do not
  compute anything from them before it, such as m̂: XLA would keep that in memory
  for both branches.
  """
  names = 'count', 'mu', 'second_moment'
  rest = {name: getattr(state, name) for name in names}
  without = dict.fromkeys(rest)

  def branch(state):
    return refreshed(state._replace(**rest))._replace(**without)

  return conditional(due, branch, state._replace(**without))._replace(**rest)


def conditional(condition: Any, branch: Callable[[Any], Any], x: Any) -> Any:
  """Returns `branch(x)` if the condition holds, else x.

  With a batched condition, `vmap` would compute the branch on every step. Here
  the members of a `vmap` decide together: the branch is computed if the
  condition holds for any of them, and each member selects its result.
  """
  condition = known(condition)
  if isinstance(condition, bool):
    return branch(x) if condition else x

  def selected(x):
    own = _own_condition(condition)
    select = lambda new, old: jnp.where(own, new, old)
    return jax.tree.map(select, branch(x), x)

  return jax.lax.cond(_any_condition(condition), selected, lambda x: x, x)


@custom_batching.custom_vmap
def _any_condition(condition):
  """Returns the condition, and under `vmap` whether it holds for any member."""
  return condition


@_any_condition.def_vmap
def _(axis_size, in_batched, conditions):
  del axis_size, in_batched
  return _any_condition(jnp.any(conditions)), False


@custom_batching.custom_vmap
def _own_condition(condition):
  """Returns True, and under `vmap` the condition of the member."""
  return jnp.ones_like(condition)


@_own_condition.def_vmap
def _(axis_size, in_batched, conditions):
  del axis_size, in_batched
  return conditions, True


def average(rule: _rule.Rule, state: Any, estimate: Any) -> Any:
  """Adds an estimate to h, except where h would not be finite."""
  estimate = optax.tree.cast_like(estimate, _coordinates.widen(state.nu))
  nu = rule.curvature(state.nu, estimate)

  def finite(new, h):
    return jnp.where(jnp.isfinite(new), new, h)

  def is_nonfinite(x):  # One number, not an array of booleans.
    largest = jnp.max(jnp.abs(x), initial=0)
    return (~jnp.isfinite(largest)).astype(jnp.float32)

  def narrower(e, new):
    # In the dtype of the estimate, h is finite where the estimate is. XLA for
    # TPUs would write the new h to memory twice if it were counted there.
    return e if e.dtype == new.dtype else new

  counted = jax.tree.map(narrower, estimate, nu)
  nonfinite = _fractions.sum_over_shards(is_nonfinite, state.count, counted)
  return state._replace(
    nu=jax.tree.map(finite, nu, state.nu),
    nonfinite_count=state.nonfinite_count + (nonfinite > 0).astype(jnp.int32),
    refresh_count=state.refresh_count + 1,
  )
