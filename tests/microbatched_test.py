"""Averages over parts of the batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

BATCH = jax.random.normal(jax.random.PRNGKey(0), (24, 3))
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3])}


def obj_fn(params, batch):
  return jnp.mean(jnp.tanh(batch @ params['w']) ** 2)


def predict_fn(params, batch):
  return batch @ params['w']


ESTIMATORS = {
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian(),
  'gnb': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood='gaussian'
  ),
}


def own_estimator():
  """A user's estimator: returns the mean of its part, and records the part."""

  def update(updates, state, params=None, *, batch, **extra_args):
    del updates, extra_args
    seen = jnp.roll(state, 1, axis=0).at[0].set(batch['x'][:, 0])
    return jax.tree.map(
      lambda p: jnp.full(p.shape, jnp.mean(batch['y'])), params
    ), seen

  return optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros((4, 6)), update
  )


def test_parts_are_strided_and_averaged():
  estimator = sophia_optax.microbatched(own_estimator(), 4)
  batch = {'x': jnp.arange(24.0)[:, None], 'y': jnp.arange(24.0) ** 2}
  estimate, seen = estimator.update(
    None, estimator.init(PARAMS), PARAMS, batch=batch
  )
  np.testing.assert_allclose(estimate['w'], np.mean(np.arange(24.0) ** 2))
  np.testing.assert_allclose(seen[::-1], np.arange(24.0).reshape(6, 4).T)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_is_the_average_of_the_parts(name):
  inner = ESTIMATORS[name]
  estimator = sophia_optax.microbatched(inner, 3)
  extra = {'obj_fn': obj_fn, 'predict_fn': predict_fn}
  actual, last = jax.jit(
    lambda s: estimator.update(None, s, PARAMS, batch=BATCH, **extra)
  )(estimator.init(PARAMS))
  state, parts = inner.init(PARAMS), []
  for m in range(3):
    part, state = inner.update(None, state, PARAMS, batch=BATCH[m::3], **extra)
    parts.append(part['w'])
  chex.assert_trees_all_close(actual['w'], sum(parts) / 3, rtol=1e-5)
  chex.assert_trees_all_equal(last, state)
  assert not np.allclose(parts[0], parts[1])


def test_estimator_with_an_update_that_is_jitted():
  # Regression: the request to the estimator was not a pytree.
  inner = ESTIMATORS['gnb']
  jitted = optax.GradientTransformationExtraArgs(
    inner.init, jax.jit(inner.update, static_argnames='predict_fn')
  )
  got, want = [
    sophia_optax.microbatched(e, 2).update(
      None, e.init(PARAMS), PARAMS, batch=BATCH, predict_fn=predict_fn
    )[0]
    for e in (jitted, inner)
  ]
  chex.assert_trees_all_close(got, want, rtol=1e-6)


def test_variance_falls_and_the_mean_stays():
  # With one weight, B ĝ² is exactly mean(x²) χ² with one degree of freedom. Its
  # variance is 2 mean(x²)². An average of 8 has an eighth of it.
  x = jnp.ones((64, 1))
  params = jnp.ones(1)
  keys = jax.random.split(jax.random.PRNGKey(0), 4000)

  def estimates(num_microbatches):
    inner = ESTIMATORS['gnb']
    estimator = sophia_optax.microbatched(inner, num_microbatches)
    return jax.jit(
      jax.vmap(
        lambda key: estimator.update(
          None,
          sophia_optax.GaussNewtonBartlettState(key),
          params,
          predict_fn=lambda w, x: x @ w,
          batch=x,
        )[0]
      )
    )(keys)

  whole, parts = estimates(1), estimates(8)
  np.testing.assert_allclose(whole.mean(), 1.0, atol=0.1)
  np.testing.assert_allclose(parts.mean(), 1.0, atol=0.04)
  np.testing.assert_allclose(whole.var(), 2.0, rtol=0.2)
  assert 6 < whole.var() / parts.var() < 10


@pytest.mark.parametrize('mask', [
    [True, False, True, True],
    [1, 0, 2, 7],  # Numbers of documents, 0 is padding.
])  # fmt: skip
def test_masked_parts_are_weighted_by_predictions_that_count(mask):
  # With scores of ±1, B ĝ² is deterministic if a part has one prediction.
  inner = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, z: jnp.ones_like(z)
  )
  estimator = sophia_optax.microbatched(inner, 2)
  x = jnp.array([1.0, 2.0, 3.0, 4.0])
  estimate, _ = estimator.update(
    None,
    estimator.init(1.0),
    1.0,
    predict_fn=lambda w, x: w * x,
    batch=x,
    label_mask=jnp.array(mask),
  )
  # Parts (1, 3) and (masked, 4): (4²/2)·2/3 + (4²/1)·1/3.
  np.testing.assert_allclose(estimate, 8 * 2 / 3 + 16 / 3, rtol=1e-6)
  none, _ = estimator.update(
    None,
    estimator.init(1.0),
    1.0,
    predict_fn=lambda w, x: w * x,
    batch=x,
    label_mask=jnp.zeros(4, bool),
  )
  assert none == 0


def test_mask_that_broadcasts_over_the_examples():
  inner = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, z: jnp.ones_like(z)
  )
  estimator = sophia_optax.microbatched(inner, 2)
  estimates = [
    estimator.update(
      None,
      estimator.init(PARAMS),
      PARAMS,
      predict_fn=lambda p, x: x * p['w'],
      batch=BATCH,
      label_mask=mask,
    )[0]
    for row in [jnp.array([[True, False, True]])]
    for mask in (row, jnp.broadcast_to(row, (24, 3)))
  ]
  chex.assert_trees_all_equal(*estimates)
  assert estimates[0]['w'][1] == 0 < estimates[0]['w'][0]


def test_estimator_that_a_user_wrote_gets_the_mask_of_its_part():
  seen = []

  def update(updates, state, params=None, *, batch, label_mask, **extra_args):
    del updates, extra_args
    jax.debug.callback(lambda *x: seen.append(x), batch, label_mask)
    return params, state

  own = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  estimator = sophia_optax.microbatched(own, 2)
  w, x = jnp.ones(2), jnp.arange(4.0)
  estimator.update(None, estimator.init(w), w, batch=x, label_mask=x > 1)
  jax.effects_barrier()
  assert len(seen) == 2
  for part, mask in seen:
    np.testing.assert_array_equal(mask, part > 1)


@pytest.mark.usefixtures('optimized')
def test_memory_falls_with_the_number_of_parts():
  inputs, width = jnp.ones((512, 256)), 256
  params = jnp.ones((256, width))

  def temp_bytes(num_microbatches):
    estimator = sophia_optax.microbatched(
      ESTIMATORS['hutchinson'], num_microbatches
    )
    step = lambda p: estimator.update(
      None,
      estimator.init(p),
      p,
      batch=inputs,
      obj_fn=lambda p, x: jnp.mean(jnp.tanh(jnp.tanh(x @ p) @ p) ** 2),
    )[0]
    return jax.jit(step).lower(params).compile().memory_analysis()

  whole, parts = temp_bytes(1), temp_bytes(8)
  assert parts.temp_size_in_bytes < 0.6 * whole.temp_size_in_bytes


def test_split_keeps_the_sharding():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  sharded = jax.device_put(
    jnp.ones((64, 3)), jax.sharding.NamedSharding(mesh, spec)
  )
  estimator = sophia_optax.microbatched(ESTIMATORS['hutchinson'], 4)
  step = jax.jit(
    lambda s, batch: estimator.update(
      None, s, PARAMS, obj_fn=obj_fn, batch=batch
    )
  )
  state = estimator.init(PARAMS)
  compiled = step.lower(state, sharded).compile()
  assert 'all-gather' not in compiled.as_text()
  assert 'all-to-all' not in compiled.as_text()
  chex.assert_trees_all_close(
    step(state, sharded)[0], step(state, jnp.ones((64, 3)))[0], rtol=1e-5
  )


def test_parts_of_an_estimate_that_is_a_python_number():
  own = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), lambda g, s, p=None, **_: (2.0, s)
  )
  estimator = sophia_optax.microbatched(own, 2)
  w = jnp.array(1.0)
  estimate, _ = estimator.update(None, estimator.init(w), w, batch=jnp.ones(4))
  assert estimate == 2
