"""The limit of `adam_b2` on the update of each array."""

import chex
from devices import map_grid
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax

B1, B2 = 0.9, 0.8  # b2 is that of the second moment


def make(nesterov=False, estimate=0.01, **kwargs):
  estimator = optax.stateless(
    lambda g, p: jax.tree.map(lambda x: jnp.full_like(x, estimate), p)
  )
  return sophia_optax.scale_by_sophia(
    B1,
    gamma=1.0,
    hessian_diagonal_fn=estimator,
    nesterov=nesterov,
    **({'adam_b2': B2} | kwargs),
  )


def run(tx, grads, params):
  """Returns the updates of each step, and the last state."""
  state, updates = tx.init(params), []
  for g in grads:
    u, state = tx.update(g, state, params)
    updates.append(u)
  return updates, state


def draw(shapes, steps=12):
  rng = np.random.default_rng(0)
  return [
    {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}
    for _ in range(steps)
  ]


@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize('nesterov', [False, True])
def test_in_numpy(nesterov, bias_correction):
  grads = draw({'noise': (5, 4), 'trend': (6,), 'scalar': ()})
  for t, g in enumerate(grads):
    g['trend'] = 0.05 * (g['trend'] + 1)
    g['scalar'] *= 10.0**-t  # ends far inside the clip
  params = jax.tree.map(jnp.asarray, grads[0])
  kwargs = {'nesterov': nesterov, 'bias_correction': bias_correction}
  free, _ = run(make(**kwargs, adam_b2=None), grads, params)
  updates, state = run(make(**kwargs), grads, params)

  scaled = dict.fromkeys(params, 0)
  for i, name in enumerate(params):
    m = v = 0.0
    for t, g in enumerate((g[name] for g in grads), start=1):
      m = B1 * m + (1 - B1) * g
      v = B2 * v + (1 - B2) * np.mean(g**2)
      m_hat = m / (1 - B1**t)
      if nesterov:
        m_hat = B1 * m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)
      limit = np.sqrt(np.mean(m_hat**2) / (v / (1 - B2**t)))
      u = np.asarray(free[t - 1][name])
      factor = min(1, limit / np.sqrt(np.mean(u**2)))
      scaled[name] += factor < 1
      np.testing.assert_allclose(updates[t - 1][name], u * factor, rtol=1e-5)
    np.testing.assert_allclose(state.mean_squares[i], v, rtol=1e-5)
  # Noise is scaled down, and small updates are not.
  assert scaled['noise'] >= 11  # The first limit is 1.
  assert 0 < scaled['scalar'] < 12


@pytest.mark.parametrize('nesterov', [False, True])
def test_sign_momentum_on_one_number_is_adam(nesterov):
  # An array with one element: Adam's update, or ±1 if that is larger.
  grads = [g['x'] for g in draw({'x': ()})]
  ours, _ = run(make(nesterov, estimate=0.0, eps=1e-30), grads, jnp.zeros(()))
  adam = optax.scale_by_adam(B1, B2, eps=0.0, nesterov=nesterov)
  state = adam.init(jnp.zeros(()))
  with jax.numpy_dtype_promotion('standard'):  # optax's needs it.
    for g, u in zip(grads, ours, strict=True):
      expected, state = adam.update(jnp.asarray(g), state)
      np.testing.assert_allclose(u, jnp.clip(expected, -1, 1), rtol=1e-4)


@pytest.mark.parametrize(
  'factory', [sophia_optax.sophia, sophia_optax.sophia_g]
)
def test_factories_limit_before_decay_and_learning_rate(factory):
  params, g = jnp.array([1.0, -2.0]), jnp.array([1.0, 0.5])
  estimator = optax.stateless(lambda g, p: jnp.zeros(2))
  update = {}
  for name, b2 in ('free', None), ('limited', B2):
    tx = factory(
      2.0, b1=0.9, hessian_diagonal_fn=estimator, weight_decay=0.1, adam_b2=b2
    )
    update[name], state = tx.update(g, tx.init(params), params)
  np.testing.assert_allclose(update['free'], [-2.2, -1.6], rtol=1e-6)
  # The first update of both moments is g and mean(g²), so the limit is 1.
  np.testing.assert_allclose(update['limited'], update['free'], rtol=1e-6)
  update['limited'], _ = tx.update(-g, state, params)
  # m̂ = (0.9 - 1) 0.1 g / 0.19, and v̂ is mean(g²) still.
  np.testing.assert_allclose(
    update['limited'], [-0.2 + 0.2 / 1.9, 0.4 + 0.2 / 1.9], rtol=1e-5
  )


def test_complex_integer_and_empty_arrays():
  params = {
    'complex': jnp.array([1.0 + 1.0j, 2.0 - 3.0j]),
    'empty': jnp.zeros(0),
    'integer': jnp.array([3]),
    'unused': jnp.ones(2),
  }
  real = {'pair': jnp.array([[1.0, 1.0], [2.0, -3.0]])}  # the same numbers
  flip = lambda tree: jax.tree.map(lambda x: -x, tree)
  grads = params | {'unused': jnp.zeros(2)}
  tx = make(estimate=0.0)
  updates, state = run(tx, [grads, flip(grads)], params)
  expected, alone = run(tx, [real, flip(real)], real)
  got = np.asarray(updates[1]['complex'])
  np.testing.assert_allclose(
    np.stack([got.real, got.imag], -1), expected[1]['pair'], rtol=1e-6
  )
  assert np.abs(got.real).max() < 0.5  # It is limited.
  np.testing.assert_array_equal(updates[1]['unused'], 0.0)
  np.testing.assert_array_equal(updates[1]['integer'], 0)
  # In the order of the names.
  np.testing.assert_allclose(
    state.mean_squares, [alone.mean_squares[0], 0, 0, 0], rtol=1e-6
  )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_squares_are_in_float32(dtype):
  # The squares of 300 and of 1e-4 are not numbers in float16.
  params = {'large': jnp.ones(4, dtype), 'small': jnp.ones(4, dtype)}
  grads = {'large': jnp.full(4, 300, dtype), 'small': jnp.full(4, 1e-4, dtype)}
  tx = make(estimate=0.0, eps=1e-20)
  updates, state = run(tx, [grads, jax.tree.map(jnp.negative, grads)], params)
  for i, name in enumerate(params):
    square = np.float32(grads[name][0]) ** 2
    v = B2 * (1 - B2) * square + (1 - B2) * square
    np.testing.assert_allclose(state.mean_squares[i], v, rtol=1e-5)
    np.testing.assert_allclose(
      np.float32(updates[1][name]), -0.1 / 1.9, rtol=2e-2
    )
    assert updates[1][name].dtype == dtype


@pytest.mark.parametrize('axes', ['model', ('data', 'model')])
def test_divided_array_has_one_limit(axes):
  x = jnp.linspace(-1, 1, 16) ** 3
  grads = jnp.stack([x, -0.7 * x, jnp.flip(x)])
  tx = make(nesterov=True)

  def train(grads):
    def step(state, g):
      updates, state = tx.update(g, state, g)
      return state, updates

    state, updates = jax.lax.scan(step, tx.init(grads[0]), grads)
    return updates, state.mean_squares

  got = map_grid(
    train, grads, specs=P(None, axes), out_specs=(P(None, axes), P())
  )
  chex.assert_trees_all_close(got, jax.jit(train)(grads), rtol=1e-5)


def test_scale_of_the_loss_has_no_effect():
  grads = draw({'w': (3, 2)})
  params = jax.tree.map(jnp.asarray, grads[0])
  tx = make()
  expected, state = tx.init(params), tx.init(params)
  for g in grads:
    wanted, expected = tx.update(g, expected, params, refresh=False)
    scaled = jax.tree.map(lambda x: 8 * x, g)
    got, state = tx.update(scaled, state, params, loss_scale=8.0, refresh=False)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)
  chex.assert_trees_all_close(
    state.mean_squares, expected.mean_squares, rtol=1e-6
  )
