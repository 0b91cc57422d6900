"""A train state for Flax linen. No other module imports Flax."""

import dataclasses
import functools
from typing import Any, Self

import optax

try:
  from flax.training import train_state
except ImportError as error:
  raise ImportError(
    'sophia_optax.flax needs Flax, which could not be imported. Install it:'
    " pip install 'sophia-optax[flax]'."
  ) from error


class SophiaTrainState(train_state.TrainState):
  """Flax's ``TrainState`` that forwards extra arguments to the optimizer.

  It is a drop-in replacement for
  :class:`flax.training.train_state.TrainState`, whose ``apply_gradients`` does
  not forward arguments to ``tx.update``. All else is the same. Subclass it to
  add fields. ``tx`` can be any optax optimizer.

  Example:
    >>> from typing import Any
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sophia_optax
    >>> class TrainState(sophia_optax.SophiaTrainState):
    ...   batch_stats: Any
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> x = jnp.arange(6.0).reshape(3, 2)
    >>> state = TrainState.create(
    ...     apply_fn=model.apply, tx=sophia_optax.sophia(0.1),
    ...     **model.init(jax.random.key(0), x))
    >>> def loss_fn(params):
    ...   variables = {'params': params, 'batch_stats': state.batch_stats}
    ...   y, updated = state.apply_fn(variables, x, mutable=['batch_stats'])
    ...   return jnp.mean((y - x) ** 2), updated
    >>> grads, updated = jax.grad(loss_fn, has_aux=True)(state.params)
    >>> state = state.apply_gradients(
    ...     grads=grads, **updated, obj_fn=lambda params: loss_fn(params)[0])
    >>> print(state.batch_stats['mean'].round(2))
    [0.02 0.03]
  """

  def apply_gradients(self, *, grads: optax.Updates, **kwargs: Any) -> Self:
    """Takes a step and forwards extra arguments to the optimizer.

    As in Flax's own method, values in ``params`` that are not trained, such as
    the scales of its 8-bit layers, are not passed to the optimizer. In this
    case ``obj_fn`` and ``predict_fn`` are called with ``params['params']``.

    Args:
      grads: Gradients, a tree like ``params``.
      **kwargs: New values of fields, such as ``batch_stats=``. All other
        arguments, such as ``obj_fn=``, are forwarded to ``tx.update``. Check
        their spelling: optimizers ignore unknown extra arguments.

    Returns:
      The state with ``step`` increased by one, new ``params`` and
      ``opt_state``, and the fields in ``kwargs``.

    Raises:
      TypeError: If ``kwargs`` has ``step``, ``params`` or ``opt_state``, which
        this method computes.
    """
    names = {field.name for field in dataclasses.fields(self)}
    fields = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    update = self.tx.update
    # with_extra_args_support would drop the arguments of optax.MultiSteps.
    if not isinstance(self.tx, optax.MultiSteps):
      update = optax.with_extra_args_support(self.tx).update
    bound = self.replace(
      tx=optax.GradientTransformationExtraArgs(
        self.tx.init, functools.partial(update, **kwargs)
      )
    )
    # Flax's own method does the rest and restores `tx`.
    return super(SophiaTrainState, bound).apply_gradients(
      grads=grads, **({'tx': self.tx} | fields)
    )
