"""Real coordinates of a tree, on which Sophia's element-wise formulas act.

A complex leaf represents two real parameters, an integer leaf none. These
functions let every formula be written for real floating point arrays:

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
  """Whether a leaf has coordinates, that is, is real or complex."""
  return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def where_differentiable(tree: Any) -> Any:
  """Returns a mask of the leaves that have coordinates."""
  return jax.tree.map(is_differentiable, tree)


def is_complex(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)


def split(like: optax.Params, tree: optax.Params) -> Any:
  """Returns the coordinates of `tree`.

  Args:
    like: The parameters. Their dtypes decide the kind of each leaf.
    tree: A tree with the structure of `like`, such as gradients or moments.
  """

  def split_leaf(p, x):
    if not is_differentiable(p):
      return None
    x = jnp.asarray(x)
    return (x.real, x.imag) if is_complex(p) else x

  return jax.tree.map(split_leaf, like, tree)


def join(like: optax.Params, coordinates: Any) -> Any:
  """Inverts `split`. Leaves have the dtypes of `like`.

  Integer leaves are those of `like`.
  """

  def join_leaf(x, c):
    if not is_differentiable(x):
      return x
    c = jax.lax.complex(*c) if is_complex(x) else c
    return c.astype(jnp.result_type(x))

  return jax.tree.map(join_leaf, like, coordinates)


def fill(tree: optax.Params, full: optax.Params | None) -> optax.Params:
  """Replaces each `optax.MaskedNode` in a tree by the leaf of a full tree."""
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  if full is not None:
    fill_leaf = lambda x, f: f if is_hole(x) else x
    return jax.tree.map(fill_leaf, tree, full, is_leaf=is_hole)
  if any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole))):
    raise ValueError(
      'obj_fn and predict_fn need all parameters, but optax.masked or'
      ' optax.partition hides some of them. Pass all to update: update(grads,'
      ' state, params, full_params=params, ...). Curvature is still estimated'
      ' only for the parameters that are not hidden.'
    )
  return tree


def widen(coordinates: Any) -> Any:
  """Casts narrower arrays to float32, so that averages do not stall."""
  return jax.tree.map(
    lambda x: x.astype(wider(x.dtype, jnp.float32)), coordinates
  )


def unscale(coordinates: Any, scale: jax.typing.ArrayLike | None) -> Any:
  """Divides coordinates, in float32 or wider, by the loss scale if any."""
  if scale is None:
    return coordinates
  return jax.tree.map(lambda x: x / jnp.asarray(scale, x.dtype), coordinates)


def wider(*dtypes: Any) -> Any:
  """Returns the real dtype with the most bits, the first one if several do."""
  return max(dtypes, key=lambda d: jnp.finfo(d).bits)


def zeros_like(params: optax.Params, dtype: Any | None = None) -> Any:
  """Returns zeros shaped like `params`.

  Args:
    params: The parameters.
    dtype: The dtype of real leaves. None means float32, or the dtype of the
      parameter if that is wider.
  """

  def zeros(p):
    own = jnp.result_type(p)
    if is_differentiable(p) and not is_complex(p):
      own = dtype or wider(own, jnp.float32)
    return jnp.zeros_like(p, dtype=own)

  return jax.tree.map(zeros, params)
