"""Averages over replicas, in `pmap` and `shard_map`."""

import chex
from devices import ESTIMATORS
from devices import INPUTS
from devices import loss_fn
from devices import MAPS
from devices import mesh
from devices import ONES
from devices import PARAMS
from devices import predict
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest

import hlo
import sophia_optax


def functions(shard):
  return {
    'obj_fn': lambda p: loss_fn(p, shard),
    'predict_fn': lambda p: predict(p, shard),
  }


def update(estimator, shard, params=PARAMS, **extra):
  """Returns the first estimate of a replica."""
  extra = extra or functions(shard)
  return oracles.first(estimator, params, **extra)


def one_draw(name, key, params, shard):
  """Computes one estimate without the library: a probe, or Gaussian labels."""
  if name == 'hutchinson':
    loss = lambda p: loss_fn(p, shard)
    probe = optax.tree.random_like(key, params, jax.random.rademacher)
    _, hvp = jax.jvp(jax.grad(loss), (params,), (probe,))
    return optax.tree.mul(probe, hvp)
  means, vjp = jax.vjp(lambda p: predict(p, shard), params)
  labels = means + jax.random.normal(key, means.shape)
  (grads,) = vjp((means - labels) / len(means))  # For the mean of the losses.
  return jax.tree.map(lambda g: len(means) * g**2, grads)


def mean_of_draws(name, key, params, num_samples=1, num_parts=1, sizes=(8,)):
  """Averages the draws of eight devices on one; returns the next key, too."""
  draws = []
  for part in range(num_parts):
    key, subkey = jax.random.split(key)
    keys = [subkey]
    for size in sizes:
      keys = [jax.random.fold_in(k, i) for k in keys for i in range(size)]
    keys = jnp.stack(keys)[:, None]  # (8, 1)
    if num_samples > 1:
      keys = jax.vmap(lambda k: jax.random.split(k[0], num_samples))(keys)
    draw = lambda key, shard: one_draw(name, key, params, shard)
    draw = jax.vmap(jax.vmap(draw, (0, None)))
    draws.append(draw(keys, INPUTS[:, part::num_parts]))
  return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), (0, 1, 2)), *draws), key


@pytest.mark.parametrize(
  ('name', 'map_name', 'num_samples', 'num_parts'),
  [
    ('hutchinson', 'pmap', 1, 2),
    ('gauss_newton', 'pmap', 3, 1),
    ('hutchinson', 'shard_map', 3, 1),
    ('gauss_newton', 'shard_map', 1, 2),
    ('hutchinson', 'grid', 1, 1),
    ('gauss_newton', 'grid_unchecked', 2, 1),
    pytest.param('gauss_newton', 'unchecked', 1, 2, marks=pytest.mark.slow),
    pytest.param('hutchinson', 'unchecked', 1, 2, marks=pytest.mark.slow),
  ],
)
def test_is_the_mean_of_all_draws(name, map_name, num_samples, num_parts):
  is_grid = map_name.startswith('grid')
  estimator = sophia_optax.microbatched(
    ESTIMATORS[name](
      jax.random.PRNGKey(3),
      axis_name=('data', 'model') if is_grid else 'data',
      num_samples=num_samples,
    ),
    num_parts,
  )
  run = MAPS[map_name](
    lambda params, shard: estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=loss_fn,
      predict_fn=predict,
      batch=shard,
    )
  )
  got, state = run(PARAMS)
  sizes = (2, 4) if is_grid else (8,)
  expected, key = jax.jit(
    lambda params: mean_of_draws(
      name, jax.random.PRNGKey(3), params, num_samples, num_parts, sizes
    )
  )(PARAMS)
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: np.array(x)[d], got),
      expected,
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_array_equal(state.key[device], key)


def test_masked_microbatches_of_replicas():
  # Parts are weighted by predictions that count on their replica. Replicas have
  # equal weights.
  def masked(axis_name, shard):
    return update(
      sophia_optax.microbatched(ONES(axis_name=axis_name), 2),
      shard,
      predict_fn=predict,
      batch=shard,
      label_mask=shard[:, 0] > 0,
    )

  got = MAPS['shard_map'](lambda _, shard: masked('data', shard))(PARAMS)
  alone = jax.jit(jax.vmap(lambda shard: masked(None, shard)))(INPUTS)
  expected = jax.tree.map(lambda x: np.mean(x, axis=0), alone)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), expected, rtol=1e-5
  )


def test_predictions_of_all_replicas_are_one_estimate_without_axis_name():
  # With check_vma derivatives are sums over all replicas, so B counts all.
  alone = jax.jit(lambda inputs: update(ONES(), inputs))(INPUTS.reshape(-1, 3))
  got = MAPS['shard_map'](lambda params, shard: update(ONES(), shard, params))(
    PARAMS
  )
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), alone, rtol=1e-5
  )


# Training.


@pytest.mark.parametrize('params', [{'w': INPUTS[:, 0]}, {}], ids=['w', 'none'])
def test_independent_trainings_have_independent_win_rates(params):
  # The states differ between devices, so nothing may be summed.
  ones = optax.stateless(lambda g, _: jax.tree.map(jnp.ones_like, g))
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=1.0,
    refresh_before_update=True,
    hessian_diagonal_fn=ones,
  )

  states = jax.jit(jax.vmap(lambda p, _: tx.init(p)))(params, np.arange(8))
  win_rates = jax.vmap(lambda p, s: tx.update(p, s, p)[1].win_rate)
  mapped = jax.shard_map(
    win_rates, mesh=mesh(), in_specs=P('data'), out_specs=P('data')
  )
  got, expected = (jax.jit(fn)(params, states) for fn in (mapped, win_rates))
  np.testing.assert_allclose(got, expected)


def test_one_all_reduce_in_a_refresh_and_none_in_other_steps():
  # Regression: in a chain, there was one reduction for each part.
  chain = optax.chain(
    ESTIMATORS['hutchinson'](axis_name='data', num_samples=3), optax.identity()
  )
  tx = sophia_optax.sophia(
    0.01, hessian_diagonal_fn=sophia_optax.microbatched(chain, 2)
  )

  # The gradients are arguments, so the program has no collectives for them.
  def step(params, state, shard):
    return tx.update(params, state, params, obj_fn=loss_fn, batch=shard[0])

  mapped = jax.shard_map(
    step, mesh=mesh(), in_specs=(P(), P(), P('data')), out_specs=P()
  )
  args = PARAMS, tx.init(PARAMS), INPUTS
  text = jax.jit(mapped).lower(*args).compile().as_text()
  ordinary, refresh = hlo.count_collectives(text)
  assert not ordinary
  assert [c.kind for c in refresh.elements()] == ['all-reduce']


# `average_over_replicas`, with an estimator that a user wrote.


def own_estimator(shard, own_copy=True):
  """Estimates the Hessian diagonal of a loss with a diagonal Hessian."""

  def update(grads, state, params=None):
    if own_copy:
      params = jax.lax.pcast(params, 'data', to='varying')
    loss = lambda p: jnp.mean(shard) * (jnp.sum(p['w'] ** 3) + p['b'] ** 2)
    ones = jax.tree.map(jnp.ones_like, params)
    return jax.jvp(jax.grad(loss), (params,), (ones,))[1], state

  return optax.GradientTransformation(lambda p: optax.EmptyState(), update)


def averaged(params, shard, own_copy=True):
  average = sophia_optax.average_over_replicas('data')
  estimator = optax.chain(own_estimator(shard, own_copy), average)
  return estimator.update(params, estimator.init(params), params)[0]


@pytest.mark.parametrize('map_name', ['pmap', 'shard_map', 'unchecked'])
def test_average_over_replicas(map_name):
  got = MAPS[map_name](averaged)(PARAMS)
  scale = np.mean(INPUTS)
  expected = {
    'w': np.tile(6 * PARAMS['w'] * scale, (8, 1)),
    'b': np.full(8, 2 * scale),
  }
  chex.assert_trees_all_close(got, expected, rtol=1e-4)


# Errors.


def not_averaged(params, shard):
  tx = sophia_optax.sophia(0.01, hessian_diagonal_fn=own_estimator(shard))
  return tx.update(params, tx.init(params), params)[0]


def loss_averaged_already(params, shard):
  return update(
    ESTIMATORS['hutchinson'](axis_name='data'),
    shard,
    obj_fn=lambda p: jax.lax.pmean(loss_fn(p, shard), 'data'),
  )


@pytest.mark.parametrize(
  ('fn', 'match'),
  [
    (not_averaged, r"differs along \['data'\]"),
    (loss_averaged_already, r"the same along the axes \['data'\]"),
    (
      lambda params, shard: averaged(params, shard, own_copy=False),
      r'pcast\(params, .data., to="varying"',
    ),
    (
      lambda params, shard: update(ESTIMATORS['hutchinson'](), shard),
      r"\['data'\], .* Pass .* axis_name",
    ),
  ],
)
def test_errors_in_shard_map(fn, match):
  with pytest.raises(ValueError, match=match):
    MAPS['shard_map'](fn)(PARAMS)


def test_axis_that_does_not_exist():
  average = sophia_optax.average_over_replicas('batch')
  with pytest.raises(NameError, match='unbound axis name: batch'):
    average.update(PARAMS, average.init(PARAMS))
  with pytest.raises(NameError, match='unbound axis name: batch'):
    update(ESTIMATORS['hutchinson'](axis_name='batch'), INPUTS[0])
