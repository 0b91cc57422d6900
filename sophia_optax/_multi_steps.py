"""Gradient accumulation that estimates the curvature once."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import optax


class MultiSteps(optax.MultiSteps):
  """:class:`optax.MultiSteps`, with one estimate of the curvature.

  optax's own calls the wrapped optimizer on every micro-step and keeps the last
  result only: of the n estimates of a refresh, n - 1 are thrown away. Here only
  the micro-step that emits an update refreshes. Arguments, state and updates
  are the same. The estimate is of the last micro-batch, as in optax's; to have
  it of all of them, pass them all as ``batch=`` and divide them again with
  :func:`sophia_optax.microbatched`.

  With ``update(..., refresh=...)`` the caller decides instead, see
  :func:`sophia_optax.scale_by_sophia`. A micro-step that emits no update keeps
  nothing of what it estimates.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> loss_fn = lambda x, batch: jnp.mean((x - batch) ** 2)
    >>> tx = sophia_optax.MultiSteps(sophia_optax.sophia(0.1), 2)
    >>> x = jnp.array(0.0)
    >>> state = tx.init(x)
    >>> def step(x, state, batch):
    ...   grads = jax.grad(loss_fn)(x, batch)
    ...   return tx.update(
    ...       grads, state, x, obj_fn=lambda x: loss_fn(x, batch))
    >>> for batch in (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])):
    ...   with jax.numpy_dtype_promotion('standard'):  # JAX's default.
    ...     updates, state = step(x, state, batch)
    ...   print(updates, tx.has_updated(state))
    0.0 False
    0.1 True
  """

  def __init__(
    self,
    opt: optax.GradientTransformation,
    every_k_schedule: int | Callable[[Any], Any],
    **kwargs: Any,
  ):
    """Takes the arguments of :class:`optax.MultiSteps`.

    Args:
      opt: The optimizer.
      every_k_schedule: Number of micro-steps in a step, or a schedule of it.
      **kwargs: The others.
    """
    super().__init__(opt, every_k_schedule, **kwargs)
    self._num_micro_steps = every_k_schedule

  def update(
    self,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    """Takes a micro-step; extra arguments go to the optimizer."""
    if 'refresh' in extra_args:
      return super().update(updates, state, params, **extra_args)
    every_k = self._num_micro_steps
    n = every_k(state.gradient_step) if callable(every_k) else every_k
    if 'value_fn' in extra_args:
      extra_args['value_fn'] = _ignores_may_refresh(extra_args['value_fn'])
    return super().update(
      updates, state, params, may_refresh=state.mini_step == n - 1, **extra_args
    )

  def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
    """Returns this as a transformation that takes extra arguments."""
    return optax.GradientTransformationExtraArgs(self.init, self.update)


def _ignores_may_refresh(value_fn):
  """Lets optax's line searches, which check signatures, ignore the argument."""

  @functools.wraps(value_fn)
  def fn(*args, may_refresh=None, **kwargs):
    del may_refresh
    return value_fn(*args, **kwargs)

  signature = inspect.signature(value_fn)
  if 'may_refresh' in signature.parameters:
    return value_fn
  argument = inspect.Parameter('may_refresh', inspect.Parameter.KEYWORD_ONLY)
  names = [*signature.parameters.values(), argument]
  names.sort(key=lambda parameter: parameter.kind)
  vars(fn)['__signature__'] = signature.replace(parameters=names)
  return fn
