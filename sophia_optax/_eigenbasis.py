"""`in_eigenbasis`: any optax transformation in rotated coordinates.

  G       gradient of a matrix, (m, n)
  L, R    factors: averages of G Gᵀ, (m, m), and of Gᵀ G, (n, n)
  P, Q    bases: orthogonal matrices, near the eigenvectors of L and R
  Pᵀ G Q  the gradient that the inner transformation gets

An array is a batch of such matrices, or is left alone. The inner transformation
is an optimizer for the rotated parameters: functions of the parameters that it
calls, such as `obj_fn`, rotate them back first.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _matrices
from sophia_optax import _refresh

_FUNCTIONS = 'obj_fn', 'predict_fn', 'head_fn', 'value_fn'  # of parameters
_TREES = 'full_params', 'grad'  # like the parameters
_FIRST_MOMENTS = 'mu', 'trace'  # fields of optax's states
_FIRST_STEPS = 20  # each of them changes the basis

_apply = _matrices.apply
_matmul = functools.partial(jnp.matmul, precision='highest')


class EigenbasisState(NamedTuple):
  """State of :func:`in_eigenbasis`.

  Attributes:
    count: Number of steps taken, shape (), int32.
    factors: For each parameter array a pair of averages, of G Gᵀ, shape
      (number of matrices, m, m), and of Gᵀ G, shape (number of matrices, n, n),
      in float32. An empty tuple if the array is not rotated.
    bases: Orthogonal matrices like the factors, with eigenvectors as columns.
    inner_state: State of the inner transformation, in rotated coordinates.
  """

  count: jax.Array  # type: ignore[assignment]  # Not tuple.count.
  factors: Any
  bases: Any
  inner_state: Any


def in_eigenbasis(
  inner: optax.GradientTransformation,
  *,
  update_interval: jax.typing.ArrayLike = 10,
  decay: jax.typing.ArrayLike = 0.8,
  block_size: int = 1024,
  weight_dimension_numbers: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs a transformation in the eigenbasis of each matrix's gradients.

  .. math::
    L &\leftarrow \beta L + (1 - \beta)\, G G^\top, \qquad
    R \leftarrow \beta R + (1 - \beta)\, G^\top G \\
    \Delta W &= P\, \mathrm{inner}(P^\top G Q)\, Q^\top

  The columns of P and Q approximate the eigenvectors of L and R. Every k steps,
  and in each of the first 20, one step of orthogonal iteration improves them:
  P becomes the orthogonal factor of the QR decomposition of L P. Then L and R
  get the new gradient. P and Q start as identities.

  An optimizer that divides by a diagonal, such as Adam or Sophia, is only as
  good as the coordinates in which the diagonal is taken.
  ``in_eigenbasis(optax.scale_by_adam())`` is SOAP. Chain it as the
  transformation that it wraps::

    tx = optax.chain(
      in_eigenbasis(scale_by_sophia(adam_b2=0.99, nesterov=True)),
      optax.add_decayed_weights(0.1),
      optax.scale_by_learning_rate(schedule))

  Extra arguments of ``update`` are forwarded. ``obj_fn``, ``predict_fn``,
  ``head_fn`` and ``value_fn`` are functions of the parameters as usual; the
  inner transformation gets them as functions of the rotated ones. So an
  estimator of the curvature estimates the diagonal in the basis.

  When the basis changes, first moments move with it. They are the fields
  ``mu`` and ``trace`` in the states of optax. All other state of ``inner``,
  such as second moments and curvature, stays as it is.

  Pass a Python bool as ``refresh`` to ``update`` to decide yourself when to
  change the basis, as in :func:`sophia_optax.scale_by_sophia`, which gets it as
  well. Pass True in the first 20 steps.

  A gradient with NaN or infinite entries does not change L and R. Products are
  in float32. Integer and complex arrays are left alone.

  Args:
    inner: The transformation. Masks and learning rates for single entries of a
      matrix have no meaning in the basis.
    update_interval: Interval k between changes of the basis, in steps.
    decay: Decay rate β of L and R, in [0, 1), applied at each of them.
    block_size: Side of a block, at most the shorter side of the matrix.
      Matrices are cut into blocks of about this size, each with a basis of its
      own. The side of a block divides that of the matrix and is half to twice
      the target. If there is no such divisor, the side is not rotated.
    weight_dimension_numbers: Which arrays are matrices, as in
      :func:`optax.contrib.scale_by_muon`: a tree of
      :class:`optax.contrib.MuonDimensionNumbers`, or None for an array that is
      left alone, with the structure of the parameters or a prefix of it, or a
      function that returns such a tree. By default the last two axes of an
      array are a matrix and all others count layers. Left alone are vectors and
      arrays with a name that contains embed, position, logit, vocab or norm,
      has a part emb, pos, wte, wpe, bias or scale, or ends in head, such as
      lm_head. The shapes of ``state.bases`` show what is rotated.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with an
    :class:`EigenbasisState`.

  Raises:
    ValueError: If a hyperparameter is out of range, unless it is an array.
    TypeError: If ``block_size`` is an array.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sophia_optax
    >>> tx = optax.chain(
    ...     sophia_optax.in_eigenbasis(optax.scale_by_adam()),
    ...     optax.scale_by_learning_rate(0.1))
    >>> w = jnp.zeros((2, 3))
    >>> state = tx.init(w)
    >>> loss = lambda w: jnp.sum((w - jnp.arange(6.0).reshape(2, 3)) ** 2)
    >>> @jax.jit
    ... def step(w, state):
    ...   updates, state = tx.update(jax.grad(loss)(w), state, w)
    ...   return optax.apply_updates(w, updates), state
    >>> for _ in range(200):
    ...   w, state = step(w, state)
    >>> print(bool(loss(w) < 0.1))
    True

  References:
    George et al., `Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis <https://arxiv.org/abs/1806.03884>`_, 2018

    Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
    <https://arxiv.org/abs/2409.11321>`_, 2024
  """
  interval = _checks.whole_number('update_interval', update_interval, 1)
  _checks.decay('decay', decay)
  _checks.static(block_size=block_size)
  block_size = _checks.whole_number('block_size', block_size, 1)
  inner = optax.with_extra_args_support(inner)
  layouts_of = functools.partial(
    _matrices.layouts, weight_dimension_numbers, block_size
  )

  def init_fn(params):
    layouts = layouts_of(params)
    return EigenbasisState(
      count=jnp.zeros([], jnp.int32),
      factors=_apply(lambda layout: layout.squares(jnp.zeros), layouts),
      bases=_apply(lambda layout: layout.squares(_identities), layouts),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    layouts = layouts_of(updates)
    refresh = extra_args.get('refresh')
    may_refresh = extra_args.get('may_refresh', True)
    if refresh is None:
      is_regular = state.count % _refresh.whole(interval) == 0
      refresh = is_regular | (state.count < _FIRST_STEPS)

    moments, with_moments = _first_moments(state.inner_state)

    def refreshed(old):
      factors, bases, moments = old
      # In this order: in the eigenbasis of a single gradient, that gradient is
      # diagonal, and rounding errors would become updates.
      new = _apply(_next_bases, layouts, factors, bases)
      add = functools.partial(_next_factors, decay)
      move = functools.partial(_apply, _moved, layouts, bases, new)
      return (
        _apply(add, layouts, updates, factors),
        new,
        list(map(move, moments)),
      )

    factors, bases, moments = _refresh.conditional(
      _refresh.is_due(state.count, interval, refresh, may_refresh),
      refreshed,
      (state.factors, state.bases, moments),
    )
    rotate = functools.partial(_apply, _rotated, layouts, bases)
    rotate_back = functools.partial(_apply, _rotated_back, layouts, bases)

    def of_rotated(fn):
      return lambda params, *args, **kwargs: fn(
        rotate_back(params), *args, **kwargs
      )

    for names, convert in ((_FUNCTIONS, of_rotated), (_TREES, rotate)):
      for name in names:
        if extra_args.get(name) is not None:
          extra_args[name] = convert(extra_args[name])
    if params is not None:
      params = rotate(params)
    updates, inner_state = inner.update(
      rotate(updates), with_moments(moments), params, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    new = EigenbasisState(count, factors, bases, inner_state)
    return rotate_back(updates), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _identities(shape):
  return jnp.broadcast_to(jnp.eye(shape[-1]), shape)


def _next_factors(decay, layout, grads, factors):
  """Adds G Gᵀ and Gᵀ G to the averages, unless they are not finite."""
  weight = jnp.asarray(decay, jnp.float32)

  def average(factor, gram):
    def add(factor, grads):
      new = gram(layout.matrices(grads))
      return _if_finite(weight * factor + (1 - weight) * new, factor)

    if factor is None:
      return None
    return _collectives.with_auto_axes(add, factor)(factor, grads)

  grams = (lambda g: _matmul(g, g.mT)), (lambda g: _matmul(g.mT, g))
  return tuple(map(average, factors, grams))


def _next_bases(layout, factors, bases):
  """Takes one step of orthogonal iteration."""
  del layout

  def iterate(factor_and_basis):
    return jnp.linalg.qr(_matmul(*factor_and_basis))[0]

  def next_side(factor, basis):
    new = jax.lax.platform_dependent(
      (factor, basis),
      # LAPACK calls for a batch inside of a compiled program can wait for each
      # other forever.
      cpu=lambda x: jax.lax.map(iterate, x),
      default=jax.vmap(iterate),
    )
    return _if_finite(new, basis)

  return jax.tree.map(next_side, factors, bases)


def _if_finite(new, old):
  is_finite = jnp.isfinite(new).all(axis=(1, 2), keepdims=True)
  return jnp.where(is_finite, new, old)


def _rotated(layout, bases, x):
  """Returns Pᵀ X Q."""
  left, right = (None if b is None else b.mT for b in bases)
  return _multiplied(layout, left, right, x)


def _rotated_back(layout, bases, x):
  """Returns P X Qᵀ."""
  left, right = bases
  return _multiplied(layout, left, right, x)


def _moved(layout, old, new, x):
  """Returns an array in the new basis that was in the old one."""
  return _rotated(layout, new, _rotated_back(layout, old, x))


def _first_moments(state):
  """Returns trees of first moments, and a function that replaces them."""
  is_moment = lambda path, _: (
    bool(path) and getattr(path[-1], 'name', None) in _FIRST_MOMENTS
  )
  flat, structure = jax.tree_util.tree_flatten_with_path(
    state, is_moment, is_leaf_takes_path=True
  )

  def replaced(moments):
    moments = iter(moments)
    leaves = [next(moments) if is_moment(path, x) else x for path, x in flat]
    return jax.tree.unflatten(structure, leaves)

  return [x for path, x in flat if is_moment(path, x)], replaced


def _multiplied(layout, left, right, x):
  """Returns A X Bᵀ for matrices A and B, None for an identity."""

  def multiply(x, left, right):
    matrices = layout.matrices(x)
    if left is not None:
      matrices = _matmul(left, matrices)
    if right is not None:
      matrices = _matmul(matrices, right.mT)
    return layout.array(matrices).astype(x.dtype)

  return _collectives.with_auto_axes(multiply, x)(x, left, right)
