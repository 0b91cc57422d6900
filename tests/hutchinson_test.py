"""Hutchinson's estimator: its probes and the kinds of leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sophia_optax

hutchinson = sophia_optax.hutchinson_estimator_diag_hessian
MODES = ('forward_over_reverse', 'reverse_over_reverse', 'finite_difference')


def test_normal_probes():
  # For f = x² the estimate is 2 v², so it shows the probe itself.
  estimator = hutchinson(distribution='normal')
  x = jnp.ones(20_000)
  square = oracles.estimate(estimator, x, obj_fn=lambda x: jnp.sum(x**2))
  np.testing.assert_allclose(np.mean(square), 2.0, rtol=0.05)
  np.testing.assert_allclose(np.var(square), 8.0, rtol=0.1)


@pytest.mark.usefixtures('optimized')
def test_memory_does_not_grow_with_the_samples():
  params = np.ones(10_000, np.float32)

  def temporary(num_samples):
    estimator = hutchinson(num_samples=num_samples)
    step = lambda p: oracles.first(estimator, p, obj_fn=lambda x: jnp.sum(x**4))
    return oracles.temporary_bytes(step, params)

  assert temporary(64) <= temporary(2) + 64 * 64


@pytest.mark.parametrize('hvp', MODES)
def test_leaves_of_every_kind(hvp):
  params = {
    'f32': jnp.array([1.0, 2.0]),
    'zero': jnp.zeros(2),
    'int': jnp.array([3, 4]),
    'bool': jnp.array(True),
    'complex': jnp.array([1.0 + 2.0j]),
    'none': None,
    'empty': jnp.zeros((0, 3)),
  }
  expected = params | {
    'f32': jnp.array([6.0, 12.0]),
    'zero': jnp.array([2.0, 2.0]),
    'int': jnp.array([0, 0]),
    'bool': jnp.array(False),
    # The curvature of the real part is 6, that of the imaginary part -10.
    'complex': jnp.array([6.0 - 10.0j]),
  }
  half = hvp != 'finite_difference'
  if half:
    params |= {
      'bf16': jnp.array([1.0, 2.0], jnp.bfloat16),
      'f16': jnp.array(3.0, jnp.float16),
    }
    expected |= {'bf16': jnp.array([2.0, 2.0]), 'f16': jnp.array(2.0)}

  def loss(p):
    z = p['complex']
    types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert types(p) == types(params)
    total = (
      jnp.sum(p['f32'] ** 3)
      + jnp.sum(p['zero'] ** 2)
      + jnp.sum(3 * z.real**2 - 5 * z.imag**2)
      + jnp.sum(p['int']).astype(jnp.float32)
    )
    for name in ('bf16', 'f16') if half else ():
      total += jnp.sum(p[name].astype(jnp.float32) ** 2)
    return total

  estimate = oracles.estimate(hutchinson(hvp=hvp), params, obj_fn=loss)
  chex.assert_trees_all_close(estimate, expected, rtol=1e-3)
  chex.assert_trees_all_equal_dtypes(estimate, expected)


@pytest.mark.parametrize('hvp', MODES)
def test_no_curvature(hvp):
  estimator = hutchinson(hvp=hvp, num_samples=2)
  constant = lambda p: 1.0
  assert oracles.estimate(estimator, {}, obj_fn=constant) == {}
  zeros = oracles.estimate(estimator, jnp.ones(3), obj_fn=constant)
  np.testing.assert_array_equal(zeros, 0)


def test_python_number():
  estimator = hutchinson(num_samples=2)
  estimate, _ = estimator.update(
    None, estimator.init(2.0), 2.0, obj_fn=lambda x: x**3
  )
  np.testing.assert_allclose(estimate, 12.0)
