"""`MultiSteps`: gradient accumulation with one curvature estimate."""

from collections.abc import Callable
from typing import Any

import optax


class MultiSteps(optax.MultiSteps):
  """:class:`optax.MultiSteps` that estimates the curvature once per refresh.

  :class:`optax.MultiSteps` calls the wrapped optimizer on each of n micro-steps
  and keeps only the last result, so n - 1 of n estimates are lost. Here only
  the micro-step that emits an update refreshes the curvature. Arguments, state
  and updates are the same. As in optax, ``obj_fn`` and ``predict_fn`` are those
  of the last micro-batch. To estimate on all micro-batches, pass them together
  as ``batch=`` and use :func:`sophia_optax.microbatched`. The estimator
  :func:`sophia_optax.squared_gradient_estimator_diag_hessian` gets the
  accumulated gradient, so its ``batch_size`` counts all micro-batches.

  To decide yourself when to refresh, pass ``refresh`` to ``update``, see
  :func:`sophia_optax.scale_by_sophia`. An estimate on a micro-step that emits
  no update is lost.

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
    ...   updates, state = step(x, state, batch)
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
      every_k_schedule: Number of micro-steps in a step, or a schedule.
      **kwargs: All other arguments.
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
    """Takes a micro-step. Extra arguments are forwarded to the optimizer.

    Sophia also gets ``may_refresh``. If a line search is in the same chain, its
    ``value_fn`` needs an argument of that name.
    """
    # A line search would refuse this argument.
    refreshes = any(
      optax.tree.get_all_with_path(state.inner_opt_state, name)
      for name in ('SophiaState', 'EigenbasisState')
    )
    if refreshes and extra_args.get('refresh') is None:
      every_k = self._num_micro_steps
      n = every_k(state.gradient_step) if callable(every_k) else every_k
      emits = state.mini_step == n - 1
      extra_args['may_refresh'] = emits & extra_args.get('may_refresh', True)
    return super().update(updates, state, params, **extra_args)

  def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation with this ``init`` and ``update``."""
    return optax.GradientTransformationExtraArgs(self.init, self.update)
