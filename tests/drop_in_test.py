"""The same numbers as optax.contrib.sophia, for float32 parameters."""

import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import sophia_optax

# Near the minimum, so that the default gamma, 0.01, clips only some updates.
PARAMS = {
  'w': 1e-3 * jnp.linspace(-1.0, 1.5, 12).reshape(3, 4),
  'b': {'c': 1e-3 * jnp.array([0.5, -0.3, 0.8])},
}


def loss_fn(params):
  w, c = params['w'], params['b']['c']
  hidden = jnp.tanh(w.T @ (1 + c))
  return jnp.sum(hidden**2) + jnp.sum(jnp.cosh(w / 2)) + jnp.sum(c**2)


def hutchinson(module):
  return module.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(3))


def absolute_gradient(module):
  """A user's estimator without extra arguments."""
  del module
  return optax.stateless(lambda g, _: jax.tree.map(jnp.abs, g))


CASES = {
  'default': lambda module: {},
  'all_numbers': lambda module: {
    'learning_rate': optax.cosine_decay_schedule(2e-5, 100),
    'b1': 0.9,
    'b2': 0.5,
    'eps': 1e-6,
    'weight_decay': 0.3,
    'weight_decay_mask': {'w': False, 'b': True},  # a prefix
    'gamma': 1.0,
    'clip_threshold': 0.1,
    'update_interval': 3,
    'hessian_diagonal_fn': hutchinson(module),
    'mu_dtype': jnp.bfloat16,
  },
  'not_clipped': lambda module: {
    'eps': 1e-2,
    'weight_decay_mask': lambda t: jax.tree.map(lambda x: x.ndim > 1, t),
    'gamma': 10.0,
    'clip_threshold': None,
    'hessian_diagonal_fn': absolute_gradient(module),
  },
}


def train(sophia, learning_rate=1e-5, **kwargs):
  tx = sophia(learning_rate, **kwargs)

  def step(carry, _):
    params, state = carry
    grads = jax.grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, obj_fn=loss_fn)
    sophia_state = state[0]
    seen = updates, sophia_state.mu, sophia_state.nu, sophia_state.count
    return (optax.apply_updates(params, updates), state), seen

  with jax.numpy_dtype_promotion('standard'):  # optax's needs it for mu_dtype.
    carry = PARAMS, tx.init(PARAMS)
    return jax.jit(lambda c: jax.lax.scan(step, c, length=100)[1])(carry)


@pytest.mark.parametrize('name', CASES)
def test_same_numbers(name):
  actual = train(sophia_optax.sophia, **CASES[name](sophia_optax))
  expected = train(optax.contrib.sophia, **CASES[name](optax.contrib))
  chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=0)
  # Not all updates are clipped, or h would not have been compared.
  size = jnp.abs(actual[0]['w'])
  full = size > 0.99 * jnp.max(size, axis=(1, 2), keepdims=True)
  assert jnp.mean(full) < 0.9


@pytest.mark.parametrize(
  'name', ['sophia', 'hutchinson_estimator_diag_hessian']
)
def test_same_arguments(name):
  def arguments(module):
    found = inspect.signature(getattr(module, name)).parameters.values()
    return [
      (p.name, p.kind, p.default)
      for p in found
      if p.name != 'hessian_diagonal_fn'
    ]

  theirs = arguments(optax.contrib)
  assert arguments(sophia_optax)[: len(theirs)] == theirs
