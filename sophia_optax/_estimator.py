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


class DrawTools(NamedTuple):
  """What `make_draw` gets beside θ and the user's function."""

  random_like: Callable[..., Any]
  params_of: Callable[[Any], Any]


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
    make_draw: ``(theta, fn, tools, /, **extra_args) -> draw``, where
      ``draw(key)`` returns one estimate, a tree like ``theta``. All draws share
      the values that ``make_draw`` computes.

      * ``theta`` is the tree of parameters, with a pair (real part, imaginary
        part) for a complex leaf and None for an integer leaf.
      * ``fn(theta)`` calls the function that was passed to ``update``.
      * ``tools.random_like(key, theta, sampler)`` draws random arrays like
        ``theta``. ``sampler(key, shape, dtype)`` is a function such as
        :func:`jax.random.normal`. If an array is divided over devices, its
        shards get independent draws.
      * ``tools.params_of(theta)`` returns the tree that ``fn`` passes to the
        function.
      * ``extra_args`` are ``label_mask``, ``loss_scale`` and the other extra
        arguments of ``update``. Make the first three arguments positional-only,
        so that an extra argument may have any name.
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
    TypeError: In ``update``, if the function returns a tuple without
      ``has_aux``, or no tuple with it.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sophia_optax
    >>> def make_draw(theta, loss, tools, /, **extra_args):
    ...   def draw(key):
    ...     probe = tools.random_like(key, theta, jax.random.normal)
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
  num_samples = _checks.whole_number('num_samples', num_samples, 1)
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
    microbatches=None,
    **extra_args,
  ):
    del updates
    _checks.given('params', params, 'the estimator')
    fn = extra_args.pop(fn_name, None)
    if fn is None and fn_name == 'obj_fn':  # Line searches get a value_fn.
      fn = extra_args.get('value_fn')
    _checks.given(fn_name, fn, 'the estimator', extra_args)
    _checks.mapped_axes(axis_name)
    theta = _collectives.vary(_coordinates.split(params, params), axis_name)
    zeros = optax.tree.zeros_like(_coordinates.widen(theta))

    def params_of(theta):
      return _coordinates.fill(_coordinates.join(params, theta), full_params)

    def estimate(key, batch=None, label_mask=None):
      def fn_of_theta(theta):
        arguments = (params_of(theta), batch)[: 1 if batch is None else 2]
        value = _value(fn_name, fn(*arguments), has_aux)
        if fn_name == 'obj_fn':
          _checks.local(value, theta, axis_name)
        return value

      draw = make_draw(
        theta,
        fn_of_theta,
        DrawTools(random_like, params_of),
        label_mask=label_mask,
        loss_scale=loss_scale,
        **extra_args,
      )
      key, subkey = jax.random.split(key)
      subkey = _collectives.fold_in_index(subkey, _collectives.names(axis_name))
      return _averages.over_draws(draw, subkey, num_samples, zeros), key

    if microbatches is None:
      mean, key = estimate(state.key, batch, label_mask)
    else:
      mean, key = _averages.over_microbatches(
        estimate, microbatches, zeros, state.key, axis_name
      )
    if fn_name == 'obj_fn':
      mean = _coordinates.unscale(mean, loss_scale)
    mean = _collectives.mean(mean, axis_name)
    mean = _coordinates.join(_coordinates.zeros_like(params), mean)
    return mean, state._replace(key=key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _make_key(random_seed):
  """Returns a new copy of the key, because states may be donated."""
  seed = 0 if random_seed is None else random_seed
  is_typed = jnp.issubdtype(getattr(seed, 'dtype', int), jax.dtypes.prng_key)
  if is_typed or np.ndim(seed):
    return jnp.copy(seed)
  raw_keys = jax.config.jax_legacy_prng_key  # type: ignore[attr-defined]
  return (jax.random.PRNGKey if raw_keys == 'allow' else jax.random.key)(seed)


def _value(name, result, has_aux):
  """Returns the value in the result of the user's function, or raises."""
  if isinstance(result, tuple) != has_aux:
    raise TypeError(
      f'{name} must return (value, aux) if has_aux=True is passed to the'
      f' estimator, and the value alone if not, got {result!r}.'
    )
  return result[0] if has_aux else result
