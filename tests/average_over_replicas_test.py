"""`average_over_replicas` with an estimator that a user wrote."""

import chex
from devices import INPUTS
from devices import MAPS
from devices import maps
from devices import PARAMS
import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_optax


def own_estimator(cast, shard):
  """Estimates the Hessian diagonal of a loss with a diagonal Hessian."""

  def update(grads, state, params=None):
    del grads
    params = cast(params)
    ones = optax.tree.ones_like(params)
    scale = jnp.mean(shard)
    loss = lambda p: scale * (jnp.sum(p['w'] ** 3) + p['b'] ** 2)
    return jax.jvp(jax.grad(loss), (params,), (ones,))[1], state

  return optax.GradientTransformation(lambda p: optax.EmptyState(), update)


def own(params):
  return jax.lax.pcast(params, 'data', to='varying')


@maps
def test_average_over_replicas(map_name):
  def update(params, shard):
    estimator = optax.chain(
      own_estimator(own, shard), sophia_optax.average_over_replicas('data')
    )
    return estimator.update(params, estimator.init(params), params)[0]

  got = MAPS[map_name](update)(PARAMS)
  scale = jnp.mean(INPUTS)
  expected = {'w': 6 * PARAMS['w'] * scale, 'b': 2 * scale}
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], got), expected, rtol=1e-4
    )


def test_average_over_replicas_of_a_sum_over_replicas():
  def update(params, shard):
    estimator = optax.chain(
      own_estimator(lambda p: p, shard),
      sophia_optax.average_over_replicas('data'),
    )
    return estimator.update(params, estimator.init(params), params)[0]

  with pytest.raises(ValueError, match=r'pcast\(params, .data., to="varying"'):
    MAPS['shard_map'](update)(PARAMS)


def test_average_over_an_axis_that_does_not_exist():
  average = sophia_optax.average_over_replicas('batch')
  with pytest.raises(ValueError, match=r"got 'batch'; .* here are \(\)"):
    average.update(PARAMS, average.init(PARAMS))


def test_estimate_that_was_not_averaged():
  def update(params, shard):
    tx = sophia_optax.sophia(
      0.01, hessian_diagonal_fn=own_estimator(own, shard)
    )
    return tx.update(params, tx.init(params), params)[0]

  with pytest.raises(ValueError, match=r"differs along \['data'\]"):
    MAPS['shard_map'](update)(PARAMS)
