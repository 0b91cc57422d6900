"""Compares estimates that are averaged over devices with the dense Hessian."""

import functools

import chex
from devices import ESTIMATORS
from devices import INPUTS
from devices import loss_fn
from devices import map_grid
from devices import MAPS
from devices import maps
from devices import mesh
from devices import PARAMS
from devices import predict
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax


def extra_args(shard):
  return {
    'obj_fn': lambda p: loss_fn(p, shard),
    'predict_fn': lambda p: predict(p, shard),
  }


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


@pytest.mark.parametrize(
  'num_samples', [1, pytest.param(3, marks=pytest.mark.slow)]
)
@maps
@pytest.mark.parametrize('name', ESTIMATORS)
def test_is_the_mean_of_the_replicas_estimates(name, map_name, num_samples):
  estimator = ESTIMATORS[name](axis_name='data', num_samples=num_samples)
  state = estimator.init(PARAMS)

  def update(state, shard):
    return estimator.update(None, state, PARAMS, **extra_args(shard))

  every_estimate, every_state = MAPS[map_name](update)(state)

  key, subkey = jax.random.split(state.key)
  draws = []
  for device in range(8):
    keys = [jax.random.fold_in(subkey, device)]
    if num_samples > 1:
      keys = jax.random.split(keys[0], num_samples)
    draws += [one_draw(name, k, PARAMS, INPUTS[device]) for k in keys]
  expected = jax.tree.map(lambda *x: sum(x) / len(draws), *draws)
  for device in range(8):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x, d=device: x[d], every_estimate),
      jax.tree.map(lambda x: x[0], every_estimate),
    )
    np.testing.assert_array_equal(every_state.key[device], key)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], every_estimate), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('name', ESTIMATORS)
def test_several_axes(name, check_vma):
  estimator = ESTIMATORS[name](axis_name=('data', 'model'))
  state = estimator.init(PARAMS)
  got = map_grid(
    lambda state, shard: estimator.update(
      None, state, PARAMS, **extra_args(shard[0])
    )[0],
    state,
    INPUTS,
    specs=(P(), P(('data', 'model'))),
    out_specs=P(),
    check_vma=check_vma,
  )
  _, subkey = jax.random.split(state.key)
  draws = []
  for row in range(2):
    for column in range(4):
      key = jax.random.fold_in(jax.random.fold_in(subkey, row), column)
      draws.append(one_draw(name, key, PARAMS, INPUTS[4 * row + column]))
  expected = jax.tree.map(lambda *x: sum(x) / 8, *draws)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@maps
def test_mean_is_the_dense_diagonal(map_name):
  # The diagonal Hessian of this loss makes each Rademacher estimate exact, so a
  # factor of the number of devices could not hide in the noise.
  def update(params, shard):
    scale = jnp.mean(shard)
    estimator = sophia_optax.hutchinson_estimator_diag_hessian(axis_name='data')
    return estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=lambda p: scale * (jnp.sum(p['w'] ** 3) + p['b'] ** 2),
    )[0]

  estimates = MAPS[map_name](update)(PARAMS)
  scale = jnp.mean(INPUTS)
  expected = {'w': 6 * PARAMS['w'] * scale, 'b': 2 * scale}
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], estimates), expected, rtol=1e-4
    )


@maps
@pytest.mark.parametrize('name', ESTIMATORS)
def test_microbatches_of_replicas(name, map_name):
  num_microbatches = 2
  estimator = sophia_optax.microbatched(
    ESTIMATORS[name](jax.random.PRNGKey(3), axis_name='data'), num_microbatches
  )
  update = lambda params, shard: estimator.update(
    None,
    estimator.init(params),
    params,
    obj_fn=loss_fn,
    predict_fn=predict,
    batch=shard,
  )
  got, state = MAPS[map_name](update)(PARAMS)

  key, draws = jax.random.PRNGKey(3), []
  for part in range(num_microbatches):
    key, subkey = jax.random.split(key)
    draws += [
      one_draw(
        name,
        jax.random.fold_in(subkey, d),
        PARAMS,
        INPUTS[d, part::num_microbatches],
      )
      for d in range(8)
    ]
  expected = jax.tree.map(lambda *x: sum(x) / len(draws), *draws)
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], got),
      expected,
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_array_equal(state.key[device], key)


@maps
def test_masked_microbatches_of_replicas(map_name):
  # Parts are weighted by predictions that count on their replica. Replicas have
  # equal weights.
  def update(params, shard, axis_name=None):
    estimator = sophia_optax.microbatched(
      sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
        likelihood=lambda key, means: jnp.ones_like(means), axis_name=axis_name
      ),
      2,
    )
    return estimator.update(
      None,
      estimator.init(params),
      params,
      predict_fn=predict,
      batch=shard,
      label_mask=shard[:, 0] > 0,
    )[0]

  got = MAPS[map_name](functools.partial(update, axis_name='data'))(PARAMS)
  alone = [update(PARAMS, shard) for shard in INPUTS]
  expected = jax.tree.map(lambda *x: sum(x) / 8, *alone)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), expected, rtol=1e-5
  )


@pytest.mark.parametrize('params', [{'w': INPUTS[:, 0]}, {}], ids=['w', 'none'])
def test_independent_trainings_have_independent_win_rates(params):
  # The states differ between devices, so nothing may be summed.
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=1.0,
    refresh_before_update=True,
    hessian_diagonal_fn=optax.stateless(
      lambda g, _: jax.tree.map(jnp.ones_like, g)
    ),
  )
  states = jax.vmap(lambda p, _: tx.init(p))(params, jnp.arange(8))

  @jax.vmap
  def win_rates(params, state):
    return tx.update(params, state, params)[1].win_rate

  mapped = jax.shard_map(
    win_rates, mesh=mesh(), in_specs=P('data'), out_specs=P('data')
  )
  np.testing.assert_allclose(
    jax.jit(mapped)(params, states), win_rates(params, states)
  )


def by_hand(name):
  """Averages the draws of eight devices on one, with their keys."""

  def update(grads, key, params=None):
    del grads
    key, subkey = jax.random.split(key)
    draws = [
      one_draw(name, jax.random.fold_in(subkey, d), params, INPUTS[d])
      for d in range(8)
    ]
    return jax.tree.map(lambda *x: sum(x) / 8, *draws), key

  return optax.GradientTransformation(
    lambda params: jax.random.PRNGKey(3), update
  )


def train(estimator, params, grad_fn, **extra):
  tx = sophia_optax.sophia(
    0.01, update_interval=2, gamma=0.5, hessian_diagonal_fn=estimator
  )

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad_fn(params), state, params, **extra)
    win_rate = state[0].win_rate
    return (optax.apply_updates(params, updates), state), win_rate

  carry = (params, tx.init(params))
  (params, state), win_rates = jax.lax.scan(step, carry, length=200)
  return {
    'params': params,
    'mu': state[0].mu,
    'nu': state[0].nu,
    'key': jax.tree.leaves(state[0].hessian_fn_state),
    'win_rates': win_rates,
  }


@pytest.mark.parametrize(
  ('name', 'map_name'),
  [
    ('hutchinson', 'shard_map'),
    pytest.param('gauss_newton', 'pmap', marks=pytest.mark.slow),
    pytest.param('hutchinson', 'pmap', marks=pytest.mark.slow),
    pytest.param('gauss_newton', 'shard_map', marks=pytest.mark.slow),
    pytest.param('hutchinson', 'shard_map_unchecked', marks=pytest.mark.slow),
    pytest.param('gauss_newton', 'shard_map_unchecked', marks=pytest.mark.slow),
  ],
)
def test_replicas_stay_equal(name, map_name):
  estimator = ESTIMATORS[name](jax.random.PRNGKey(3), axis_name='data')

  def train_replica(params, shard):
    def grad_fn(params):
      params = jax.lax.pcast(params, 'data', to='varying')
      return jax.lax.pmean(jax.grad(loss_fn)(params, shard), 'data')

    return train(estimator, params, grad_fn, **extra_args(shard))

  got = MAPS[map_name](train_replica)(PARAMS)
  for leaf in jax.tree.leaves(got):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))

  grad_fn = jax.grad(lambda p: loss_fn(p, INPUTS.reshape(-1, 3)))
  expected = jax.jit(lambda p: train(by_hand(name), p, grad_fn))(PARAMS)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), expected, rtol=1e-4, atol=1e-5
  )
  # Neither sign updates nor Newton steps all the time.
  assert 0.1 < jnp.mean(expected['win_rates']) < 0.9


@pytest.mark.parametrize('name', ESTIMATORS)
def test_axis_that_does_not_exist(name):
  estimator = ESTIMATORS[name](axis_name='batch')
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  with pytest.raises(ValueError, match=r"got 'batch'; .* here are \(\)"):
    update(PARAMS, INPUTS[0])
  with pytest.raises(ValueError, match=r"got 'batch'; .* are \('data',\)"):
    MAPS['shard_map'](update)(PARAMS)


def test_loss_that_was_averaged_already():
  estimator = ESTIMATORS['hutchinson'](axis_name='data')
  update = lambda params, shard: estimator.update(
    None,
    estimator.init(params),
    params,
    obj_fn=lambda p: jax.lax.pmean(loss_fn(p, shard), 'data'),
  )[0]
  with pytest.raises(ValueError, match=r"the same along the axes \['data'\]"):
    MAPS['shard_map'](update)(PARAMS)


def test_axis_name_that_was_forgotten():
  estimator = ESTIMATORS['hutchinson']()
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  with pytest.raises(ValueError, match=r"\['data'\], .* Pass .* axis_name"):
    MAPS['shard_map'](update)(PARAMS)


def test_predictions_of_all_replicas_are_one_estimate_without_axis_name():
  # With check_vma derivatives are sums over all replicas, so B counts all.
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, means: jnp.ones_like(means)
  )
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  alone = update(PARAMS, INPUTS.reshape(-1, 3))
  got = MAPS['shard_map'](update)(PARAMS)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), alone, rtol=1e-5
  )
