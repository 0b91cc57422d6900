"""Checks of arguments. Errors say what is needed, what was given and a fix.

Numbers and known arrays are checked. Tracers, which `optax.inject_hyperparams`
passes under `jit`, are accepted without a check. This module also checks device
axes. A check with a single caller is in the module of that caller.
"""

from collections.abc import Callable, Collection
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sophia_optax import _collectives

# XLA flushes smaller float32 numbers to 0.
_TINY = float(np.finfo(np.float32).tiny)


def _number(name: str, value: Any, is_valid: Callable[[Any], bool], need: str):
  """Raises unless `value` is traced or a valid number."""
  if isinstance(value, jax.core.Tracer):
    return
  if not is_valid(np.asarray(value) if hasattr(value, 'dtype') else value):
    is_rounded = getattr(value, 'dtype', None) in (jnp.bfloat16, jnp.float16)
    fix = (
      ' It is rounded: pass hyperparam_dtype=jnp.float32 to'
      ' optax.inject_hyperparams.'
    )
    raise ValueError(
      f'{name} must be {need}, got {value!r}.{fix if is_rounded else ""}'
    )


def decay(name: str, value: Any):
  _number(name, value, lambda x: 0 <= x < 1, 'a number in [0, 1)')


def positive(name: str, value: Any):
  tiny = f'at least {_TINY:.3g} (the smallest normal float32)'
  need = f'a number greater than 0, {tiny}'
  _number(name, value, lambda x: x >= _TINY, need)


def number_or_schedule(name: str, value: Any, at_least: float = -math.inf):
  bound = '' if at_least == -math.inf else f' of at least {at_least}'
  need = f'a finite number{bound} or a schedule'
  if not callable(value):
    _number(name, value, lambda x: at_least <= x and math.isfinite(x), need)


def fraction(name: str, value: Any):
  _number(name, value, lambda x: 0 < x < 1, 'a number in (0, 1)')


def whole_number(name: str, value: Any, at_least: int) -> Any:
  """Returns a number as an int, and an array unchanged."""
  is_array = hasattr(value, 'dtype')  # Computed, so perhaps not quite whole.

  def is_valid(x):
    is_whole = math.isfinite(x) and (is_array or x == int(x))
    return is_whole and round(float(x)) >= at_least

  _number(name, value, is_valid, f'a whole number of at least {at_least}')
  return value if is_array else int(value)


def static(**options: Any):
  """Raises if an option that decides shapes is an array."""
  for name, value in options.items():
    if hasattr(value, 'dtype'):
      raise TypeError(
        f'{name} must be a Python number, because shapes depend on it, got an'
        f' array. Pass static_args={tuple(options)} to'
        ' optax.inject_hyperparams.'
      )


def one_of(name: str, value: Any, known: Collection[str]):
  if not isinstance(value, str) or value not in known:
    raise ValueError(f'{name} must be one of {sorted(known)}, got {value!r}.')


_EXAMPLES = {
  'obj_fn': 'obj_fn=loss_fn, batch=batch) with loss_fn(params, batch) -> loss',
  'predict_fn': 'predict_fn=predict_fn, batch=batch) with'
  ' predict_fn(params, batch) -> outputs, such as logits',
}


def given(name: str, value: Any, user: str, others: Collection[str] = ()):
  if value is None:
    got = f'only {", ".join(others)}' if others else 'None'
    example = _EXAMPLES.get(name, '...)')
    raise ValueError(
      f'{user} needs {name}, got {got}. Pass it to update: update(grads, state,'
      f' params, {example}.'
    )


def same_shapes(name: str, tree: Any, params: Any):
  """Raises unless `tree` has the structure and the leaf shapes of `params`."""

  def check(path, p, x):
    if np.shape(x) != np.shape(p):
      raise ValueError(
        f'{name} must be a tree like params, but its leaf'
        f' {jax.tree_util.keystr(path) or "at the root"} has shape'
        f' {np.shape(x)}, and that of params has shape {np.shape(p)}.'
      )

  jax.tree.map_with_path(check, params, tree)


def mapped_axes(axis_name: _collectives.AxisName):
  """Raises unless the axes are mapped and no axis of replicas is missing."""
  mesh = jax.sharding.get_abstract_mesh()
  names = _collectives.names(axis_name)
  others = [n for n in mesh.manual_axes if n not in names and mesh.shape[n] > 1]
  for name in names:
    index = _collectives.axis_index(name)
    tracked = name in _collectives.varying(index)
    if name in mesh.manual_axes and not tracked and others:
      raise ValueError(
        'axis_name must contain every axis over which the parameters are'
        f' replicated, got {axis_name!r}, but the mesh also has the axes'
        f' {others}. Add them to axis_name if the parameters are replicated'
        ' over them. If the parameters are divided over them, keep'
        ' check_vma=True in jax.shard_map.'
      )


def averaged(estimate: Any, nu: Any):
  """Raises if an estimate differs between replicas but its EMA does not."""
  for e, h in zip(*map(jax.tree.leaves, (estimate, nu)), strict=True):
    if axes := _collectives.other_axes(e, tuple(_collectives.varying(h))):
      raise ValueError(
        'The Hessian diagonal estimate must be the same on all replicas, got'
        f' one that differs along {list(axes)}. Pass axis_name to the'
        ' estimator, or chain average_over_replicas after an estimator that'
        ' you wrote.'
      )


def local(loss: jax.Array, theta: Any, axis_name: _collectives.AxisName):
  """Raises unless the derivatives of the loss are those of this replica alone.

  Args:
    loss: The result of obj_fn.
    theta: The coordinates of the parameters, varying over `axis_name`.
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
      'obj_fn must return the loss of the local shard, got one that is the'
      f' same along the axes {sorted(replicated)}. Remove its pmean or psum:'
      ' the estimate is averaged over these axes afterwards.'
    )
  if summed := varying(loss) - own:
    raise ValueError(
      'obj_fn must return a loss that is the same along the axes'
      f' {sorted(summed)}, over which parameters are replicated, got one that'
      ' differs. Derivatives with respect to replicated parameters are sums'
      ' over these axes. Pass the axes of the data as axis_name to the'
      ' estimator, and average the loss over all others.'
    )
