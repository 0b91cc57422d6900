"""The train state for Flax linen. No other module imports Flax."""

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
  """Flax's ``TrainState``, with extra arguments for the optimizer.

  It takes the place of :class:`flax.training.train_state.TrainState`, whose
  ``apply_gradients`` forwards nothing to ``tx.update``; fields, ``create`` and
  everything else are the same. Subclass it to add fields. Any optax optimizer
  can be its ``tx``.

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
    """Takes a step, with the extra arguments that the optimizer needs.

    What Flax stores in ``params`` without training it, such as the scales of
    its 8-bit layers, is kept from the optimizer as in Flax's own method:
    ``obj_fn`` and ``predict_fn`` are called with ``params['params']`` then.

    Args:
      grads: Gradients, a tree like ``params``.
      **kwargs: New values of fields, such as ``batch_stats=``. Everything else
        is an extra argument, such as ``obj_fn=``, and goes to ``tx.update``. An
        optimizer ignores extra arguments that it does not know, so a misspelt
        name is no error.

    Returns:
      The state with ``step`` increased by one, new ``params`` and ``opt_state``
      and the fields of ``kwargs``.

    Raises:
      TypeError: If ``kwargs`` has ``step``, ``params`` or ``opt_state``, which
        are computed here.
    """
    names = {field.name for field in dataclasses.fields(self)}
    fields = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    update = self.tx.update
    if not isinstance(self.tx, optax.MultiSteps):  # Takes them, is no subclass.
      update = optax.with_extra_args_support(self.tx).update
    bound = self.replace(
      tx=optax.GradientTransformationExtraArgs(
        self.tx.init, functools.partial(update, **kwargs)
      )
    )
    # Flax's own method does the rest, and puts the optimizer back.
    return super(SophiaTrainState, bound).apply_gradients(
      grads=grads, **({'tx': self.tx} | fields)
    )
