"""Compares other Hessian-vector products with forward over reverse."""

import functools
import itertools

import chex
from devices import map_grid
from devices import MAPS
from devices import maps
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax

hutchinson = sophia_optax.hutchinson_estimator_diag_hessian
OTHER_MODES = ('reverse_over_reverse', 'finite_difference')
MODES = ('forward_over_reverse', *OTHER_MODES)
PARAMS = {
  'w': jnp.array([[0.3, -1.2, 0.4], [0.7, 2.0, -0.5]]),
  'b': jnp.array([0.5, -2.0]),
}
BATCH = jax.random.normal(jax.random.PRNGKey(0), (8, 3))


def cubic(params, batch=BATCH):
  """Its gradient is quadratic, so central differences are exact."""
  y = batch @ params['w'].T + params['b']
  return jnp.mean(jnp.sum(y, axis=1) ** 3) / 30 + jnp.mean(y**2)


def estimate(
  params, obj_fn, key=jax.random.PRNGKey, wrap=lambda e: e, **options
):
  extra = options.pop('extra', {})
  estimator = wrap(hutchinson(key(3), **options))
  update = lambda p: estimator.update(
    None, estimator.init(p), p, obj_fn=obj_fn, **extra
  )[0]
  return jax.jit(update)(params)


def assert_like_forward_over_reverse(run, rtol=1e-3):
  """Compares `run(hvp)` for all values of hvp, with the same probes."""
  expected = run('forward_over_reverse')
  assert any(np.any(x) for x in jax.tree.leaves(expected))
  for hvp in OTHER_MODES:
    got = run(hvp)
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=rtol)
    chex.assert_trees_all_equal_dtypes(got, expected)


OPTIONS = {
  'plain': {},
  'typed_key': {'key': jax.random.key},
  'normal': {'distribution': 'normal'},
  'samples': {'num_samples': 3},
  'aux': {'has_aux': True, 'obj_fn': lambda p: (cubic(p), 'aux')},
  'batch': {'extra': {'batch': BATCH[:4]}},
  'parts': {
    'wrap': lambda e: sophia_optax.microbatched(e, 4),
    'extra': {'batch': BATCH},
  },
  'loss_scale': {
    'obj_fn': lambda p: 2.0**10 * cubic(p),
    'extra': {'loss_scale': 2.0**10},
  },
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ('typed_key', 'normal', 'samples', 'batch')
    else name
    for name in OPTIONS
  ],
)
def test_options(name):
  options = {'obj_fn': cubic} | OPTIONS[name]
  assert_like_forward_over_reverse(
    lambda hvp: estimate(PARAMS, hvp=hvp, **options)
  )


def test_leaves_of_every_kind():
  params = {
    'f32': jnp.array([1.0, 2.0]),
    'complex': jnp.array([1.0 + 2.0j]),
    'int': jnp.array([3, 4]),
    'bool': jnp.array(True),
    'none': None,
    'empty': jnp.zeros((0, 3)),
    'zero': jnp.zeros(2),
  }

  def loss(p):
    z = p['complex']
    n = jnp.sum(p['int']).astype(jnp.float32)
    return (
      n * jnp.sum(p['f32'] ** 3)
      + jnp.sum(3 * z.real**2 * p['f32'] - 5 * z.imag**2)
      + jnp.sum(p['zero'] ** 2 * p['f32'])
    )

  assert_like_forward_over_reverse(lambda hvp: estimate(params, loss, hvp=hvp))


@pytest.mark.parametrize('hvp', MODES)
def test_no_parameters_and_no_curvature(hvp):
  assert estimate({}, lambda p: jnp.zeros([]), hvp=hvp) == {}
  zeros = optax.tree.zeros_like(PARAMS)
  chex.assert_trees_all_equal(estimate(PARAMS, lambda p: 1.0, hvp=hvp), zeros)
  at_zero = estimate(zeros, lambda p: jnp.sum(p['w'] ** 2), hvp=hvp)
  np.testing.assert_allclose(at_zero['w'], 2.0, rtol=1e-5)


def test_hidden_parameters():
  mask = {'w': True, 'b': False}

  def run(hvp):
    return estimate(
      PARAMS,
      cubic,
      hvp=hvp,
      wrap=lambda e: optax.chain(
        optax.stateless(lambda g, params: params), optax.masked(e, mask)
      ),
      extra={'full_params': PARAMS},
    )

  assert_like_forward_over_reverse(run)


def test_float64():
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    batch = BATCH.astype(jnp.float64)
    quartic = lambda p: cubic(p, batch) + jnp.sum(p['w'] ** 4)
    assert_like_forward_over_reverse(
      lambda hvp: estimate(params, quartic, hvp=hvp), rtol=1e-8
    )
    # One leaf in float32 needs the larger step.
    mixed = params | {'b': PARAMS['b']}
    widened = lambda p: cubic(p | {'b': p['b'].astype(jnp.float64)}, batch)
    assert_like_forward_over_reverse(
      lambda hvp: estimate(mixed, widened, hvp=hvp), rtol=1e-4
    )


@maps
def test_replicas(map_name):
  params = {'w': jnp.array([0.5, -1.0, 0.3]), 'b': jnp.array(0.2)}

  def run(hvp):
    estimator = hutchinson(hvp=hvp, axis_name='data')

    def update(params, shard):
      obj_fn = lambda p: jnp.mean((shard @ p['w'] + p['b']) ** 3)
      return estimator.update(
        None, estimator.init(params), params, obj_fn=obj_fn
      )[0]

    return MAPS[map_name](update)(params)

  assert_like_forward_over_reverse(run)


def test_divided_parameters():
  # The parts differ in size, but all devices must use the same step, because b
  # is replicated.
  params = {
    'w': jnp.array([1.0, -2.0, 0.1, 0.2, 30.0, 40.0, -0.1, 0.3]),
    'b': jnp.array(0.2),
  }
  specs = {'w': P('model'), 'b': P()}
  inputs = jax.random.normal(jax.random.PRNGKey(1), (4, 8)) / 8

  def run(hvp):
    estimator = hutchinson(hvp=hvp, axis_name='data')

    def update(params, inputs):
      def obj_fn(p):
        y = jax.lax.psum(inputs @ p['w'], 'model') + p['b']
        return jnp.mean(y**3)

      return estimator.update(
        None, estimator.init(params), params, obj_fn=obj_fn
      )[0]

    return map_grid(
      update, params, inputs, specs=(specs, P('data', 'model')), out_specs=specs
    )

  assert_like_forward_over_reverse(run, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_sharded(axis_type):
  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(axis_type,) * 2)
  place = lambda x, *spec: jax.device_put(
    x, jax.sharding.NamedSharding(mesh, P(*spec))
  )
  params = {'w': jax.random.normal(jax.random.PRNGKey(1), (8, 3))}
  inputs = jax.random.normal(jax.random.PRNGKey(2), (4, 3))
  loss = lambda p, x: jnp.mean((x @ p['w'].T) ** 3)

  def run(hvp, params, inputs):
    options = {'hvp': hvp, 'extra': {'batch': inputs}, 'num_samples': 2}
    return estimate(params, loss, **options)

  with jax.set_mesh(mesh):
    placed = {'w': place(params['w'], 'model')}, place(inputs, 'data')
    got = {hvp: run(hvp, *placed) for hvp in MODES}
    assert_like_forward_over_reverse(got.get)
  for hvp, sharded in got.items():
    assert sharded['w'].sharding.spec[0] == 'model'
    chex.assert_trees_all_close(
      jax.device_get(sharded), run(hvp, params, inputs), rtol=1e-3, atol=1e-4
    )


# Finite differences: the step.


def difference(params, obj_fn, **options):
  return estimate(params, obj_fn, hvp='finite_difference', **options)


def test_step_scales_with_the_parameters():
  # If the parameters are a million times smaller, the curvature is 1e12 times
  # larger.
  def loss(x):
    return jnp.sum(jnp.cos(x)) + jnp.prod(x[:4]) + jnp.sum(x) ** 3

  # Zeros, like new biases, do not count in the step.
  x, scale = jnp.array([0.3, -1.2, 0.7, 2.0, 0.0, 0.0, 0.0]), 2.0**-20
  got = difference(x * scale, lambda y: loss(y / scale)) * scale**2
  np.testing.assert_allclose(got, difference(x, loss), rtol=1e-3)
  exact = estimate(x, loss)
  np.testing.assert_allclose(got, exact, rtol=1e-2)
  assert np.any(np.abs(got / exact - 1) > 1e-5)  # It is not exact.


@pytest.mark.parametrize('distribution', ['rademacher', 'normal'])
def test_curvature_is_that_of_the_step_as_rounded(distribution):
  # Rounding changes 3000.7 + δ by a large part of δ.
  x = jnp.concatenate([jnp.array([3000.7]), jnp.full(500, 0.02)])
  curvature = jnp.linspace(1.0, 2.0, x.size)
  loss = lambda y: jnp.sum(curvature * (y - x) ** 2) / 2
  options = {'distribution': distribution}
  got, exact = difference(x, loss, **options), estimate(x, loss, **options)
  moved = np.abs(exact) > 1.0 if distribution == 'normal' else exact > 0
  assert moved[0]
  np.testing.assert_allclose(got[moved], exact[moved], rtol=1e-4)


def test_a_parameter_too_large_for_the_step_has_zero_curvature():
  x = jnp.concatenate([jnp.array([1e7]), jnp.full(500, 0.02)])
  got = difference(x, lambda y: jnp.sum(y**2) / 2)
  assert got[0] == 0.0
  np.testing.assert_allclose(got[1:], 1.0, rtol=1e-4)


@pytest.mark.slow
def test_memory_is_that_of_a_gradient():
  inputs = jnp.ones((1024, 16))
  params = jnp.ones((4, 16, 16))

  def loss(params):
    x = inputs
    for w in params:
      x = jnp.tanh(x @ w)
    return jnp.mean(x**2)

  def temp_bytes(fn):
    memory = jax.jit(fn).lower(params).compile().memory_analysis()
    return memory.temp_size_in_bytes

  def update(hvp, params):
    estimator = hutchinson(hvp=hvp)
    return estimator.update(None, estimator.init(params), params, obj_fn=loss)[
      0
    ]

  gradient = temp_bytes(jax.grad(loss))
  bytes_of = {h: temp_bytes(functools.partial(update, h)) for h in MODES}
  assert bytes_of['finite_difference'] < 1.3 * gradient
  assert bytes_of['forward_over_reverse'] > 1.5 * gradient  # What it saves.


INPUTS = jax.random.normal(jax.random.PRNGKey(4), (64, 2))
LABELS = jnp.sum(INPUTS, axis=1) + INPUTS[:, 0] * INPUTS[:, 1] > 0
NETWORK = {
  'a': jnp.array([[0.9, -0.3], [0.4, 0.7]]),
  'c': jnp.array([[-0.6, 0.5], [0.8, 1.1]]),
}


def network_loss(params, dtype):
  """Two layers with activations and cast weights of this dtype."""
  a, c = params['a'].astype(dtype), params['c'].astype(dtype)
  logits = jnp.tanh(INPUTS.astype(dtype) @ a) @ c
  logits = logits.astype(params['a'].dtype)
  picked = jnp.where(LABELS, logits[:, 1], logits[:, 0])
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@functools.cache
def all_signs():
  """Returns a key for each of the 256 probes of the network."""
  keys = jax.random.split(jax.random.PRNGKey(5), 4000)
  probe = lambda key: optax.tree.random_like(
    jax.random.split(key)[1], NETWORK, jax.random.rademacher
  )
  signs = jax.jit(
    jax.vmap(lambda key: jax.flatten_util.ravel_pytree(probe(key))[0])
  )(keys)
  key_of = {tuple(v): k for v, k in zip(np.array(signs), keys, strict=True)}
  assert set(key_of) == set(itertools.product([-1.0, 1.0], repeat=8))
  return jnp.stack(list(key_of.values()))


def moments(hvp, dtype):
  """Returns bias and variance over all probes, relative to the Hessian's."""
  estimator = hutchinson(hvp=hvp)

  def one(key):
    state = sophia_optax.HutchinsonState(key)
    obj_fn = lambda p: network_loss(p, dtype)
    tree = estimator.update(None, state, NETWORK, obj_fn=obj_fn)[0]
    return jax.flatten_util.ravel_pytree(tree)[0]

  estimates = np.array(jax.jit(jax.vmap(one))(all_signs()), np.float64)
  flat, unravel = jax.flatten_util.ravel_pytree(NETWORK)
  loss = lambda x: network_loss(unravel(x), jnp.float32)
  hessian = np.array(jax.jit(jax.hessian(loss))(flat))
  diagonal = np.diag(hessian)
  spread = np.sum(hessian**2) - np.sum(diagonal**2)
  bias = np.linalg.norm(estimates.mean(0) - diagonal)
  return (bias / np.linalg.norm(diagonal), np.sum(estimates.var(0)) / spread)


# docs/mathematics.md has these figures.
@pytest.mark.parametrize(
  ('hvp', 'dtype', 'least', 'largest'),
  [
    ('forward_over_reverse', jnp.float32, 0.0, 1e-6),
    ('reverse_over_reverse', jnp.float32, 0.0, 1e-6),
    ('finite_difference', jnp.float32, 1e-5, 1e-3),
    *(
      pytest.param(hvp, jnp.bfloat16, 1e-4, 1e-2, marks=pytest.mark.slow)
      for hvp in MODES[:2]
    ),
    ('finite_difference', jnp.bfloat16, 1e-3, 0.1),
  ],
)
def test_bias_over_all_probes(hvp, dtype, least, largest):
  bias, variance = moments(hvp, dtype)
  print(hvp, dtype.dtype, f'{bias:.1e} {variance:.4f}')
  assert least <= bias <= largest
  np.testing.assert_allclose(variance, 1.0, atol=10 * largest)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_an_error(dtype):
  params = PARAMS | {'b': PARAMS['b'].astype(dtype)}
  loss = lambda p: cubic(p | {'b': p['b'].astype(jnp.float32)})
  with pytest.raises(TypeError, match=rf"{dtype.dtype} at \['b'\].*cast them"):
    difference(params, loss)
  for hvp in MODES[:2]:
    estimate(params, loss, hvp=hvp)
  # Parameters of another optimizer may be in half precision.
  difference(
    params,
    loss,
    wrap=lambda e: optax.chain(
      optax.stateless(lambda g, params: params),
      optax.masked(e, {'w': True, 'b': False}),
    ),
    extra={'full_params': params},
  )
