"""Estimates that are averaged over devices, against the dense Hessian."""

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
INPUTS = jax.random.normal(jax.random.PRNGKey(0), (8, 4, 3))
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3]), 'b': jnp.array(0.2)}


def predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w'] + params['b'])


def loss_fn(params, inputs):
  return jnp.mean(predict(params, inputs) ** 2)


def mesh():
  return jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


def pmapped(fn):
  """Maps fn(replicated, shard); returns what each device has."""
  mapped = jax.pmap(fn, axis_name='data', in_axes=(None, 0))
  return lambda replicated: mapped(replicated, INPUTS)


def shard_mapped(fn, check_vma):
  # The output is declared replicated: with check_vma it is proven to be.
  mapped = jax.jit(
      jax.shard_map(
          lambda replicated, shard: fn(replicated, shard[0]),
          mesh=mesh(),
          in_specs=(P(), P('data')),
          out_specs=P(),
          check_vma=check_vma,
      )
  )

  def run(replicated):
    every_device = lambda x: jnp.stack(
        [jnp.asarray(np.array(s.data)) for s in x.addressable_shards]
    )
    return jax.tree.map(every_device, mapped(replicated, INPUTS))

  return run


MAPS = {
    'pmap': pmapped,
    'shard_map': functools.partial(shard_mapped, check_vma=True),
    'shard_map_unchecked': functools.partial(shard_mapped, check_vma=False),
}
ESTIMATORS = {
    'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian,
    'gauss_newton': functools.partial(
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
        likelihood='gaussian',
    ),
}


def extra_args(shard):
  return {
      'obj_fn': lambda p: loss_fn(p, shard),
      'predict_fn': lambda p: predict(p, shard),
  }


@pytest.mark.parametrize('num_samples', [1, 3])
@pytest.mark.parametrize('map_name', MAPS)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_is_the_mean_of_the_replicas_estimates(name, map_name, num_samples):
  estimator = ESTIMATORS[name](axis_name='data', num_samples=num_samples)
  state = estimator.init(PARAMS)

  def update(state, shard):
    return estimator.update(None, state, PARAMS, **extra_args(shard))

  every_estimate, every_state = MAPS[map_name](update)(state)

  # By hand: the draws of eight keys, averaged.
  key, subkey = jax.random.split(state.key)
  alone = ESTIMATORS[name](num_samples=num_samples)
  by_hand = []
  for device in range(8):
    folded = jax.random.fold_in(subkey, device)
    by_hand.append(_estimate_with(alone, folded, extra_args(INPUTS[device])))
  expected = jax.tree.map(lambda *x: sum(x) / 8, *by_hand)
  for device in range(8):
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x, d=device: x[d], every_estimate),
        jax.tree.map(lambda x: x[0], every_estimate),
    )
    np.testing.assert_array_equal(every_state.key[device], key)
  chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[0], every_estimate),
      expected,
      rtol=1e-5,
      atol=1e-6,
  )


def _estimate_with(estimator, subkey, extra):
  """The estimate of an estimator that draws with this very key."""
  state = estimator.init(PARAMS)._replace(key=subkey)
  with pytest.MonkeyPatch.context() as patch:

    def split_nothing(key):
      patch.undo()  # The first split only, the one of the key that is stored.
      return key, key

    patch.setattr(jax.random, 'split', split_nothing)
    return estimator.update(None, state, PARAMS, **extra)[0]


@pytest.mark.parametrize('map_name', MAPS)
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


@pytest.mark.parametrize('map_name', MAPS)
def test_replicas_stay_equal(map_name):
  def train(params, shard):
    tx = sophia_optax.sophia(
        0.01,
        update_interval=2,
        hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
            axis_name='data'
        ),
    )

    def step(carry, _):
      params, state = carry
      local = jax.lax.pcast(params, 'data', to='varying')
      grads = jax.grad(loss_fn)(local, shard)
      grads = jax.lax.pmean(grads, 'data')
      updates, state = tx.update(
          grads, state, params, obj_fn=lambda p: loss_fn(p, shard)
      )
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=20)[0]

  for leaf in jax.tree.leaves(MAPS[map_name](train)(PARAMS)):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


@pytest.mark.parametrize('name', ESTIMATORS)
def test_axis_that_is_not_there(name):
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
  with pytest.raises(ValueError, match=r"the same on all of \['data'\]"):
    MAPS['shard_map'](update)(PARAMS)


def test_one_all_reduce_in_a_refresh():
  estimator = ESTIMATORS['hutchinson'](axis_name='data', num_samples=3)
  update = lambda params, shard: estimator.update(
      None, estimator.init(params), params, **extra_args(shard[0])
  )[0]
  mapped = jax.jit(
      jax.shard_map(
          update, mesh=mesh(), in_specs=(P(), P('data')), out_specs=P()
      )
  )
  text = mapped.lower(PARAMS, INPUTS).compile().as_text()
  assert len(re.findall(r'= .* all-reduce(-start)?\(', text)) == 1
