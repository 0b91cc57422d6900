"""Checks of what the user passes in: needed, given, and how to fix it.

Numbers are checked only if they are static. Arrays and tracers, which is what
`optax.inject_hyperparams` passes, are accepted as they are. Checks of device
axes are here, too. Other checks with a single caller are beside that caller.
"""

from collections.abc import Callable, Collection
import math
from typing import Any

import jax
import numpy as np

from sophia_optax import _collectives

# XLA flushes smaller float32 numbers to 0.
_TINY = float(np.finfo(np.float32).tiny)


_ARRAY = (jax.Array, np.ndarray)


def _number(name: str, value: Any, holds: Callable[[Any], bool], need: str):
  """Raises unless `value` is an array or a static number for which it holds."""
  if isinstance(value, _ARRAY):
    return
  if not isinstance(value, (int, float, np.number)):
    raise TypeError(
      f'{name} must be a number {need}, got {value!r}. Pass a Python number,'
      ' or wrap the factory in optax.inject_hyperparams to change it over'
      ' time.'
    )
  if not holds(value):
    raise ValueError(f'{name} must be a number {need}, got {value!r}.')


def decay(name: str, value: Any):
  _number(name, value, lambda x: 0 <= x < 1, 'in [0, 1)')


def positive(name: str, value: Any):
  need = f'greater than 0, at least {_TINY:.3g} (the smallest normal float32)'
  _number(name, value, lambda x: x >= _TINY, need)


def number_or_schedule(name: str, value: Any, at_least: float = -math.inf):
  need = '' if at_least == -math.inf else f'of at least {at_least}, '
  if not callable(value):
    _number(name, value, lambda x: x >= at_least, need + 'or a schedule of it')


def fraction(name: str, value: Any):
  _number(name, value, lambda x: 0 < x < 1, 'in (0, 1)')


def whole_number(name: str, value: Any, at_least: int) -> Any:
  """Returns the number as an int, an array as it is."""
  _number(
    name,
    value,
    lambda x: math.isfinite(x) and x == int(x) and x >= at_least,
    f'that is whole and at least {at_least}',
  )
  return value if isinstance(value, _ARRAY) else int(value)


def one_of(name: str, value: Any, known: Collection[str]):
  if not isinstance(value, str) or value not in known:
    raise ValueError(f'{name} must be one of {sorted(known)}, got {value!r}.')


def boolean(name: str, value: Any):
  is_bool = isinstance(value, (bool, np.bool_))
  if not is_bool and not (isinstance(value, _ARRAY) and value.dtype == bool):
    raise TypeError(
      f'{name} must be a bool or an array of one, got {value!r}. Compare, as in'
      f' {name}=step % 10 == 0.'
    )


_EXAMPLES = {
  'params': '...',
  'batch': 'batch=batch, ...',
  'obj_fn': 'obj_fn=lambda params: loss(params, batch)',
  'predict_fn': 'predict_fn=lambda params: logits(params, batch)',
}


def given(name: str, value: Any, user: str, others: Collection[str] = ()):
  if value is None:
    got = f'only {", ".join(others)}' if others else 'None'
    raise ValueError(
      f'{user} needs {name}, got {got}. Pass it to update:'
      f' update(grads, state, params, {_EXAMPLES[name]}).'
    )


def transformation(name: str, value: Any):
  if not (hasattr(value, 'init') and hasattr(value, 'update')):
    fix = 'Call the factory: pass estimator(), not estimator.'
    raise TypeError(
      f'{name} must be a gradient transformation, with init and update, got'
      f' {value!r}. {fix if callable(value) else ""}'.rstrip()
    )


def call(name: str, fn: Any, arguments: dict[str, Any]) -> Any:
  """Calls the user's function; errors tell how it was called."""
  try:
    return fn(*arguments.values())
  except (AttributeError, TypeError) as error:
    types = [f'{key} a {type(x).__name__}' for key, x in arguments.items()]
    error.add_note(
      f'{name} was called as {name}({", ".join(arguments)}), with'
      f' {", ".join(types)}. If the error is about these: bind what else it'
      ' needs, and make a model from its parameters inside.'
    )
    raise


def same_shapes(name: str, tree: Any, params: Any):
  """Raises unless `tree` has the structure and the leaf shapes of `params`."""
  got: Any = jax.tree.structure(tree)
  need: Any = jax.tree.structure(params)
  if got != need:
    raise ValueError(
      f'{name} must be a tree like params. Needed: {need}, got: {got}.'
      ' Return one array for each parameter.'
    )
  leaves = jax.tree.leaves_with_path(params), jax.tree.leaves(tree)
  for (path, p), x in zip(*leaves, strict=True):
    if np.shape(x) != np.shape(p):
      raise ValueError(
        f'{name} must be a tree like params, but its leaf'
        f' {jax.tree_util.keystr(path) or "at the root"} has shape'
        f' {np.shape(x)} where params has {np.shape(p)}.'
      )


def broadcasts(name: str, value: Any, shape: tuple[int, ...]):
  """Raises unless `value` broadcasts to just this shape."""
  try:
    fits = np.broadcast_shapes(np.shape(value), shape) == shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f'{name} must broadcast to the predictions, of shape {shape}, got shape'
      f' {np.shape(value)}. It has one entry for each prediction, and no axis'
      ' for classes.'
    )


def mapped_axes(axis_name: _collectives.AxisName):
  """Raises unless the axes are mapped and all other mapped axes are known."""
  mesh = jax.sharding.get_abstract_mesh()
  names = _collectives.names(axis_name)
  for name in names:
    try:
      index = _collectives.axis_index(name)
    except NameError:
      raise ValueError(
        f'axis_name must be that of a mapped axis, got {name!r}; the axes of'
        f' the mesh here are {mesh.axis_names}. Call update under jax.pmap or'
        ' jax.shard_map with an axis of that name, or leave axis_name out:'
        ' jit with sharded arrays needs none.'
      ) from None
    others = [
      n for n in mesh.manual_axes if n not in names and mesh.shape[n] > 1
    ]
    tracked = name in _collectives.varying(index)
    if name in mesh.manual_axes and not tracked and others:
      raise ValueError(
        'axis_name must have every axis over which the parameters are'
        f' replicated, got {axis_name!r} beside the axes {others}. If the'
        ' parameters are divided over those, leave check_vma=True in'
        ' jax.shard_map, which shows it; otherwise add them to axis_name.'
      )


def averaged(estimate: Any, nu: Any):
  """Raises if an estimate differs between replicas where its EMA does not."""
  for e, h in zip(*map(jax.tree.leaves, (estimate, nu)), strict=True):
    if axes := _collectives.other_axes(e, tuple(_collectives.varying(h))):
      raise ValueError(
        'The Hessian diagonal estimate must be the same on all replicas, got'
        f' one that differs along {list(axes)}. Pass axis_name to the'
        ' estimator, or chain average_over_replicas after your own.'
      )


def local(loss: jax.Array, theta: Any, axis_name: _collectives.AxisName):
  """Raises unless differentiating the loss stays on this replica.

  Args:
    loss: What obj_fn returned.
    theta: What it was computed from, varying over the axes of `axis_name`.
    axis_name: The axes over which the estimate is averaged afterwards.
  """
  leaves = jax.tree.leaves(theta)
  if not leaves:
    return
  varying = _collectives.varying
  own = frozenset.intersection(*map(varying, leaves))
  replicated = own.intersection(_collectives.names(axis_name)) - varying(loss)
  if replicated:
    raise ValueError(
      'obj_fn must return the loss of the local shard, got one that is'
      f' the same on all of {sorted(replicated)}. Leave out its pmean or'
      ' psum: the estimate is averaged over these axes afterwards.'
    )
  if summed := varying(loss) - own:
    raise ValueError(
      f'obj_fn must return a loss that is the same on all of {sorted(summed)}'
      ', over which parameters are replicated: their derivatives are sums'
      ' over these axes. Pass the axes of the data as axis_name to the'
      ' estimator, and average the loss over any other one.'
    )
