"""Optimizers of a part of the parameters, with an obj_fn that needs all."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

INPUTS = jax.random.normal(jax.random.PRNGKey(0), (32, 3))
PARAMS = {
  'embedding': jax.random.normal(jax.random.PRNGKey(1), (3, 4)),
  'layer': {
    'kernel': jax.random.normal(jax.random.PRNGKey(2), (4,)),
    'bias': jnp.array(0.3),
  },
}


def predict(params):  # (32,)
  hidden = jnp.tanh(INPUTS @ params['embedding'])
  return hidden @ params['layer']['kernel'] + params['layer']['bias']


def loss_fn(params):
  return jnp.mean(predict(params) ** 2) / 2


EXTRA = {'obj_fn': loss_fn, 'predict_fn': predict, 'full_params': PARAMS}
ESTIMATORS = {
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian(
    num_samples=1000
  ),
  'gauss_newton': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood='gaussian', num_samples=1000
  ),
}


def labels(params):
  return jax.tree.map_with_path(
    lambda path, _: 'adamw' if path[0].key == 'embedding' else 'sophia', params
  )


@pytest.mark.parametrize('name', ESTIMATORS)
def test_curvature_is_that_of_the_dense_block(name):
  mask = {'embedding': False, 'layer': {'kernel': True, 'bias': True}}
  estimator = optax.masked(ESTIMATORS[name], mask)
  estimate, _ = estimator.update(
    PARAMS, estimator.init(PARAMS), PARAMS, **EXTRA
  )
  chex.assert_trees_all_equal(estimate['embedding'], PARAMS['embedding'])

  flat, unravel = jax.flatten_util.ravel_pytree(PARAMS['layer'])
  whole = lambda x: PARAMS | {'layer': unravel(x)}
  if name == 'hutchinson':
    dense = jnp.diag(jax.jit(jax.hessian(lambda x: loss_fn(whole(x))))(flat))
  else:
    jacobian = jax.jit(jax.jacobian(lambda x: predict(whole(x))))(flat)
    dense = jnp.mean(jacobian**2, axis=0)
  got = jax.flatten_util.ravel_pytree(estimate['layer'])[0]
  chex.assert_trees_all_close(got, dense, rtol=0.1)


@pytest.mark.parametrize(
  'name', [pytest.param('hutchinson', marks=pytest.mark.slow), 'gauss_newton']
)
def test_partition(name):
  sophia = sophia_optax.sophia(0.01, hessian_diagonal_fn=ESTIMATORS[name])
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    tx = optax.partition({'sophia': sophia, 'adamw': optax.adamw(0.01)}, labels)

    @jax.jit
    def step(params, state):
      updates, state = tx.update(
        jax.grad(loss_fn)(params),
        state,
        params,
        **EXTRA | {'full_params': params},
      )
      return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(30):
      params, state = step(params, state)
  assert loss_fn(params) < 0.5 * loss_fn(PARAMS)
  of_sophia = lambda path, _: 'sophia' in str(path)
  nu = optax.tree.get(state, 'nu', filtering=of_sophia)
  assert isinstance(nu['embedding'], optax.MaskedNode)
  assert jnp.all(nu['layer']['kernel'] != 0)


def test_fine_tuning_of_a_part():
  frozen = {'embedding': True, 'layer': {'kernel': False, 'bias': True}}
  tx = optax.chain(
    optax.masked(
      sophia_optax.sophia(0.01), jax.tree.map(lambda x: not x, frozen)
    ),
    optax.freeze(frozen),
  )
  updates, _ = tx.update(
    jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, **EXTRA
  )
  assert jnp.all(updates['layer']['kernel'] != 0)
  assert not jnp.any(updates['embedding'])
  assert not jnp.any(updates['layer']['bias'])


def test_low_rank_adapters():
  # Only the adapters are parameters; the loss closes over the other weights.
  adapters = {
    'down': jax.random.normal(jax.random.PRNGKey(4), (3, 1)),
    'up': jnp.zeros((1, 4)),
  }

  def adapted_loss(adapters):
    embedding = PARAMS['embedding'] + adapters['down'] @ adapters['up']
    return loss_fn(PARAMS | {'embedding': embedding})

  tx = sophia_optax.sophia(0.01)

  @jax.jit
  def step(adapters, state):
    updates, state = tx.update(
      jax.grad(adapted_loss)(adapters), state, adapters, obj_fn=adapted_loss
    )
    return optax.apply_updates(adapters, updates), state

  state = tx.init(adapters)
  before = adapted_loss(adapters)
  for _ in range(30):
    adapters, state = step(adapters, state)
  assert adapted_loss(adapters) < 0.8 * before


def test_microbatches_of_a_part():
  mask = {'embedding': False, 'layer': {'kernel': True, 'bias': True}}

  def predict_on(params, inputs):
    hidden = jnp.tanh(inputs @ params['embedding'])
    return hidden @ params['layer']['kernel'] + params['layer']['bias']

  parts = sophia_optax.microbatched(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
      likelihood=lambda key, means: jnp.ones_like(means)
    ),
    2,
  )
  estimator = optax.masked(parts, mask)
  got, _ = estimator.update(
    PARAMS,
    estimator.init(PARAMS),
    PARAMS,
    predict_fn=predict_on,
    full_params=PARAMS,
    batch=INPUTS,
  )
  grads = [
    jax.grad(lambda p, x=x: jnp.mean(predict_on(p, x)))(PARAMS)['layer']
    for x in (INPUTS[::2], INPUTS[1::2])
  ]
  expected = jax.tree.map(lambda a, b: 16 * (a**2 + b**2) / 2, *grads)
  chex.assert_trees_all_close(got['layer'], expected, rtol=1e-5)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_error_without_full_params(name):
  mask = {'embedding': False, 'layer': {'kernel': True, 'bias': True}}
  estimator = optax.masked(ESTIMATORS[name], mask)
  extra = EXTRA | {'full_params': None}
  needed = r"needs all .* \['embedding'\]\. Pass .* full_params=params"
  with pytest.raises(ValueError, match=needed):
    estimator.update(PARAMS, estimator.init(PARAMS), PARAMS, **extra)
