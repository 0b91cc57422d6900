"""How arrays are batches of matrices: which ones, and cut into which blocks."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

# Matrices whose rows or columns belong to tokens, and vectors that a scan over
# layers has stacked.
_LEFT_OUT = re.compile(
  'embed|position|logit|vocab|norm'
  r'|(^|_)(emb|pos|wte|wpe|bias|scale)(_|$)|(^|_)head(_\d+)?$'
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array is N matrices of m rows and n columns.

  Attributes:
    axes: The axes of the array in the order layers, rows, columns.
    shape: The shape of the array with its axes in this order.
    blocks: Shape (layers, blocks of rows, m, blocks of columns, n).
    is_rotated: Whether rows and columns have a basis.
  """

  axes: tuple[int, ...]
  shape: tuple[int, ...]
  blocks: tuple[int, int, int, int, int]
  is_rotated: tuple[bool, bool]

  def matrices(self, x: jax.Array) -> jax.Array:
    """Returns an array in the form (N, m, n), in float32."""
    *_, m, _, n = self.blocks
    x = x.astype(jnp.float32).transpose(self.axes).reshape(self.blocks)
    return x.swapaxes(2, 3).reshape(-1, m, n)

  def array(self, matrices: jax.Array) -> jax.Array:
    """Inverts `matrices`, in float32."""
    layers, rows, m, columns, n = self.blocks
    x = matrices.reshape(layers, rows, columns, m, n).swapaxes(2, 3)
    return x.reshape(self.shape).transpose(np.argsort(self.axes))

  def squares(self, make: Callable[[tuple[int, ...]], jax.Array]) -> Any:
    """Returns `make((N, m, m))` and `make((N, n, n))`, None if not rotated."""
    layers, rows, m, columns, n = self.blocks
    number = layers * rows * columns
    return tuple(
      make((number, side, side)) if rotated else None
      for side, rotated in zip((m, n), self.is_rotated, strict=True)
    )


def layouts(dimension_numbers, block_size, params):
  """Returns a tree like the parameters of layouts, None for what is left."""
  if dimension_numbers is None:
    dimension_numbers = jax.tree.map_with_path(_dimension_numbers, params)
  elif callable(dimension_numbers):
    dimension_numbers = dimension_numbers(params)

  def layout(numbers, x):
    is_matrix = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if numbers is None or not is_matrix or jnp.ndim(x) < 2 or not jnp.size(x):
      return None
    return _layout(numbers, block_size, jnp.shape(x))

  return jax.tree.map(
    lambda numbers, tree: jax.tree.map(
      functools.partial(layout, numbers), tree
    ),
    dimension_numbers,
    params,
    is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
  )


def _dimension_numbers(path, x):
  """Returns the default dimension numbers, None for what is left alone."""
  del x
  names = jax.tree_util.keystr(path, simple=True, separator='/').lower()
  if any(map(_LEFT_OUT.search, names.split('/'))):
    return None
  return MuonDimensionNumbers(-2, -1)


def _layout(numbers, block_size, shape):
  """Returns the layout of an array, None for a vector."""
  rows, columns = (
    tuple(range(len(shape))[axis] for axis in np.atleast_1d(axes))
    for axes in (numbers.reduction_axis, numbers.output_axis)
  )
  layers = tuple(i for i in range(len(shape)) if i not in rows + columns)
  axes = layers + rows + columns
  number, *sides = (
    math.prod(shape[i] for i in part) for part in (layers, rows, columns)
  )
  if sorted(axes) != list(range(len(shape))):
    raise ValueError(
      'weight_dimension_numbers must name different axes as rows and columns,'
      f' got {numbers} for an array of shape {shape}.'
    )
  if min(sides) == 1:
    return None
  limit = min(*sides, block_size)
  lengths = [_block_length(side, limit) for side in sides]
  m, n = (length or side for length, side in zip(lengths, sides, strict=True))
  return Layout(
    axes,
    tuple(shape[i] for i in axes),
    (number, sides[0] // m, m, sides[1] // n, n),
    (lengths[0] is not None, lengths[1] is not None),
  )


def _block_length(side, target):
  """Returns a divisor of a side near the target, None if there is none."""
  divisors = [n for n in range(1, side + 1) if side % n == 0]
  ratio = lambda n: max(n / target, target / n)
  nearest = min(divisors, key=ratio)
  return nearest if ratio(nearest) <= 2 else None


def apply(fn, layouts, *trees):
  """Returns `fn(layout, *xs)` for each matrix, and the last x for others."""
  is_left = lambda x: x is None or isinstance(x, optax.MaskedNode)

  def call(layout, *xs):
    is_hidden = is_left(layout) or any(map(is_left, xs))
    return ((), *xs)[-1] if is_hidden else fn(layout, *xs)

  return jax.tree.map(call, layouts, *trees, is_leaf=is_left)
