"""`adam_b2`: no element of an update is larger than Adam's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

B1, B2, ADAM_B2 = 0.9, 0.7, 0.8
GAMMA, EPS = 0.5, 1e-3


def make(**kwargs):
  """Returns Sophia whose estimate is the first argument of the loss."""
  estimator = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda g, s, params, *, estimate, **_: (estimate, s),
  )
  defaults = {
    'b1': B1,
    'b2': B2,
    'eps': EPS,
    'gamma': GAMMA,
    'update_interval': 2,
    'hessian_diagonal_fn': estimator,
    'adam_b2': ADAM_B2,
  }
  return sophia_optax.scale_by_sophia(**(defaults | kwargs))


def run(tx, grads, estimates=None, params=None):
  """Returns the update of each step, and the last state."""
  params = params or jax.tree.map(jnp.zeros_like, grads[0])
  if estimates is None:
    estimates = [jax.tree.map(jnp.zeros_like, params)] * len(grads)
  state, updates = tx.init(params), []
  update = jax.jit(tx.update)
  for g, estimate in zip(grads, estimates, strict=True):
    u, state = update(g, state, params, estimate=estimate)
    updates.append(u)
  return updates, state


def draw(seed, steps=12):
  rng = np.random.default_rng(seed)
  shapes = {'matrix': (5, 4), 'scalar': (), 'small': (3,)}
  scales = {'small': 1e-4}
  return [
    {
      k: jnp.float32(scales.get(k, 1.0) * rng.normal(size=s))
      for k, s in shapes.items()
    }
    for _ in range(steps)
  ]


@pytest.mark.parametrize('refresh_before_update', [False, True])
@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize('nesterov', [False, True])
def test_in_numpy(nesterov, bias_correction, refresh_before_update):
  grads, estimates = draw(0), jax.tree.map(lambda x: 5 * x, draw(1))
  tx = make(
    nesterov=nesterov,
    bias_correction=bias_correction,
    refresh_before_update=refresh_before_update,
    clip_threshold=0.4,
  )
  updates, state = run(tx, grads, estimates)
  decided = {'curvature': 0, 'adam': 0, 'eps': 0, 'clip': 0}
  for name in grads[0]:
    m = h = v = 0.0
    for t in range(1, len(grads) + 1):
      g = np.asarray(grads[t - 1][name])
      m = B1 * m + (1 - B1) * g
      v = ADAM_B2 * v + (1 - ADAM_B2) * g**2
      new_h = h
      if (t - 1) % 2 == 0:
        new_h = B2 * h + (1 - B2) * np.asarray(estimates[t - 1][name])
      ahead, now = (1 - B1 ** (t + 1), 1 - B1**t) if bias_correction else (1, 1)
      m_hat = B1 * m / ahead + (1 - B1) * g / now if nesterov else m / now
      bounds = {
        'curvature': GAMMA * (new_h if refresh_before_update else h),
        'adam': np.sqrt(v / (1 - ADAM_B2**t)),
        'eps': np.full_like(g, EPS),
      }
      denominator = np.max(np.broadcast_arrays(*bounds.values()), axis=0)
      expected = np.clip(m_hat / denominator, -0.4, 0.4)
      np.testing.assert_allclose(updates[t - 1][name], expected, rtol=2e-5)
      for key, bound in bounds.items():
        decided[key] += np.sum(bound == denominator)
      decided['clip'] += np.sum(np.abs(expected) == 0.4)
      h = new_h
    np.testing.assert_allclose(state.second_moment[name], v, rtol=1e-5)
  assert min(decided.values()) > 5  # of 288 updates


@pytest.mark.parametrize('nesterov', [False, True])
def test_without_curvature_it_is_adam(nesterov):
  grads = draw(0)
  ours, _ = run(
    make(gamma=0.0, eps=1e-30, clip_threshold=None, nesterov=nesterov), grads
  )
  adam = optax.scale_by_adam(B1, ADAM_B2, eps=0.0, nesterov=nesterov)
  state = adam.init(grads[0])
  with jax.numpy_dtype_promotion('standard'):  # optax's needs it.
    for g, u in zip(grads, ours, strict=True):
      expected, state = adam.update(g, state)
      chex.assert_trees_all_close(u, expected, rtol=1e-5)


def test_win_rate_and_gamma_are_those_without_the_limit():
  grads, estimates = draw(0), jax.tree.map(jnp.abs, draw(1))
  found = []
  for adam_b2 in (None, ADAM_B2):
    tx = make(adam_b2=adam_b2, target_win_rate=0.4)
    _, state = run(tx, grads, estimates)
    found.append((state.win_rate, state.gamma_factor, state.nu))
  chex.assert_trees_all_equal(*found)
  assert 0 < found[0][0] < 1
  assert found[0][1] != 1


@pytest.mark.parametrize(
  'factory', [sophia_optax.sophia, sophia_optax.sophia_g]
)
def test_factories_limit_before_decay_and_learning_rate(factory):
  params, g = jnp.array([1.0, -2.0]), jnp.array([1.0, 0.5])
  estimator = optax.stateless(lambda g, p: jnp.zeros(2))
  tx = factory(
    2.0, b1=0.0, hessian_diagonal_fn=estimator, weight_decay=0.1, adam_b2=0.75
  )
  updates, state = tx.update(g, tx.init(params), params)
  np.testing.assert_allclose(updates, [-2.2, -1.6], rtol=1e-6)
  # v̂ = (0.75 · 0.25 + 0.25 / 4) g² / (1 - 0.75²), with the first g.
  updates, _ = tx.update(-g / 2, state, params)
  u = 0.5 / np.sqrt(0.25 / (1 - 0.75**2))
  np.testing.assert_allclose(updates, [2 * u - 0.2, 2 * u + 0.4], rtol=1e-5)


def test_complex_integer_and_empty_arrays():
  grads = {
    'complex': jnp.array([1.0 + 1.0j, 2.0 - 3.0j]),
    'empty': jnp.zeros(0),
    'integer': jnp.array([3]),
    'unused': jnp.zeros(2),
  }
  real = {'pair': jnp.array([[1.0, 1.0], [2.0, -3.0]])}  # the same numbers
  halved = lambda tree: jax.tree.map(lambda x: -x / 2, tree)
  second = halved({k: g for k, g in grads.items() if k != 'integer'})
  second['integer'] = grads['integer']
  updates, state = run(make(), [grads, second], params=grads)
  expected, alone = run(make(), [real, halved(real)])
  for got, wanted in (
    (updates[1]['complex'], expected[1]['pair']),
    (state.second_moment['complex'], alone.second_moment['pair']),
  ):
    got = np.stack([got.real, got.imag], -1)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
  assert np.abs(expected[1]['pair']).max() < 0.5  # It is limited.
  np.testing.assert_array_equal(updates[1]['unused'], 0.0)
  np.testing.assert_array_equal(updates[1]['integer'], 0)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_squares_are_in_float32(dtype):
  # The squares of 300 and of 1e-4 are not numbers in float16.
  grads = {'large': jnp.full(4, 300, dtype), 'small': jnp.full(4, 1e-4, dtype)}
  steps = [grads, jax.tree.map(jnp.negative, grads)]
  updates, state = run(make(eps=1e-20, nu_dtype=dtype), steps)
  for name, g in grads.items():
    square = np.float32(g[0]) ** 2
    np.testing.assert_allclose(
      state.second_moment[name], (1 - ADAM_B2**2) * square, rtol=1e-5
    )
    assert state.second_moment[name].dtype == jnp.float32
    # m̂ = -0.01 g / 0.19, and v̂ is g².
    np.testing.assert_allclose(
      np.float32(updates[1][name]), -0.01 / 0.19, rtol=2e-2
    )
    assert updates[1][name].dtype == dtype


def test_scale_of_the_loss_has_no_effect():
  grads = draw(0)
  tx = make()
  expected = state = tx.init(grads[0])
  for g in grads:
    wanted, expected = tx.update(g, expected, g, refresh=False)
    scaled = jax.tree.map(lambda x: 8 * x, g)
    got, state = tx.update(scaled, state, g, loss_scale=8.0, refresh=False)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)
  chex.assert_trees_all_close(
    state.second_moment, expected.second_moment, rtol=1e-6
  )
