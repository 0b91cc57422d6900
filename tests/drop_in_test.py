"""The same numbers as optax.contrib.sophia, for float32 parameters."""

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


def absolute_gradient():
  """A user's estimator without extra arguments."""
  return optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda g, s, p=None: (jax.tree.map(jnp.abs, g), s),
  )


CASES = {
  'default': {},
  'key': {
    'estimators': [
      m.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(3))
      for m in (sophia_optax, optax.contrib)
    ]
  },
  'own_estimator': {'estimators': [absolute_gradient()] * 2, 'gamma': 10.0},
  'not_clipped': {'clip_threshold': None, 'eps': 1e-2, 'gamma': 1.0},
  'low_clip': {'clip_threshold': 0.1, 'gamma': 1.0},
  'mask_tree': {'weight_decay_mask': {'w': True, 'b': {'c': False}}},
  'mask_prefix': {'weight_decay_mask': {'w': False, 'b': True}},
  'mask_fn': {
    'weight_decay_mask': lambda t: jax.tree.map(lambda x: x.ndim > 1, t)
  },
  'schedule': {'learning_rate': optax.cosine_decay_schedule(2e-5, 100)},
  'mu_bfloat16': {'mu_dtype': jnp.bfloat16},
  'betas_and_interval': {'b1': 0.9, 'b2': 0.5, 'update_interval': 3},
}


def train(sophia, learning_rate=1e-5, **kwargs):
  tx = sophia(learning_rate, weight_decay=0.1, **kwargs)

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


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow)
    if name not in ('default', 'betas_and_interval', 'mask_tree', 'mu_bfloat16')
    else name
    for name in CASES
  ],
)
def test_same_numbers(name):
  kwargs = dict(CASES[name])
  ours, theirs = {}, {}
  if 'estimators' in kwargs:
    estimators = kwargs.pop('estimators')
    ours, theirs = ({'hessian_diagonal_fn': e} for e in estimators)
  actual = train(sophia_optax.sophia, **kwargs, **ours)
  expected = train(optax.contrib.sophia, **kwargs, **theirs)
  chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=0)
  # Not all updates are clipped, or h would not have been compared.
  size = jnp.abs(actual[0]['w'])
  full = size > 0.99 * jnp.max(size, axis=(1, 2), keepdims=True)
  assert jnp.mean(full) < 0.9
