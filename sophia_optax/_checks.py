"""Checks of what the user passes in: needed, given, and how to mend it.

Numbers are checked only if they are static. Arrays and tracers, which is what
`optax.inject_hyperparams` hands over, pass through.
"""

from collections.abc import Callable, Collection, Sequence
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def _is_static(value: Any) -> bool:
  return isinstance(value, (int, float, np.number))


def _is_array(value: Any) -> bool:
  return isinstance(value, (jax.Array, np.ndarray))


def _number(name: str, value: Any, holds: Callable[[Any], bool], need: str):
  """Raises unless `value` is an array or a static number for which it holds."""
  if _is_array(value):
    return
  if not _is_static(value):
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
  _number(name, value, lambda x: x > 0, 'greater than 0')


def not_negative(name: str, value: Any):
  _number(name, value, lambda x: x >= 0, 'of at least 0')


def fraction(name: str, value: Any):
  _number(name, value, lambda x: 0 < x < 1, 'in (0, 1)')


def steerable(gamma: Any, clip_threshold: Any):
  """Raises unless `target_win_rate` has something to steer."""
  if callable(gamma) or (_is_static(gamma) and gamma == 0):
    raise ValueError(
      'gamma must be a number greater than 0, to begin with, where'
      f' target_win_rate steers it, got {gamma!r}.'
    )
  if clip_threshold is None:
    raise ValueError(
      'target_win_rate needs a clip_threshold, got None: without clipping'
      ' every coordinate wins.'
    )


def whole_number(name: str, value: Any, at_least: int) -> Any:
  """Returns the number as an int, an array as it is."""
  _number(
    name,
    value,
    lambda x: math.isfinite(x) and x == int(x) and x >= at_least,
    f'that is whole and at least {at_least}',
  )
  return value if _is_array(value) else int(value)


def one_of(name: str, value: Any, known: Collection[str]):
  if not isinstance(value, str) or value not in known:
    raise ValueError(f'{name} must be one of {sorted(known)}, got {value!r}.')


_CALLS = {
  'params': 'update(grads, state, params, ...)',
  'obj_fn': (
    'update(grads, state, params, obj_fn=lambda params: loss(params, batch))'
  ),
  'predict_fn': (
    'update(grads, state, params, predict_fn=lambda params: logits(params,'
    ' batch))'
  ),
  'batch': (
    'update(grads, state, params, batch=batch, ...), and let obj_fn or'
    ' predict_fn take (params, batch)'
  ),
}


def given(
  name: str,
  value: Any,
  user: str,
  instead_of: tuple[str, Any] | None = None,
):
  """Raises if `value` is missing; `instead_of` is what may stand there."""
  if value is not None:
    return
  got = 'None'
  if instead_of is not None and instead_of[1] is not None:
    got = f'{instead_of[0]}, which another estimator needs'
  raise ValueError(
    f'{user} needs {name}, got {got}. Pass it on to update: {_CALLS[name]}.'
  )


def complete(name: str, params: Any, full_params: Any):
  """Raises if `name` would be called with a tree that has holes."""
  holes = [
    jax.tree_util.keystr(path) or 'the root'
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    if isinstance(leaf, optax.MaskedNode)
  ]
  if holes and full_params is None:
    raise ValueError(
      f'{name} needs all parameters, but optax.masked or optax.partition hid'
      f' those at {", ".join(holes[:3])}{", ..." if holes[3:] else ""}. Pass'
      ' them all to update: update(grads, state, params, full_params=params,'
      ' ...). The curvature is still that of the visible ones alone.'
    )


def transformation(name: str, value: Any):
  if not (hasattr(value, 'init') and hasattr(value, 'update')):
    mend = 'Call the factory: pass estimator(), not estimator.'
    raise TypeError(
      f'{name} must be a gradient transformation, with init and update, got'
      f' {value!r}. {mend if callable(value) else ""}'.rstrip()
    )


def callable_with(name: str, fn: Any, arguments: Sequence[str]):
  """Raises unless `fn` can be called with that many positional arguments."""
  call = f'{name}({", ".join(arguments)})'
  if not callable(fn):
    raise TypeError(f'{name} must be a function, called as {call}, got {fn!r}.')
  try:
    signature = inspect.signature(fn)
  except (TypeError, ValueError):  # Some callables have no signature to ask.
    return
  try:
    signature.bind(*arguments)
  except TypeError as error:
    raise TypeError(
      f'{name} must be callable as {call}, got a function with the signature'
      f' {signature}: {error}. Bind what else it needs, as in'
      f' {name}=lambda {", ".join(arguments)}: ....'
    ) from None


def without_aux(name: str, value: Any, has_aux: bool) -> Any:
  """Returns the first of the pair that `name` returned, if there has to be."""
  if not has_aux:
    return value
  if not (isinstance(value, tuple) and len(value) == 2):
    raise TypeError(
      f'{name} must return a pair, as the estimator has has_aux=True, got'
      f' {value!r}. Return (value, aux), or leave has_aux out.'
    )
  return value[0]


def real_scalar(name: str, value: Any):
  """Raises unless `value` is what a loss should be."""
  need = f'{name} must return the loss alone, a real floating point scalar'
  if isinstance(value, (tuple, list, dict)):
    raise TypeError(
      f'{need}, got a {type(value).__name__} of {len(value)}. If it returns'
      ' (loss, aux), pass has_aux=True to the estimator.'
    )
  dtype, shape = _dtype(value), np.shape(value)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    got = type(value).__name__ if dtype is None else f'dtype {dtype}'
    raise TypeError(f'{need}, got {got}. Cast it, or return its real part.')
  if shape:
    raise TypeError(
      f'{need}, got an array of shape {shape}. Reduce it, as in'
      ' jnp.mean(losses).'
    )


def _dtype(value: Any) -> Any | None:
  try:  # None is a dtype to NumPy.
    return None if value is None else jnp.result_type(value)
  except (TypeError, ValueError):
    return None


def dense(name: str, tree: Any):
  """Raises if a leaf is one of JAX's sparse arrays."""
  sparse = lambda x: hasattr(x, 'todense')
  for leaf in jax.tree.leaves(tree, is_leaf=sparse):
    if sparse(leaf):
      raise TypeError(
        f'{name} must be dense, got a {type(leaf).__name__} of shape'
        f' {leaf.shape}. Call its todense() first.'
      )


def same_shapes(name: str, tree: Any, params: Any):
  """Raises unless `tree` has the structure and the leaf shapes of `params`."""
  got: Any = jax.tree.structure(tree)
  need: Any = jax.tree.structure(params)
  if got != need:
    raise ValueError(
      f'{name} must be a tree like params. Needed: {need}, got: {got}.'
      ' Return one array for each parameter.'
    )
  paths = jax.tree_util.tree_leaves_with_path(params)
  for (path, p), x in zip(paths, jax.tree.leaves(tree), strict=True):
    if np.shape(x) != np.shape(p):
      raise ValueError(
        f'{name} must be a tree like params, but its leaf'
        f' {jax.tree_util.keystr(path) or "at the root"} has shape'
        f' {np.shape(x)} where params has {np.shape(p)}.'
      )


def real_array(name: str, value: Any, event_ndim: int):
  """Raises unless `value` can be the outputs of a model."""
  need = f'{name} must return one floating point array, the logits or means'
  if isinstance(value, (tuple, list, dict)):
    raise TypeError(
      f'{need}, got a {type(value).__name__} of {len(value)}. Select them, as'
      f' in {name}=lambda params: model(params)[0]; if it returns'
      ' (outputs, aux), pass has_aux=True to the estimator.'
    )
  dtype = _dtype(value)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    got = type(value).__name__ if dtype is None else f'dtype {dtype}'
    raise TypeError(f'{need}, got {got}. Return them before any argmax.')
  if np.ndim(value) < event_ndim:
    raise TypeError(
      f'{need}, with at least {event_ndim} axes for this likelihood, got'
      f' shape {np.shape(value)}. The last axis of logits is of the classes.'
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


def leading_axis(name: str, tree: Any, num_parts: int) -> int:
  """Returns the size of the leading axis, which has to split into parts."""
  shapes = {np.shape(x) for x in jax.tree.leaves(tree)}
  sizes = {shape[:1] for shape in shapes}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      f'{name} must hold arrays with the same leading axis, got shapes'
      f' {sorted(shapes)}. Close over what does not belong to one example.'
    )
  ((size,),) = sizes
  if size % num_parts:
    raise ValueError(
      f'{name} of {size} examples must split into {num_parts} equal parts,'
      f' but {num_parts} does not divide {size}. Choose num_microbatches'
      f' among the divisors of {size}.'
    )
  return size
