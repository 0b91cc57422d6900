"""Hutchinson's estimator against the dense Hessian."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax


def loss_fn(params):
  """Not quadratic. Its Hessian couples every pair of coordinates."""
  w, b = params['w'], params['b']
  return jnp.sum(jnp.sin(w)) * jnp.sum(b**3) + jnp.prod(w) + jnp.sum(b * w[0])


@pytest.fixture(name='params')
def _params():
  return {'w': jnp.array([[0.3, -1.2], [0.7, 2.0]]), 'b': jnp.array([0.5, -2])}


def dense_diagonal(loss, params):
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  hessian = jax.jit(jax.hessian(lambda x: loss(unravel(x))))(flat)
  return unravel(jnp.diag(hessian)), hessian


def estimates_for(keys, params, obj_fn=loss_fn, **kwargs):
  """Returns the estimates for these keys, stacked."""
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(**kwargs)

  @jax.jit
  @jax.vmap
  def estimate(key):
    state = sophia_optax.HutchinsonState(key=key)
    return estimator.update(None, state, params, obj_fn=obj_fn)[0]

  return estimate(keys)


def test_mean_over_all_sign_vectors_is_the_diagonal():
  # Finds a key for each of the 2^6 sign vectors, from the signs that optax
  # draws, and averages the estimates.
  with jax.enable_x64(True):
    params = {
      'w': jnp.array([[0.3, -1.2], [0.7, 2.0]]),
      'b': jnp.array([0.5, -2.0]),
    }
    keys = jax.random.split(jax.random.PRNGKey(1), 2000)

    @jax.vmap
    def signs(key):
      probe = optax.tree.random_like(
        jax.random.split(key)[1], params, jax.random.rademacher, jnp.float32
      )
      return jax.flatten_util.ravel_pytree(probe)[0]

    drawn = np.array(signs(keys))
    key_of = {tuple(v): k for v, k in zip(drawn, keys, strict=True)}
    assert set(key_of) == set(itertools.product([-1.0, 1.0], repeat=6))

    estimates = estimates_for(jnp.stack(list(key_of.values())), params)
    mean = jax.tree.map(lambda x: x.mean(axis=0), estimates)
    diagonal, hessian = dense_diagonal(loss_fn, params)
    chex.assert_trees_all_close(mean, diagonal, rtol=1e-12, atol=1e-12)

    # The variance of an entry is the sum of squares off the diagonal.
    variance = jax.tree.map(lambda x: x.var(axis=0), estimates)
    expected = jnp.sum(hessian**2, axis=1) - jnp.diag(hessian) ** 2
    np.testing.assert_allclose(
      jax.flatten_util.ravel_pytree(variance)[0], expected, rtol=1e-10
    )


@pytest.mark.slow
def test_samples_lower_the_variance(params):
  keys = jax.random.split(jax.random.PRNGKey(2), 2000)
  variance = lambda **kwargs: optax.tree.sum(
    jax.tree.map(lambda x: x.var(axis=0), estimates_for(keys, params, **kwargs))
  )
  assert 7 < variance() / variance(num_samples=8) < 9


def test_samples_are_averaged(params):
  # Exactly the mean of the estimates from the keys that it splits into.
  key = jax.random.PRNGKey(3)
  subkeys = jax.random.split(jax.random.split(key)[1], 8)
  probes = jax.vmap(
    lambda k: optax.tree.random_like(k, params, jax.random.rademacher)
  )(subkeys)
  hvps = jax.vmap(lambda v: jax.jvp(jax.grad(loss_fn), (params,), (v,))[1])(
    probes
  )
  expected = jax.tree.map(lambda v, hv: jnp.mean(v * hv, 0), probes, hvps)
  actual = estimates_for(key[None], params, num_samples=8)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], actual), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.usefixtures('optimized')
def test_memory_does_not_grow_with_the_samples():
  params = jnp.ones(10_000)

  def temp_bytes(num_samples):
    estimator = sophia_optax.hutchinson_estimator_diag_hessian(
      num_samples=num_samples
    )
    step = lambda p: estimator.update(
      None, estimator.init(p), p, obj_fn=lambda x: jnp.sum(x**4)
    )[0]
    return jax.jit(step).lower(params).compile().memory_analysis()

  few, many = temp_bytes(2), temp_bytes(64)
  assert many.temp_size_in_bytes <= few.temp_size_in_bytes + 64 * 64


def test_normal_probes():
  # For f = x² the estimate is 2 v², so it shows the probe itself.
  keys = jax.random.split(jax.random.PRNGKey(4), 20_000)
  square = estimates_for(
    keys, jnp.ones(2), lambda x: jnp.sum(x**2), distribution='normal'
  )
  np.testing.assert_allclose(square.mean(0), 2.0, rtol=0.05)
  np.testing.assert_allclose(square.var(0), 8.0, rtol=0.1)


def test_draws_change_with_each_call_and_repeat_from_the_same_key(params):
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(7)
  state = estimator.init(params)
  update = jax.jit(lambda s: estimator.update(None, s, params, obj_fn=loss_fn))
  first, state_2 = update(state)
  second, state_3 = update(state_2)
  again, _ = update(estimator.init(params))
  chex.assert_trees_all_equal(first, again)
  assert not np.allclose(first['w'], second['w'])
  assert len({tuple(np.array(s.key)) for s in (state, state_2, state_3)}) == 3


@pytest.mark.parametrize(
  'make_seed', [int, np.int32, jax.random.PRNGKey, jax.random.key]
)
def test_seeds(make_seed, params):
  seed = make_seed(5)
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(seed)
  expected = estimates_for(jax.random.PRNGKey(5)[None], params)
  for _ in range(2):  # The second time, the first state has been donated.
    state = estimator.init(params)
    update = lambda s: estimator.update(None, s, params, obj_fn=loss_fn)
    estimate, _ = jax.jit(update, donate_argnums=0)(state)
    chex.assert_trees_all_close(
      estimate, jax.tree.map(lambda x: x[0], expected), rtol=1e-5
    )


def test_leaves_of_every_kind():
  params = {
    'f32': jnp.array([1.0, 2.0]),
    'bf16': jnp.array([1.0, 2.0], jnp.bfloat16),
    'f16': jnp.array(3.0, jnp.float16),
    'int': jnp.array([3, 4]),
    'bool': jnp.array(True),
    'complex': jnp.array([1.0 + 2.0j]),
    'none': None,
    'empty': jnp.zeros((0, 3)),
  }
  dtypes = []

  def loss(p):
    z = p['complex']
    dtypes.append(jax.tree.map(lambda x: x.dtype, p))
    return (
      jnp.sum(p['f32'] ** 3)
      + jnp.sum(p['bf16'].astype(jnp.float32) ** 2)
      + p['f16'].astype(jnp.float32) ** 2
      # The curvature of the real part is 6, that of the imaginary part -10.
      + jnp.sum(3 * z.real**2 - 5 * z.imag**2)
      + jnp.sum(p['int']).astype(jnp.float32)
    )

  estimator = sophia_optax.hutchinson_estimator_diag_hessian()
  estimate, _ = estimator.update(
    None, estimator.init(params), params, obj_fn=loss
  )
  expected = {
    'f32': jnp.array([6.0, 12.0]),
    'bf16': jnp.array([2.0, 2.0]),
    'f16': jnp.array(2.0),
    'int': jnp.array([0, 0]),
    'bool': jnp.array(False),
    'complex': jnp.array([6.0 - 10.0j]),
    'none': None,
    'empty': jnp.zeros((0, 3)),
  }
  chex.assert_trees_all_close(estimate, expected, rtol=1e-6)
  chex.assert_trees_all_equal_dtypes(estimate, expected)
  assert all(d == jax.tree.map(lambda x: x.dtype, params) for d in dtypes)


@pytest.mark.parametrize('params', [{}, None, jnp.array(2.0), 2.0], ids=str)
def test_trees_of_every_size(params):
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(num_samples=2)
  obj_fn = lambda p: sum((x**3 for x in jax.tree.leaves(p)), jnp.zeros([]))
  if params is None:
    with pytest.raises(ValueError, match='needs params'):
      estimator.update(None, estimator.init(params), params, obj_fn=obj_fn)
    return
  estimate, _ = estimator.update(
    None, estimator.init(params), params, obj_fn=obj_fn
  )
  chex.assert_trees_all_close(
    estimate, jax.tree.map(lambda x: jnp.float32(12.0), params)
  )


def test_batch_is_passed_to_the_objective(params):
  estimator = sophia_optax.hutchinson_estimator_diag_hessian()
  state = estimator.init(params)
  scaled = lambda p, batch: batch['scale'] * loss_fn(p)
  given, _ = estimator.update(
    None, state, params, obj_fn=scaled, batch={'scale': jnp.float32(2)}
  )
  bound, _ = estimator.update(
    None, state, params, obj_fn=lambda p: 2 * loss_fn(p), unknown='ignored'
  )
  chex.assert_trees_all_close(given, bound, rtol=1e-6)


@pytest.mark.parametrize('loss', [1.0, np.float32(1.0), jnp.array(1.0)])
def test_constant_loss_has_no_curvature(params, loss):
  estimator = sophia_optax.hutchinson_estimator_diag_hessian()
  estimate, _ = estimator.update(
    None, estimator.init(params), params, obj_fn=lambda p: loss
  )
  chex.assert_trees_all_equal(estimate, optax.tree.zeros_like(params))
