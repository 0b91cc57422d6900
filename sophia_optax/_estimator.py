"""`sampled_estimator`: makes an estimator from the formula of one draw.

  θ, theta   coordinates of the parameters: real arrays (see `_coordinates`)
  fn         the user's function, as a function of θ alone
  draw       key -> one unbiased estimate, like θ
  ĥ          average of draws over samples, parts of the batch and replicas

This module checks arguments, manages random keys and computes the averages.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import _averages
from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates


class EstimatorState(NamedTuple):
  """State of an estimator with random draws.

  Attributes:
    key: PRNG key for the next draws, raw (shape (2,), uint32) or typed (shape
      ()), like the key that was given.
  """

  key: jax.Array


def sampled_estimator(
  make_draw: Callable[..., Callable[[jax.Array], Any]],
  random_seed: Any | None = None,
  *,
  fn_name: str = 'obj_fn',
  num_samples: int = 1,
  has_aux: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Makes an estimator of the Hessian diagonal from the formula of one draw.

  .. math::
    \hat h = \frac{1}{n D} \sum_{d=1}^D \sum_{i=1}^n \text{draw}(k_{d,i})

  with n draws on each of D replicas, all with different keys. The estimators of
  this library use this function, too. The result supports ``num_samples``,
  ``axis_name``, ``batch=``, ``full_params=`` and ``loss_scale=`` like
  :func:`hutchinson_estimator_diag_hessian`, and works in :func:`microbatched`.

  Args:
    make_draw: ``(theta, fn, **extra_args) -> draw``, where ``draw(key)``
      returns one estimate, a tree like ``theta``. All draws share the values
      that ``make_draw`` computes.

      * ``theta`` is the tree of parameters, with a pair (real part, imaginary
        part) for a complex leaf and None for an integer leaf.
      * ``fn(theta)`` calls the function that was passed to ``update``.
      * ``extra_args`` are ``random_like``, ``label_mask``, ``loss_scale`` and
        the other extra arguments of ``update``.
      * ``random_like(key, theta, sampler)`` draws random arrays like ``theta``.
        ``sampler(key, shape, dtype)`` is a function such as
        :func:`jax.random.normal`. If an array is divided over devices, its
        shards get independent draws.
      * ``head_fn(theta, hidden)`` calls the ``head_fn`` that was passed to
        ``update``, if any.
    random_seed: Seed: an integer, a raw or a typed PRNG key. None means 0.
    fn_name: ``'obj_fn'`` for a function that returns the loss, or
      ``'predict_fn'`` for one that returns the outputs of the model. With
      ``loss_scale=s``, ``obj_fn`` returns s times the loss, and the estimate is
      divided by s. The draws must therefore be linear in ``obj_fn``.
    num_samples: Number n of draws to average.
    has_aux: Whether the function returns ``(value, aux)``.
    axis_name: Mapped axis or axes over which to average, see
      :func:`hutchinson_estimator_diag_hessian`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose ``update`` returns
    an estimate in place of the gradients.

  Raises:
    ValueError: If ``num_samples`` is less than 1 or ``fn_name`` is unknown. In
      ``update``, if a required argument is missing.
    TypeError: In ``update``, if the function can't be called as documented or
      returns the wrong type.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sophia_optax
    >>> def make_draw(theta, loss, *, random_like, **extra_args):
    ...   def draw(key):
    ...     probe = random_like(key, theta, jax.random.normal)
    ...     _, curvature = jax.jvp(jax.grad(loss), (theta,), (probe,))
    ...     return optax.tree.mul(probe, curvature)
    ...   return draw
    >>> estimator = sophia_optax.sampled_estimator(make_draw, num_samples=4000)
    >>> x = jnp.array([1.0, 2.0])
    >>> estimate, _ = estimator.update(
    ...     None, estimator.init(x), x, obj_fn=lambda x: jnp.sum(x**3))
    >>> print(bool(jnp.allclose(estimate, 6 * x, rtol=0.1)))
    True
  """
  num_samples = _checks.whole_number('num_samples', num_samples, at_least=1)
  _checks.one_of('fn_name', fn_name, ('obj_fn', 'predict_fn'))
  random_like = functools.partial(_collectives.random_like, axis_name=axis_name)

  def init_fn(params):
    del params
    return EstimatorState(key=_make_key(random_seed))

  def update_fn(
    updates,
    state,
    params=None,
    *,
    batch=None,
    full_params=None,
    loss_scale=None,
    label_mask=None,
    head_fn=None,
    sophia_request=None,
    **extra_args,
  ):
    del updates
    _checks.given('params', params, 'the estimator')
    fn = extra_args.pop(fn_name, None)
    _checks.given(fn_name, fn, 'the estimator', extra_args)
    _check_complete(fn_name, params, full_params)
    _checks.mapped_axes(axis_name)
    theta = _collectives.vary(_coordinates.split(params, params), axis_name)
    zeros = optax.tree.zeros_like(_coordinates.widen(theta))

    def params_of(theta):
      return _coordinates.fill(_coordinates.join(params, theta), full_params)

    def head_of_theta(theta, hidden):
      arguments = {'params': params_of(theta), 'hidden': hidden}
      return _array_of('head_fn', _checks.call('head_fn', head_fn, arguments))

    def estimate(key, batch=None, label_mask=None):
      def fn_of_theta(theta):
        arguments = {'params': params_of(theta)}
        arguments |= {} if batch is None else {'batch': batch}
        value = _checks.call(fn_name, fn, arguments)
        value = _array_of(fn_name, value, has_aux)
        if fn_name == 'obj_fn':
          _checks.local(value, theta, axis_name)
        return value

      extra = {'label_mask': label_mask, 'loss_scale': loss_scale}
      if head_fn is not None:
        extra['head_fn'] = head_of_theta
      draw = make_draw(
        theta, fn_of_theta, random_like=random_like, **extra, **extra_args
      )
      key, subkey = jax.random.split(key)
      subkey = _collectives.fold_in_index(subkey, _collectives.names(axis_name))
      return _averages.over_draws(draw, subkey, num_samples, zeros), key

    num_parts = None if sophia_request is None else sophia_request.grant()
    if num_parts is None:
      mean, key = estimate(state.key, batch, label_mask)
    else:
      split = _averages.split_batch(batch, label_mask, num_parts, axis_name)
      mean, key = _averages.over_parts(estimate, *split, zeros, state.key)
    if fn_name == 'obj_fn':
      mean = _coordinates.unscale(mean, loss_scale)
    mean = _collectives.mean(mean, axis_name)
    mean = _coordinates.join(_coordinates.zeros_like(params), mean)
    return mean, state._replace(key=key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.tree_util.register_static
class Request:
  """A request to an estimator, and whether one has granted it.

  It is passed as an extra argument of `update`. Chains and other wrappers
  forward it to the estimator or ignore it. An estimator that grants the request
  divides its estimate by `loss_scale`. If `num_parts` is not None, it also
  averages over this number of parts of the batch. It is compared by identity,
  so that :func:`jax.jit` does not reuse a trace that granted another request.
  """

  def __init__(self, num_parts: int | None = None):
    self.num_parts = num_parts
    self.is_granted = False

  def grant(self) -> int | None:
    self.is_granted = True
    return self.num_parts


def uses(fn: Callable[[Any], Any], x: Any) -> bool:
  """Whether an operation of `fn(x)` has x as an operand. This traces `fn`."""
  jaxpr = jax.make_jaxpr(fn)(x).jaxpr
  return any(jaxpr.invars[0] in equation.invars for equation in jaxpr.eqns)


def is_sampled(state: Any) -> bool:
  """Whether a state is that of a sampled estimator, or contains one."""
  is_ours = lambda x: isinstance(x, EstimatorState)
  return any(map(is_ours, jax.tree.leaves(state, is_leaf=is_ours)))


def _make_key(random_seed):
  """Returns a new copy of the key, because states may be donated."""
  seed = 0 if random_seed is None else random_seed
  dtype = getattr(seed, 'dtype', np.result_type(type(seed)))
  is_integer = jnp.issubdtype(dtype, jnp.integer)
  is_typed_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if is_typed_key or (is_integer and np.ndim(seed)):
    return jnp.copy(seed)
  if not is_integer:
    raise TypeError(
      f'random_seed must be an integer or a PRNG key, got {seed!r}. For'
      ' example, pass random_seed=0 or random_seed=jax.random.key(0).'
    )
  return jax.random.PRNGKey(seed)


def _check_complete(name, params, full_params):
  """Raises if parameters are masked and `full_params` is missing."""
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  holes = [
    jax.tree_util.keystr(path) or 'the root'
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_hole)
    if is_hole(leaf)
  ]
  if holes and full_params is None:
    raise ValueError(
      f'{name} needs all parameters, but optax.masked or optax.partition hides'
      f' those at {", ".join(holes[:3])}{", ..." if holes[3:] else ""}. Pass'
      ' all of them: update(grads, state, params, full_params=params, ...).'
      ' Curvature is still estimated only for the parameters that are not'
      ' hidden.'
    )


def _array_of(name, value, has_aux=False):
  """Returns the array in the result of the user's function, or raises."""
  is_pair = isinstance(value, tuple) and len(value) == 2
  if has_aux and is_pair:
    value = value[0]
  is_array = isinstance(value, (jax.Array, np.ndarray, np.generic, float))
  got, is_real = f'a {type(value).__name__}', False
  if is_array:
    dtype, shape = jnp.result_type(value), np.shape(value)
    got = f'{dtype} of shape {shape}'
    is_real = jnp.issubdtype(dtype, jnp.floating)
  if has_aux and not is_pair:
    need = 'a pair (value, aux)'
    fix = 'Return a pair, or remove has_aux=True from the estimator.'
  elif name == 'obj_fn' and not (is_real and shape == ()):
    need = 'only the loss, a real floating point scalar'
    fix = 'Reduce it, as in jnp.mean(losses), or cast it.'
  elif not is_real:
    need = 'one real floating point array, the logits or means'
    fix = 'Return that array alone, or cast it.'
  else:
    return value
  if not is_array and not has_aux and name != 'head_fn':
    fix = 'If it returns (value, aux), pass has_aux=True to the estimator.'
  raise TypeError(f'{name} must return {need}, got {got}. {fix}')
