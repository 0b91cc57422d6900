"""Runs the conformance suite on all estimators and on mistakes of others."""

import functools

import conformance
import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_optax

PARAMS = {'a': jnp.array([0.5, -0.7]), 'b': jnp.array(2.0)}
INPUTS = jnp.array([[1.0, 2.0], [-1.5, 0.5], [0.3, -0.7], [2.0, 1.0]])


def objective(params, batch=None):
  """Couples every pair of coordinates; the curvature along a[1] is negative."""
  a, b = params['a'], params['b']
  scale = 1.0 if batch is None else jnp.mean(batch)
  return scale * (a[0] ** 2 * b - 3 * a[1] ** 2 + a[0] * a[1] * b + b**3 / 3)


def hessian_diagonal(params):
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  hessian = jax.jit(jax.hessian(lambda x: objective(unravel(x))))(flat)
  return unravel(jnp.diag(hessian))


HESSIAN = conformance.Problem(
  PARAMS, {'obj_fn': objective}, hessian_diagonal(PARAMS)
)
HESSIAN_OF_BATCH = HESSIAN._replace(
  extra_args={'obj_fn': objective, 'batch': jnp.array([0.5, 1.5, 0.8, 1.2])}
)


def predict_fn(w, batch=INPUTS):
  return batch @ w


# Labels at w = 0 are 0 and 1 with equal probability, so all are equally likely.
BITS = conformance.Problem(
  jnp.zeros(2), {'predict_fn': predict_fn}, jnp.mean(INPUTS**2, axis=0) / 4
)
BITS_OF_BATCH = BITS._replace(
  extra_args={'predict_fn': predict_fn, 'batch': INPUTS}
)


def hutchinson(key, **kwargs):
  return sophia_optax.hutchinson_estimator_diag_hessian(key, **kwargs)


def gauss_newton(key, **kwargs):
  return sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    key, likelihood='bernoulli', **kwargs
  )


ESTIMATORS = {
  'hutchinson': (hutchinson, HESSIAN),
  'hutchinson_normal': (
    functools.partial(hutchinson, num_samples=3, distribution='normal'),
    HESSIAN,
  ),
  'hutchinson_microbatched': (
    lambda key: sophia_optax.microbatched(hutchinson(key), 2),
    HESSIAN_OF_BATCH,
  ),
  'gauss_newton': (functools.partial(gauss_newton, num_samples=3), BITS),
  'gauss_newton_microbatched': (
    lambda key: sophia_optax.microbatched(gauss_newton(key), 2),
    BITS_OF_BATCH,
  ),
  'squared_gradient': (
    lambda key: sophia_optax.squared_gradient_estimator_diag_hessian(4),
    conformance.Problem(
      PARAMS,
      {},
      jax.tree.map(lambda p: 4 * p**2, PARAMS),
      grads=PARAMS,
      random=False,
    ),
  ),
}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_estimator(name):
  conformance.check_estimator(*ESTIMATORS[name])


def weighted_objective(weight):
  return {'obj_fn': lambda params: weight * objective(params)}


def weighted_inputs(weight):
  return {'predict_fn': lambda w: jnp.sqrt(weight) * (INPUTS @ w)}


REPLICATED = {
  'hutchinson': (hutchinson, HESSIAN, weighted_objective),
  'gauss_newton': (gauss_newton, BITS, weighted_inputs),
}


@pytest.mark.parametrize('name', REPLICATED)
def test_replicas(name):
  make, problem, extra_args_of = REPLICATED[name]
  conformance.check_replicas(
    lambda key: make(key, axis_name='data'), problem, extra_args_of
  )


# The estimators below are wrong on purpose.


def wrong_hutchinson(probe_fn=None, clamp=False):
  """Hutchinson's estimator with the given probe, or clamped at zero."""

  def make(key):
    def update(updates, key, params=None, *, obj_fn, **extra_args):
      del updates, extra_args
      key, subkey = jax.random.split(key)
      probe = optax.tree.random_like(
        subkey, params, probe_fn or jax.random.rademacher
      )
      hvp = jax.jvp(jax.grad(obj_fn), (params,), (probe,))[1]
      estimate = optax.tree.mul(probe, hvp)
      if clamp:
        estimate = jax.tree.map(lambda e: jnp.maximum(e, 0.0), estimate)
      return estimate, key

    return optax.GradientTransformationExtraArgs(lambda params: key, update)

  return make


def one_key_for_all_leaves(key):
  """Hutchinson's estimator with dependent probes."""

  def update(updates, key, params=None, *, obj_fn, **extra_args):
    del updates, extra_args
    key, subkey = jax.random.split(key)
    probe = jax.tree.map(
      lambda p: jax.random.rademacher(subkey, p.shape, p.dtype), params
    )
    hvp = jax.jvp(jax.grad(obj_fn), (params,), (probe,))[1]
    return optax.tree.mul(probe, hvp), key

  return optax.GradientTransformationExtraArgs(lambda params: key, update)


def always_minus_one(key, shape, dtype):
  # The upper end of randint is not included.
  bits = jax.random.randint(key, shape, 0, 1).astype(dtype)
  return bits * 2 - 1


def true_labels(key):
  """Gauss-Newton-Bartlett with the labels of the data, here all ones."""

  def score(key, outputs):
    return jax.nn.sigmoid(outputs) - 1.0

  return sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    key, likelihood=score
  )


def frozen_key(key):
  """An estimator that forgets to advance its key."""
  inner = hutchinson(key)

  def update(updates, state, params=None, **extra_args):
    return inner.update(updates, state, params, **extra_args)[0], state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def test_the_right_hutchinson_passes():
  conformance.check_draws(wrong_hutchinson(), HESSIAN)


@pytest.mark.parametrize(
  ('make', 'problem', 'found'),
  [
    (wrong_hutchinson(always_minus_one), HESSIAN, 'Constant'),
    (wrong_hutchinson(clamp=True), HESSIAN, 'Biased'),
    (one_key_for_all_leaves, HESSIAN, 'Biased'),
    (true_labels, BITS, 'Constant'),
    (frozen_key, HESSIAN, 'Constant'),
  ],
)
def test_wrong_estimator_is_found(make, problem, found):
  with pytest.raises(AssertionError, match=found):
    conformance.check_draws(make, problem)


def test_sum_over_replicas_is_found():
  if jax.device_count() == 1:
    pytest.skip('With one replica the sum is the mean.')

  # Derivatives with respect to replicated parameters are already sums.
  def make(key):
    average = optax.stateless(
      lambda estimate, params: jax.lax.pmean(estimate, 'data')
    )
    return optax.chain(wrong_hutchinson()(key), average)

  with pytest.raises(AssertionError, match='Replicas'):
    conformance.check_replicas(make, HESSIAN, weighted_objective)
