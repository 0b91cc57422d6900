"""Hessian-vector products: their bias, the step of differences, kernels."""

import chex
from devices import map_grid
import jax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

hutchinson = sophia_optax.hutchinson_estimator_diag_hessian
MODES = ('forward_over_reverse', 'reverse_over_reverse', 'finite_difference')


def estimate(params, obj_fn, hvp=MODES[0], **options):
  return oracles.estimate(hutchinson(hvp=hvp, **options), params, obj_fn=obj_fn)


def difference(params, obj_fn, **options):
  return estimate(params, obj_fn, hvp='finite_difference', **options)


# Bias.


# docs/mathematics.md has these figures.
@pytest.mark.parametrize(
  ('hvp', 'dtype', 'least', 'largest'),
  [
    ('forward_over_reverse', jnp.float32, 0.0, 1e-6),
    ('reverse_over_reverse', jnp.float32, 0.0, 1e-6),
    ('finite_difference', jnp.float32, 3e-4, 1e-3),
    pytest.param(*(MODES[0], jnp.bfloat16, 1e-4, 1e-2), marks=pytest.mark.slow),
    ('finite_difference', jnp.bfloat16, 0.01, 0.05),
  ],
)
def test_bias_over_all_probes(hvp, dtype, least, largest):
  estimator = hutchinson(hvp=hvp)

  @jax.jit
  @jax.vmap
  def estimates(key):
    state = sophia_optax.HutchinsonState(key)
    obj_fn = lambda p: oracles.network_loss(p, dtype)
    return oracles.flat(
      estimator.update(None, state, oracles.NETWORK, obj_fn=obj_fn)[0]
    )

  found = np.array(estimates(oracles.all_signs()), np.float64)
  hessian = oracles.hessian(
    lambda p: oracles.network_loss(p, jnp.float32), oracles.NETWORK
  )
  diagonal = np.diag(hessian)
  bias = np.linalg.norm(found.mean(0) - diagonal) / np.linalg.norm(diagonal)
  # The variance of an entry is the sum of squares off the diagonal.
  variance = np.sum(found.var(0)) / (np.sum(hessian**2) - np.sum(diagonal**2))
  assert least <= bias <= largest
  np.testing.assert_allclose(variance, 1.0, atol=10 * largest)


# The step of finite differences.


def test_step_scales_with_the_parameters():
  # If the parameters are a million times smaller, the curvature is 1e12 times
  # larger.
  def loss(x):
    return jnp.sum(jnp.cos(x)) + jnp.prod(x[:4]) + jnp.sum(x) ** 3

  # Zeros, like new biases, do not count in the step.
  x, scale = np.float32([0.3, -1.2, 0.7, 2.0, 0.0, 0.0, 0.0]), 2.0**-20
  got = difference(x * scale, lambda y: loss(y / scale)) * scale**2
  np.testing.assert_allclose(got, difference(x, loss), rtol=1e-3)
  exact = estimate(x, loss)
  np.testing.assert_allclose(got, exact, rtol=1e-2)
  assert np.any(np.abs(got / exact - 1) > 1e-5)  # It is not exact.


def test_curvature_is_that_of_the_step_as_rounded():
  # Rounding changes 3000.7 + δ by a large part of δ.
  x = np.float32([3000.7, *500 * [0.02]])
  curvature = np.linspace(1.0, 2.0, x.size, dtype=np.float32)
  loss = lambda y: jnp.sum(curvature * (y - x) ** 2) / 2
  options = {'distribution': 'normal', 'random_seed': 3}
  got, exact = difference(x, loss, **options), estimate(x, loss, **options)
  moved = np.abs(exact) > 1.0
  assert moved[0]
  np.testing.assert_allclose(got[moved], exact[moved], rtol=1e-4)


def test_a_parameter_too_large_for_the_step_has_zero_curvature():
  x = np.float32([1e7, *500 * [0.02]])
  got = difference(x, lambda y: jnp.sum(y**2) / 2)
  assert got[0] == 0.0
  np.testing.assert_allclose(got[1:], 1.0, rtol=1e-4)


def test_float64():
  def loss(p):
    return jnp.sum(p['w'] ** 4) + p['b'].astype(p['w'].dtype) ** 3 * p['w'][0]

  with jax.enable_x64(True):
    params = {'w': np.array([0.3, -1.2]), 'b': np.array(0.5)}
    # One leaf in float32 needs the larger step.
    for tree, rtol in (params, 1e-8), (params | {'b': np.float32(0.5)}, 1e-2):
      got, exact = difference(tree, loss), estimate(tree, loss)
      chex.assert_trees_all_close(got, exact, rtol=rtol)
      chex.assert_trees_all_equal_dtypes(got, exact)


def test_half_precision_parameters_are_an_error():
  params = {'w': jnp.ones(3), 'b': jnp.ones(3, jnp.bfloat16)}
  loss = lambda p: jnp.sum(p['w'] ** 3 + p['b'].astype(jnp.float32))
  with pytest.raises(TypeError, match=r"bfloat16 at \['b'\].*cast them"):
    difference(params, loss)
  # Parameters of another optimizer may be in half precision.
  masked = optax.masked(
    hutchinson(hvp='finite_difference'), {'w': True, 'b': False}
  )
  got, _ = jax.jit(
    lambda p: masked.update(
      p, masked.init(p), p, obj_fn=loss, full_params=params
    )
  )(params)
  np.testing.assert_allclose(got['w'], 6.0, rtol=1e-3)


def test_divided_parameters():
  # The parts differ in size, but all devices must use the same step, because b
  # is replicated.
  params = {
    'w': jnp.array([1.0, -2.0, 0.1, 0.2, 30.0, 40.0, -0.1, 0.3]),
    'b': jnp.array(0.2),
  }
  specs = {'w': P('model'), 'b': P()}
  inputs = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32) / 8

  def update(params, inputs):
    def obj_fn(p):  # Its gradient is quadratic, so differences are exact.
      y = jax.lax.psum(inputs @ p['w'], 'model') + p['b']
      return jnp.mean(y**3)

    estimators = [hutchinson(hvp=hvp, axis_name='data') for hvp in MODES]
    return [oracles.first(e, params, obj_fn=obj_fn) for e in estimators]

  expected, *others = map_grid(
    update,
    params,
    inputs,
    specs=(specs, P('data', 'model')),
    out_specs=[specs] * 3,
  )
  for got in others:
    chex.assert_trees_all_close(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_memory_is_that_of_a_gradient():
  inputs, params = jnp.ones((1024, 16)), jnp.ones((4, 16, 16))

  def loss(params):
    x = inputs
    for w in params:
      x = jnp.tanh(x @ w)
    return jnp.mean(x**2)

  def temporary(hvp):
    estimator = hutchinson(hvp=hvp)
    step = lambda params: oracles.first(estimator, params, obj_fn=loss)
    return oracles.temporary_bytes(step, params)

  gradient = oracles.temporary_bytes(jax.grad(loss), params)
  assert temporary('finite_difference') < 1.3 * gradient
  assert temporary('forward_over_reverse') > 1.5 * gradient


# Fused kernels and other functions with backward rules of their own. JAX's
# error has a note if only the second derivative is missing.


def assert_refused(hvp, obj_fn, params, match):
  with pytest.raises(Exception, match=match) as caught:
    estimate(params, obj_fn, hvp)
  assert 'finite_difference' in ' '.join(caught.value.__notes__)


def power(backward):
  """x³ with a backward rule that takes x² from `backward`."""
  fn = jax.custom_vjp(lambda x: x**3)
  fn.defvjp(lambda x: (x**3, x), lambda x, g: (3 * g * backward(x),))
  return lambda x: jnp.sum(fn(x))


def callback(x):
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return jax.pure_callback(lambda y: np.square(y), shape, x)


def loop(x):
  return jax.lax.while_loop(
    lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * x), (0, jnp.ones_like(x))
  )[1]


@pytest.mark.parametrize(
  ('backward', 'without'), [(callback, MODES[:2]), (loop, MODES[1:2])]
)
def test_backward_rule_without_a_derivative(backward, without):
  loss, x = power(backward), np.float32([1.0, 2.0])
  for hvp in MODES:
    if hvp in without:
      assert_refused(hvp, loss, x, 'callbacks|Reverse-mode')
    else:
      np.testing.assert_allclose(estimate(x, loss, hvp), 6 * x, rtol=1e-3)


def test_backward_rule_that_raises_a_runtime_error():
  # Diffrax's BacksolveAdjoint: its backward rule refuses tangents.
  @jax.custom_jvp
  def square(x):
    return x**2

  @square.defjvp
  def _(primals, tangents):
    raise RuntimeError('Unexpected tangent.')

  loss, x = power(square), np.float32([1.0, 2.0])
  for hvp in MODES[:2]:
    assert_refused(hvp, loss, x, 'Unexpected tangent')
  np.testing.assert_allclose(difference(x, loss), 6 * x, rtol=1e-3)


SIZE = 128  # The smallest that the kernel takes.
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(SIZE, SIZE)).astype(np.float32)
PARAMS = {
  'qkv': jnp.float32(RNG.normal(1, 1 / 4, (3, SIZE))),
  'out': jnp.float32(RNG.normal(0, 1 / 10, (SIZE, 2))),
}


def head_loss(out, params):
  return optax.softmax_cross_entropy_with_integer_labels(
    out @ params['out'], (TOKENS[:, 0] > 0).astype(int)
  ).mean()


def flash_loss(params):
  q, k, v = (TOKENS * w for w in params['qkv'])  # (T, C)
  out = flash_attention.flash_attention(
    q[None, None], k[None, None], v[None, None], sm_scale=SIZE**-0.5
  )[0, 0]
  return head_loss(out, params)


def test_flash_attention_has_no_second_derivative():
  with pltpu.force_tpu_interpret_mode():
    assert_refused(MODES[0], flash_loss, PARAMS, 'Higher-order AD')


@pytest.mark.slow
def test_curvature_of_flash_attention():
  def plain_loss(params):
    q, k, v = (TOKENS * w for w in params['qkv'])
    return head_loss(jax.nn.softmax(q @ k.T * SIZE**-0.5) @ v, params)

  with pltpu.force_tpu_interpret_mode():
    got = difference(PARAMS, flash_loss)
  exact = estimate(PARAMS, plain_loss)
  for name in PARAMS:
    error = np.linalg.norm(got[name] - exact[name])
    assert error < 0.03 * np.linalg.norm(exact[name])
