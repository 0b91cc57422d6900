"""`sampled_estimator`: keys, parts, loss scales, aux and hidden parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3]), 'z': jnp.array(1.0 + 2.0j)}
BATCH = jnp.arange(1.0, 9.0)
MEAN = 4.5


def loss_fn(params, batch=BATCH):  # Its Hessian is diagonal.
  w, z = params['w'], params['z']
  return jnp.mean(batch) * (jnp.sum(w**3) + z.real**2 - 2 * z.imag**2)


CURVATURE = {
  'w': 6 * MEAN * np.float32(PARAMS['w']),
  'z': np.complex64(2 * MEAN - 4j * MEAN),
}


def noise_like(key, theta):
  keys = optax.tree.split_key_like(key, theta)
  return jax.tree.map(
    lambda key, x: 1e-3 * jax.random.normal(key, x.shape), keys, theta
  )


def make_draw(theta, loss, tools, /, **extra_args):
  """Exact for a diagonal Hessian, plus noise that depends on the key."""
  del tools, extra_args
  ones = optax.tree.ones_like(theta)
  _, hvp = jax.jvp(jax.grad(loss), (theta,), (ones,))
  return lambda key: optax.tree.add(hvp, noise_like(key, theta))


def own(random_seed=None, **options):
  return sophia_optax.sampled_estimator(make_draw, random_seed, **options)


@jax.jit
@jax.vmap
def noise_of(key):
  """Returns the noise that `make_draw` adds with this key."""
  theta = {'w': PARAMS['w'], 'z': (jnp.array(1.0), jnp.array(2.0))}
  noise = noise_like(key, theta)
  return {'w': noise['w'], 'z': jax.lax.complex(*noise['z'])}


def mean_of_noises(keys):
  noises = noise_of(jnp.stack(keys))
  return jax.tree.map(lambda x: np.mean(x, axis=0), noises)


def assert_close(got, noise, rtol=1e-6):
  chex.assert_trees_all_close(
    got, jax.tree.map(np.add, CURVATURE, noise), rtol=rtol
  )


# Keys.


def test_samples_and_parts_have_different_keys():
  estimator = sophia_optax.microbatched(own(random_seed=3, num_samples=2), 4)
  estimate, state = jax.jit(
    lambda: estimator.update(
      None, estimator.init(PARAMS), PARAMS, obj_fn=loss_fn, batch=BATCH
    )
  )()
  key, keys = jax.random.PRNGKey(3), []
  for _ in range(4):
    key, subkey = jax.random.split(key)
    keys += [*jax.random.split(subkey, 2)]
  assert_close(estimate, mean_of_noises(keys))
  assert isinstance(state, sophia_optax.EstimatorState)
  np.testing.assert_array_equal(state.key, key)


def test_parts_of_parts():
  once = sophia_optax.microbatched(own(), 4)
  twice = sophia_optax.microbatched(sophia_optax.microbatched(own(), 2), 2)
  results = jax.jit(
    lambda: [
      e.update(None, e.init(PARAMS), PARAMS, obj_fn=loss_fn, batch=BATCH)
      for e in (once, twice)
    ]
  )()
  chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(
  'make_seed', [int, np.int32, jax.random.PRNGKey, jax.random.key]
)
def test_seeds(make_seed):
  estimator = own(make_seed(5))
  for _ in range(2):  # The second time, the first key has been donated.
    key = estimator.init(PARAMS).key
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert is_typed == (make_seed is jax.random.key)
    data = jax.random.key_data(key) if is_typed else key
    np.testing.assert_array_equal(data, jax.random.PRNGKey(5))
    key.delete()


def test_seed_where_raw_keys_are_forbidden():
  with jax.legacy_prng_key('error'):
    key = own(5).init(PARAMS).key
    assert key == jax.random.key(5)


# What is passed to the user's functions, and what they return.


def test_predictions_and_extra_arguments():
  seen = {}

  def make_draw(theta, predict, tools, /, **extra_args):
    seen.update(extra_args)
    grad = jax.grad(lambda theta: predict(theta).sum())(theta)
    return lambda key: jax.tree.map(jnp.square, grad)

  estimator = sophia_optax.sampled_estimator(
    make_draw, fn_name='predict_fn', has_aux=True
  )
  estimate = oracles.estimate(
    estimator,
    {'w': PARAMS['w']},
    predict_fn=lambda p: (p['w'] ** 2, {'name': 'aux'}),
    loss_scale=8.0,
    label_mask='mask',
    theta=0.5,  # It may have any name.
  )
  # Estimates from predict_fn do not depend on the scale, so are not divided.
  chex.assert_trees_all_close(estimate, {'w': 4 * PARAMS['w'] ** 2})
  assert seen == {'label_mask': 'mask', 'loss_scale': 8.0, 'theta': 0.5}


def test_unknown_function():
  with pytest.raises(ValueError, match=r"one of \['obj_fn', 'predict_fn'\]"):
    own(fn_name='loss_fn')


# Loss scales.


def naming(updates, state, params=None, *, loss_scale, **extra_args):
  """A user's update that divides by the loss scale itself."""
  return jax.tree.map(lambda g: (g / loss_scale) ** 2, updates), state


def parts(estimator):
  return sophia_optax.microbatched(estimator, 2)


def chain(estimator):
  return optax.chain(estimator, optax.identity())


NAMES_IT = optax.GradientTransformationExtraArgs(
  lambda params: optax.EmptyState(), naming
)
SQUARED = sophia_optax.squared_gradient_estimator_diag_hessian(4)
X = np.arange(1.0, 4.0, dtype=np.float32)
# An estimator of the curvature of Σ x³/6, whose gradient at X is X²/2.
DIVIDES = {
  'sampled': (8.0, own(), X),
  'parts in a chain': (np.float32(2.0**-6), chain(parts(own())), X),
  'names it, in a chain in parts': (8.0, parts(chain(NAMES_IT)), X**4 / 4),
  'squared gradient in a chain': (8.0, chain(SQUARED), X**4),
  'squared gradient, masked': (0.5, optax.masked(SQUARED, True), X**4),
}


@pytest.mark.parametrize('name', DIVIDES)
def test_loss_scale_that_an_estimator_divides_by(name):
  # Regression: estimators within wrappers were not recognized.
  scale, estimator, expected = DIVIDES[name]
  tx = sophia_optax.scale_by_sophia(b2=0.0, hessian_diagonal_fn=estimator)
  obj_fn = lambda x, batch: scale * jnp.sum(x**3) / 6
  _, state = jax.jit(
    lambda x: tx.update(
      jax.grad(obj_fn)(x, BATCH),
      tx.init(x),
      x,
      obj_fn=obj_fn,
      batch=BATCH,
      loss_scale=scale,
    )
  )(X)
  np.testing.assert_allclose(state.nu, expected, atol=5e-3 / min(scale, 1))
  np.testing.assert_allclose(state.mu, 0.035 * X**2 / 2, rtol=1e-5)


def wrapper(inner, forwards):
  """A user's wrapper that may drop the arguments that it does not know."""

  def update(updates, state, params, *, obj_fn, batch=None, **extra_args):
    extra_args = extra_args if forwards else {}
    if batch is not None:
      extra_args['batch'] = batch
    return inner.update(updates, state, params, obj_fn=obj_fn, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)


OPTAX = optax.contrib.hutchinson_estimator_diag_hessian()


@pytest.mark.parametrize(
  'estimator',
  [OPTAX, chain(OPTAX), parts(OPTAX), wrapper(own(), forwards=False)],
)
def test_loss_scale_that_an_estimator_would_ignore(estimator):
  # Regression: h was loss_scale times too large, and no error said so.
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=estimator)
  obj_fn = lambda x, batch=None: jnp.sum(x)
  with pytest.raises(ValueError, match='loss_scale needs an estimator'):
    tx.update(X, tx.init(X), X, obj_fn=obj_fn, batch=BATCH, loss_scale=8.0)


# Wrappers and parts.


def test_parts_through_a_wrapper():
  sizes = []

  def obj_fn(params, batch):
    sizes.append(len(batch))
    return loss_fn(params, batch)

  estimate = oracles.estimate(
    parts(wrapper(own(), True)), PARAMS, obj_fn=obj_fn, batch=BATCH
  )
  chex.assert_trees_all_close(estimate, CURVATURE, atol=0.01)
  assert set(sizes) == {4}


def test_chained_transformations_act_on_the_average_of_the_parts():
  estimate = oracles.estimate(
    parts(optax.chain(own(), optax.clip(5.0))),
    jnp.ones(3),
    batch=jnp.array([1.0, 8.0]),
    obj_fn=lambda x, batch: jnp.mean(batch) * jnp.sum(x**2) / 2,
  )
  np.testing.assert_allclose(estimate, 4.5, atol=0.01)  # Not that of 1 and 5.


def test_parts_where_another_axis_is_left_to_the_compiler():
  # Regression: a bare AssertionError.
  estimator = parts(own(axis_name='data'))
  mesh = jax.make_mesh(
    (2, 4), ('data', 'other'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  mapped = jax.shard_map(
    lambda params, batch: oracles.first(
      estimator, params, batch=batch, obj_fn=loss_fn
    ),
    mesh=mesh,
    in_specs=(P(), P('data')),
    out_specs=P(),
    axis_names={'data'},
  )
  chex.assert_trees_all_close(
    jax.jit(mapped)(PARAMS, BATCH), CURVATURE, atol=0.01
  )


# Parameters that optax.masked or optax.partition hides.

MODEL = {
  'embedding': jnp.array([0.3, -1.2, 0.8]),
  'layer': {'kernel': jnp.array([1.1, -0.4]), 'bias': jnp.array([0.3])},
}
VISIBLE = {'embedding': False, 'layer': {'kernel': True, 'bias': True}}


def model_loss(params, batch=1.0):
  """Its Hessian with respect to the layer is diagonal."""
  layer = params['layer']
  scale = jnp.mean(batch) * jnp.sum(params['embedding'] ** 2)
  return scale * (jnp.sum(layer['kernel'] ** 3) + jnp.sum(layer['bias'] ** 2))


def test_hidden_parameters():
  estimate = oracles.estimate(
    optax.chain(
      optax.stateless(lambda g, p: p), optax.masked(parts(own()), VISIBLE)
    ),
    MODEL,
    obj_fn=model_loss,
    batch=BATCH,
    full_params=MODEL,
  )
  scale = MEAN * np.sum(MODEL['embedding'] ** 2)
  expected = {
    'embedding': MODEL['embedding'],
    'layer': {
      'kernel': 6 * scale * MODEL['layer']['kernel'],
      'bias': 2 * scale * np.ones(1, np.float32),
    },
  }
  chex.assert_trees_all_close(estimate, expected, rtol=1e-3, atol=0.01)


def test_error_without_full_params():
  estimator = optax.masked(own(), VISIBLE)
  needed = r'need all parameters.* Pass .* full_params=params'
  with pytest.raises(ValueError, match=needed):
    estimator.update(MODEL, estimator.init(MODEL), MODEL, obj_fn=model_loss)
