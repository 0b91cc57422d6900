"""The real coordinates of a tree: what Sophia's element-wise formulas act on.

A complex leaf stands for two real parameters, an integer leaf for none. Seen
through these functions every formula is one over real floating point arrays:

    leaf of `like`     coordinates
    real floating      the leaf itself
    complex            (real part, imaginary part)
    integer, boolean   None: no gradient, no curvature, no update
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_differentiable(leaf: Any) -> bool:
  """Whether a leaf has coordinates: real or complex, not integer."""
  return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def where_differentiable(tree: Any) -> Any:
  """The mask of the leaves that have coordinates."""
  return jax.tree.map(is_differentiable, tree)


def is_complex(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)


def split(like: optax.Params, tree: optax.Params) -> Any:
  """Returns the coordinates of `tree`, whose kinds of leaf are those of `like`.

  Args:
    like: The parameters; their dtypes decide which coordinates there are.
    tree: A tree of that structure: parameters, gradients, moments, estimates.
  """

  def split_leaf(p, x):
    if not is_differentiable(p):
      return None
    x = jnp.asarray(x)
    return (x.real, x.imag) if is_complex(p) else x

  return jax.tree.map(split_leaf, like, tree)


def join(like: optax.Params, coordinates: Any) -> Any:
  """The inverse of `split`: a tree with the leaf dtypes of `like`.

  Integer leaves are taken from `like` as they are.
  """

  def join_leaf(x, c):
    if not is_differentiable(x):
      return x
    c = jax.lax.complex(*c) if is_complex(x) else c
    return c.astype(jnp.result_type(x))

  return jax.tree.map(join_leaf, like, coordinates)


def fill(tree: optax.Params, full: optax.Params | None) -> optax.Params:
  """Fills the holes that `optax.masked` leaves in a tree from a whole one."""
  if full is None:
    return tree
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda x, f: f if is_hole(x) else x, tree, full, is_leaf=is_hole
  )


def widen(coordinates: Any) -> Any:
  """Casts to float32 what is narrower, so that averages do not stall."""
  return jax.tree.map(
    lambda x: x.astype(wider(x.dtype, jnp.float32)), coordinates
  )


def unscale(coordinates: Any, scale: jax.typing.ArrayLike | None) -> Any:
  """Divides wide coordinates by the scale of the loss that they are of."""
  if scale is None:
    return coordinates
  return jax.tree.map(lambda x: x / jnp.asarray(scale, x.dtype), coordinates)


def wider(*dtypes: Any) -> Any:
  """The real dtype with most bits, and the first of those."""
  return max(dtypes, key=lambda d: jnp.finfo(d).bits)


def zeros_like(params: optax.Params, dtype: Any | None = None) -> Any:
  """Zeros shaped like `params`; real leaves have `dtype`.

  Args:
    params: The parameters.
    dtype: Of real leaves. None means float32, or their own if it is wider.
  """

  def zeros(p):
    own = jnp.result_type(p)
    if is_differentiable(p) and not is_complex(p):
      own = dtype or wider(own, jnp.float32)
    return jnp.zeros_like(p, dtype=own)

  return jax.tree.map(zeros, params)
