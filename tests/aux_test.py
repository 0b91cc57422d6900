"""Losses and models that return auxiliary outputs."""

import chex
import jax
import jax.numpy as jnp
import pytest

import sophia_optax

INPUTS = jax.random.normal(jax.random.PRNGKey(0), (8, 3))
PARAMS = {'w': jnp.array([0.3, -0.2, 0.5])}
FACTORIES = {
  'obj_fn': sophia_optax.hutchinson_estimator_diag_hessian,
  'predict_fn': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}


def logits(params):
  return jnp.outer(jnp.tanh(INPUTS @ params['w']), jnp.array([1.0, 0.0, -2.0]))


def loss(params):
  return jnp.mean(jnp.cosh(logits(params)))


FUNCTIONS = {'obj_fn': loss, 'predict_fn': logits}


def estimate(name, fn, **options):
  estimator = FACTORIES[name](**options)
  return estimator.update(None, estimator.init(PARAMS), PARAMS, **{name: fn})[0]


@pytest.mark.parametrize('name', FACTORIES)
def test_aux_makes_no_difference(name):
  fn = FUNCTIONS[name]
  aux = {'key': jax.random.key(3), 'name': 'batch_stats', 'none': None}
  with_aux = lambda params: (fn(params), aux | params)
  got = estimate(name, with_aux, has_aux=True)
  chex.assert_trees_all_equal(got, estimate(name, fn))


@pytest.mark.parametrize('name', FACTORIES)
def test_has_aux_must_agree_with_the_function(name):
  fn = FUNCTIONS[name]
  with pytest.raises(TypeError, match='pass has_aux=True'):
    estimate(name, lambda params: (fn(params), 1))
  with pytest.raises(
    TypeError, match=r'pair .* got float32 of .*remove has_aux'
  ):
    estimate(name, fn, has_aux=True)
  with pytest.raises(TypeError, match=rf'{name} must return a pair'):
    estimate(name, lambda params: (fn(params), 1, 2), has_aux=True)


def test_maximize_negates_the_loss_and_not_aux():
  tx = sophia_optax.sophia_g(
    maximize=True,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
      has_aux=True
    ),
  )
  grads = jax.grad(loss)(PARAMS)
  state = tx.init(PARAMS)
  _, (state, _) = tx.update(
    grads, state, PARAMS, obj_fn=lambda params: (loss(params), 'batch_stats')
  )
  expected = estimate('obj_fn', lambda params: -loss(params))
  chex.assert_trees_all_close(
    state.nu, jax.tree.map(lambda h: 0.01 * h, expected), rtol=1e-5
  )
