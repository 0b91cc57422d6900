"""Estimators that are written with `sampled_estimator`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3]), 'z': jnp.array(1.0 + 2.0j)}
BATCH = jnp.arange(1.0, 9.0)


def loss_fn(params, batch=BATCH):  # Its Hessian is diagonal.
  w, z = params['w'], params['z']
  return jnp.mean(batch) * (jnp.sum(w**3) + z.real**2 - 2 * z.imag**2)


def curvature(batch=BATCH):
  scale = jnp.mean(batch)
  z = jax.lax.complex(2 * scale, -4 * scale)
  return {'w': 6 * scale * PARAMS['w'], 'z': z}


def make_draw(theta, loss, **extra_args):
  """Exact for a diagonal Hessian, plus noise that depends on the key."""
  del extra_args
  noise = lambda key, x: 1e-3 * jax.random.normal(key, x.shape)

  def draw(key):
    keys = optax.tree.split_key_like(key, theta)
    ones = optax.tree.ones_like(theta)
    _, hvp = jax.jvp(jax.grad(loss), (theta,), (ones,))
    return optax.tree.add(hvp, jax.tree.map(noise, keys, theta))

  return draw


def own(random_seed=None, **options):
  return sophia_optax.sampled_estimator(make_draw, random_seed, **options)


def noise_of(key):
  """Returns the noise that `make_draw` adds with this key."""
  theta = {'w': PARAMS['w'], 'z': (jnp.array(1.0), jnp.array(2.0))}
  draw = make_draw(theta, lambda theta: jnp.zeros(()) * theta['w'].sum())
  noise = draw(key)
  return {'w': noise['w'], 'z': jax.lax.complex(*noise['z'])}


def test_one_draw():
  estimator = own(random_seed=3)
  state = estimator.init(PARAMS)
  assert isinstance(state, sophia_optax.EstimatorState)
  estimate, next_state = estimator.update(None, state, PARAMS, obj_fn=loss_fn)
  key, subkey = jax.random.split(jax.random.PRNGKey(3))
  expected = optax.tree.add(curvature(), noise_of(subkey))
  chex.assert_trees_all_close(estimate, expected, rtol=1e-6)
  np.testing.assert_array_equal(next_state.key, key)


def test_samples_and_parts_have_different_keys():
  estimator = sophia_optax.microbatched(own(num_samples=2), 4)
  estimate, state = estimator.update(
    None, estimator.init(PARAMS), PARAMS, obj_fn=loss_fn, batch=BATCH
  )
  key, noises = jax.random.PRNGKey(0), []
  for _ in range(4):
    key, subkey = jax.random.split(key)
    noises += [noise_of(k) for k in jax.random.split(subkey, 2)]
  noise = jax.tree.map(lambda *x: sum(x) / 8, *noises)
  expected = optax.tree.add(curvature(), noise)
  chex.assert_trees_all_close(estimate, expected, rtol=1e-6)
  np.testing.assert_array_equal(state.key, key)


def test_parts_of_parts():
  once = sophia_optax.microbatched(own(), 4)
  twice = sophia_optax.microbatched(sophia_optax.microbatched(own(), 2), 2)
  results = [
    e.update(None, e.init(PARAMS), PARAMS, obj_fn=loss_fn, batch=BATCH)
    for e in (once, twice)
  ]
  chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize('scale', [1024.0, jnp.float32(2.0**-6)])
def test_loss_scale(scale):
  estimator = own()
  state = estimator.init(PARAMS)
  scaled, _ = estimator.update(
    None, state, PARAMS, obj_fn=lambda p: scale * loss_fn(p), loss_scale=scale
  )
  _, subkey = jax.random.split(state.key)
  noise = optax.tree.scale(1 / float(scale), noise_of(subkey))
  expected = optax.tree.add(curvature(), noise)
  chex.assert_trees_all_close(scaled, expected, rtol=1e-6)


def test_predictions_and_extra_arguments():
  seen = {}

  def make_draw(theta, predict, *, random_like, label_mask, loss_scale, heat):
    del random_like
    seen.update(mask=label_mask, scale=loss_scale, heat=heat)
    return lambda key: jax.tree.map(jnp.square, jax.grad(
      lambda theta: predict(theta).sum())(theta))  # fmt: skip

  estimator = sophia_optax.sampled_estimator(
    make_draw, fn_name='predict_fn', has_aux=True
  )
  estimate, _ = estimator.update(
    None, estimator.init(PARAMS), {'w': PARAMS['w']},
    predict_fn=lambda p: (p['w'] ** 2, 'aux'),
    loss_scale=8.0, label_mask='mask', heat=0.5,
  )  # fmt: skip
  # Estimates from predict_fn do not depend on the scale, so are not divided.
  chex.assert_trees_all_close(estimate, {'w': 4 * PARAMS['w'] ** 2})
  assert seen == {'mask': 'mask', 'scale': 8.0, 'heat': 0.5}


def test_unknown_function():
  with pytest.raises(ValueError, match=r"one of \['obj_fn', 'predict_fn'\]"):
    own(fn_name='loss_fn')


def shard_map(fn, check_vma=True, axis_names=None, shape=(8,)):
  names = ('data', 'other')[: len(shape)]
  mesh = jax.make_mesh(
    shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
  )
  return jax.jit(
    jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=check_vma,
      axis_names=axis_names or set(names),
    )
  )


@pytest.mark.parametrize('check_vma', [True, False])
def test_axis_name(check_vma):
  estimator = own(axis_name='data')

  def update(params, batch):
    obj_fn = functools.partial(loss_fn, batch=batch)
    return estimator.update(
      None, estimator.init(params), params, obj_fn=obj_fn
    )[0]

  got = shard_map(update, check_vma)(PARAMS, BATCH)
  _, subkey = jax.random.split(jax.random.PRNGKey(0))
  noises = [noise_of(jax.random.fold_in(subkey, d)) for d in range(8)]
  noise = jax.tree.map(lambda *x: sum(x) / 8, *noises)
  expected = optax.tree.add(curvature(), noise)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)


ESTIMATORS = {
  'own': own,
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian,
  'gauss_newton': functools.partial(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
    likelihood='gaussian',
  ),
}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_one_reduction_for_all_parts_within_a_chain(name):
  # Regression: in a chain, there was one reduction for each part.
  chained = optax.chain(ESTIMATORS[name](axis_name='data'), optax.identity())
  estimator = sophia_optax.microbatched(chained, 2)

  def update(params, batch):
    return estimator.update(
      None,
      estimator.init(params),
      params,
      batch=batch,
      obj_fn=loss_fn,
      predict_fn=lambda p, batch: batch * p['w'].sum() * p['z'].real,
    )[0]

  compiled = shard_map(update).lower(PARAMS, jnp.ones(16)).compile()
  text = compiled.as_text()
  assert text.count(' all-reduce(') == 1
  (entry,) = re.findall(r'^ENTRY.*?^}', text, re.DOTALL | re.MULTILINE)
  assert entry.count(' all-reduce(') == 1  # So not in the loop over parts.


def users():
  """An estimator that is not written with `sampled_estimator`."""

  def update(updates, state, params=None, *, batch, **extra_args):
    del updates, extra_args
    scale = lambda p: p * jnp.mean(batch).astype(p.dtype)
    return jax.tree.map(scale, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


@pytest.mark.parametrize('make', [functools.partial(own, axis_name='data'),
                                  users])  # fmt: skip
def test_parts_where_another_axis_is_left_to_the_compiler(make):
  # Regression: a bare AssertionError.
  estimator = sophia_optax.microbatched(make(), 2)

  def update(params, batch):
    estimate, _ = estimator.update(
      None, estimator.init(params), params, batch=batch, obj_fn=loss_fn
    )
    return jax.tree.map(
      lambda x: x if make is not users else jax.lax.pmean(x, 'data'), estimate
    )

  batch = jnp.arange(1.0, 9.0)
  got = shard_map(update, axis_names={'data'}, shape=(2, 4))(PARAMS, batch)
  mean = jnp.mean(batch)
  expected = (
    {'w': mean * PARAMS['w'], 'z': jax.lax.complex(mean, 2 * mean)}
    if make is users
    else curvature(batch)
  )
  chex.assert_trees_all_close(got, expected, atol=0.01)


@pytest.mark.parametrize('wrap', [
    lambda e: e,
    optax.chain,
    lambda e: sophia_optax.microbatched(e, 2),
])  # fmt: skip
def test_loss_scale_that_an_estimator_would_ignore(wrap):
  # Regression: h was loss_scale times too large, and no error said so.
  probe = optax.contrib.hutchinson_estimator_diag_hessian()
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=wrap(probe))
  x = jnp.ones(3)
  with pytest.raises(ValueError, match='loss_scale needs an estimator'):
    tx.update(x, tx.init(x), x, obj_fn=jnp.sum, batch=x[:2], loss_scale=8.0)


@pytest.mark.parametrize('wrap', [
    lambda e: e,
    optax.chain,
    lambda e: optax.chain(sophia_optax.microbatched(e, 1), optax.identity()),
])  # fmt: skip
def test_loss_scale_that_an_estimator_divides_by(wrap):
  scale = 8.0
  tx = sophia_optax.scale_by_sophia(b2=0.0, hessian_diagonal_fn=wrap(own()))
  scaled = lambda p, batch=BATCH: scale * loss_fn(p, batch)
  grads = jax.tree.map(jnp.conj, jax.grad(scaled)(PARAMS))
  _, state = tx.update(
    grads, tx.init(PARAMS), PARAMS, obj_fn=scaled, batch=BATCH,
    loss_scale=scale,
  )  # fmt: skip
  chex.assert_trees_all_close(state.nu, curvature(), atol=0.01)


def test_loss_scale_of_an_estimator_that_names_it():
  def update(updates, state, params=None, *, loss_scale, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda g: (g / loss_scale) ** 2, updates), state

  own = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  x = jnp.arange(1.0, 4.0)
  parts = sophia_optax.microbatched(own, 2)
  chain = optax.chain(own, optax.identity())  # Regression: it was rejected.
  parts_of_chain = sophia_optax.microbatched(chain, 2)
  for estimator, maximize in [
    (own, False),
    (own, True),
    (parts, False),
    (chain, False),
    (parts_of_chain, False),
  ]:
    tx = sophia_optax.sophia_g(
      b2=0.0, hessian_diagonal_fn=estimator, maximize=maximize
    )
    _, state = tx.update(8 * x, tx.init(x), x, loss_scale=8.0, batch=BATCH)
    np.testing.assert_allclose(optax.tree.get(state, 'nu'), x**2)


def test_error_in_the_users_function_says_how_it_was_called():
  tx = sophia_optax.sophia(0.1)
  model = lambda m: jnp.sum(m(jnp.ones(3)))  # Expects a model.
  x = {'w': jnp.ones(3)}
  with pytest.raises(TypeError, match=r'not callable(?s:.*)params a dict'):
    tx.update(x, tx.init(x), x, obj_fn=model)


def test_loss_scale_of_the_squared_gradient_within_wrappers():
  # Regression: the estimator was not recognized within a chain.
  estimator = sophia_optax.squared_gradient_estimator_diag_hessian(4)
  x = jnp.arange(1.0, 4.0)
  for wrapped in (
    optax.chain(estimator, optax.identity()),
    optax.masked(estimator, True),
  ):
    tx = sophia_optax.scale_by_sophia(b2=0.0, hessian_diagonal_fn=wrapped)
    _, state = tx.update(8 * x, tx.init(x), x, loss_scale=8.0)
    np.testing.assert_allclose(state.nu, 4 * x**2)


def wrapper(forwards):
  """A user's wrapper of an estimator. It may drop unknown arguments."""
  inner = own()

  def update(updates, state, params, *, obj_fn, batch=None, **extra_args):
    extra_args = extra_args if forwards else {}
    return inner.update(
      updates, state, params, obj_fn=obj_fn, batch=batch, **extra_args
    )

  return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize('forwards', [True, False])
def test_parts_through_a_wrapper(forwards):
  # Regression: if a wrapper dropped the request, the batch was not split.
  sizes = []

  def obj_fn(params, batch):
    sizes.append(len(batch))
    return loss_fn(params, batch)

  estimator = sophia_optax.microbatched(wrapper(forwards), 2)
  estimate, _ = estimator.update(
    None, estimator.init(PARAMS), PARAMS, obj_fn=obj_fn, batch=BATCH
  )
  chex.assert_trees_all_close(estimate, curvature(), atol=0.01)
  assert sizes[-1] == 4


def test_loss_scale_that_a_wrapper_drops():
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=wrapper(forwards=False))
  with pytest.raises(ValueError, match='loss_scale needs an estimator'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, obj_fn=loss_fn, loss_scale=8.0)


def test_chained_transformations_act_on_the_average_of_the_parts():
  x = jnp.ones(3)
  estimator = sophia_optax.microbatched(
    optax.chain(
      sophia_optax.hutchinson_estimator_diag_hessian(), optax.clip(5.0)
    ),
    2,
  )
  estimate, _ = estimator.update(
    None, estimator.init(x), x, batch=jnp.array([1.0, 8.0]),
    obj_fn=lambda x, batch: jnp.mean(batch) * jnp.sum(x**2) / 2,
  )  # fmt: skip
  np.testing.assert_allclose(estimate, 4.5)  # Not the mean of 1 and 5.


def test_draws_in_half_precision():
  def make_draw(theta, loss, **extra_args):
    del extra_args
    return lambda key: jax.grad(loss)(theta)

  params = jnp.array([1.0, 2.0], jnp.bfloat16)
  for num_samples in (1, 2):
    estimator = sophia_optax.sampled_estimator(
      make_draw, num_samples=num_samples
    )
    estimate, _ = estimator.update(
      None, estimator.init(params), params, obj_fn=lambda x: jnp.sum(x**2)
    )
    assert estimate.dtype == jnp.float32
    np.testing.assert_array_equal(estimate, [2.0, 4.0])


def test_parts_of_divided_parameters_have_independent_draws():
  # The Hessian is all ones. With one draw for all parts of the parameters the
  # estimate would be their number on average.
  def make_draw(theta, loss, *, random_like, **extra_args):
    del extra_args

    def draw(key):
      probe = random_like(key, theta, jax.random.normal)
      _, hvp = jax.jvp(jax.grad(loss), (theta,), (probe,))
      return optax.tree.mul(probe, hvp)

    return draw

  estimator = sophia_optax.sampled_estimator(make_draw, num_samples=4000)

  def update(x):
    loss = lambda x: jax.lax.psum(jnp.sum(x), 'model') ** 2 / 2
    return estimator.update(None, estimator.init(x), x, obj_fn=loss)[0]

  mesh = jax.make_mesh(
    (8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  got = jax.jit(
    jax.shard_map(update, mesh=mesh, in_specs=P('model'), out_specs=P('model'))
  )(jnp.ones(8))
  # Of 4,000 Gaussian probes, each with variance 7 + 2.
  np.testing.assert_allclose(got, 1.0, atol=5 * (9 / 4000) ** 0.5)
