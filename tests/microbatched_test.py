"""Averages over parts of the batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

BATCH = jnp.float32(np.random.default_rng(0).normal(size=(24, 3)))
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3])}
ONES = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
  likelihood=lambda key, outputs: jnp.ones_like(outputs)
)


def obj_fn(params, batch):
  return jnp.mean(jnp.tanh(batch @ params['w']) ** 2)


def predict_fn(params, batch):
  return batch @ params['w']


def stateless(update):
  """Makes an estimator as a user would, from update(params, **extra_args)."""
  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda g, state, params=None, **extra: (update(params, **extra), state),
  )


def test_parts_are_strided_and_averaged():
  def update(updates, seen, params=None, *, batch, **extra_args):
    seen = jnp.roll(seen, 1, axis=0).at[0].set(batch['x'])
    return jax.tree.map(lambda p: 0 * p + jnp.mean(batch['y']), params), seen

  own = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros((4, 6)), update
  )
  estimator = sophia_optax.microbatched(own, 4)
  batch = {'x': jnp.arange(24.0), 'y': jnp.arange(24.0) ** 2}
  estimate, seen = jax.jit(estimator.update)(
    None, estimator.init(PARAMS), PARAMS, batch=batch
  )
  np.testing.assert_allclose(estimate['w'], np.mean(np.arange(24.0) ** 2))
  np.testing.assert_allclose(seen[::-1], np.arange(24.0).reshape(6, 4).T)


def test_is_the_average_of_the_parts():
  inner = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood='gaussian'
  )
  estimator = sophia_optax.microbatched(inner, 3)

  @jax.jit
  def run(state):
    got = estimator.update(
      None, state, PARAMS, batch=BATCH, predict_fn=predict_fn
    )
    parts = []
    for m in range(3):
      part, state = inner.update(
        None, state, PARAMS, batch=BATCH[m::3], predict_fn=predict_fn
      )
      parts.append(part['w'])
    return got, parts, state

  (estimate, last), parts, state = run(inner.init(PARAMS))
  np.testing.assert_allclose(estimate['w'], np.mean(parts, axis=0), rtol=1e-5)
  chex.assert_trees_all_equal(last, state)
  assert not np.allclose(parts[0], parts[1])


def test_estimator_with_an_update_that_is_jitted():
  # Regression: the update was traced again in each call.
  inner = sophia_optax.hutchinson_estimator_diag_hessian()
  calls = []

  def counted(params, batch):
    calls.append(None)
    return obj_fn(params, batch)

  jitted = optax.GradientTransformationExtraArgs(
    inner.init, jax.jit(inner.update, static_argnames='obj_fn')
  )
  expected = oracles.estimate(
    sophia_optax.microbatched(inner, 2), PARAMS, batch=BATCH, obj_fn=obj_fn
  )
  estimator = sophia_optax.microbatched(jitted, 2)
  state, counts = estimator.init(PARAMS), []
  for _ in range(3):
    estimate, _ = estimator.update(
      None, state, PARAMS, batch=BATCH, obj_fn=counted
    )
    counts.append(len(calls))
    chex.assert_trees_all_close(estimate, expected, rtol=1e-5)
  assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize(
  ('mask', 'expected'),
  [
    # Parts (1, 3) and (masked, 4): (4²/2)·2/3 + (4²/1)·1/3.
    ([True, False, True, True], 8 * 2 / 3 + 16 / 3),
    ([1, 0, 2, 7], 8 * 2 / 3 + 16 / 3),  # Numbers of documents, 0 is padding.
    ([False] * 4, 0),
  ],
)
def test_masked_parts_are_weighted_by_predictions_that_count(mask, expected):
  # With scores of 1, B ĝ² is (Σ x)²/B.
  estimate = oracles.estimate(
    sophia_optax.microbatched(ONES, 2),
    jnp.array(1.0),
    predict_fn=lambda w, x: w * x,
    batch=jnp.array([1.0, 2.0, 3.0, 4.0]),
    label_mask=jnp.array(mask),
  )
  np.testing.assert_allclose(estimate, expected, rtol=1e-6)


def test_mask_that_broadcasts_over_the_examples():
  estimate = oracles.estimate(
    sophia_optax.microbatched(ONES, 2),
    PARAMS,
    predict_fn=lambda p, x: x * p['w'],
    batch=BATCH,
    label_mask=jnp.array([[True, False, True]]),
  )
  sums = np.array([BATCH[::2].sum(0), BATCH[1::2].sum(0)])
  expected = np.mean(sums**2, axis=0) / 24 * [1, 0, 1]  # B = 2 of 12 rows.
  np.testing.assert_allclose(estimate['w'], expected, rtol=1e-4)


def test_estimator_that_a_user_wrote_gets_the_mask_of_its_part():
  def update(params, *, batch, label_mask, **extra_args):
    return jnp.where(jnp.all(label_mask == (batch > 1)), params, 0)

  estimate = oracles.estimate(
    sophia_optax.microbatched(stateless(update), 2),
    jnp.ones(2),
    batch=jnp.arange(4.0),
    label_mask=jnp.arange(4) > 1,
  )
  np.testing.assert_array_equal(estimate, 1)


def test_parts_of_an_estimate_that_is_a_python_number():
  estimate = oracles.estimate(
    sophia_optax.microbatched(stateless(lambda params, **_: 2.0), 2),
    jnp.array(1.0),
    batch=jnp.ones(4),
  )
  assert estimate == 2


def hutchinson(num_microbatches):
  return sophia_optax.microbatched(
    sophia_optax.hutchinson_estimator_diag_hessian(), num_microbatches
  )


@pytest.mark.usefixtures('optimized')
def test_memory_falls_with_the_number_of_parts():
  def temporary(num_microbatches):
    estimator = hutchinson(num_microbatches)
    obj_fn = lambda p, x: jnp.mean(jnp.tanh(jnp.tanh(x @ p) @ p) ** 2)
    step = lambda p, batch: oracles.first(
      estimator, p, batch=batch, obj_fn=obj_fn
    )
    args = np.ones((256, 256), np.float32), np.ones((512, 256), np.float32)
    return oracles.temporary_bytes(step, *args)

  assert temporary(8) < 0.6 * temporary(1)


def test_split_keeps_the_sharding():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  batch = jnp.concatenate([BATCH] * 4)
  sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec))
  estimator = hutchinson(4)
  step = lambda batch: oracles.first(
    estimator, PARAMS, obj_fn=obj_fn, batch=batch
  )
  compiled = jax.jit(step).lower(sharded).compile()
  assert 'all-gather' not in compiled.as_text()
  assert 'all-to-all' not in compiled.as_text()
  chex.assert_trees_all_close(
    compiled(sharded), jax.jit(step)(batch), rtol=1e-5
  )
