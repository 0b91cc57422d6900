"""γ that is adjusted to a win rate. sophia_test.py has the formula."""

import functools
from typing import NamedTuple

import chex
import devices
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')


def test_reaches_the_target_from_any_gamma():
  # Curvatures over four orders of magnitude, with noisy gradients. γ is right
  # near 0.3.
  curvatures = 10 ** jnp.linspace(-2, 2, 200)
  keys = jax.random.split(jax.random.PRNGKey(1), 400)

  def win_rates(gamma):
    tx = sophia_optax.sophia(
      optax.cosine_decay_schedule(3e-3, 400),
      b1=0.9,
      gamma=gamma,
      target_win_rate=0.3,
      update_interval=5,
      hessian_diagonal_fn=optax.stateless(lambda g, _: curvatures),
    )

    def step(carry, key):
      x, state = carry
      noise = jax.random.normal(key, (200,)) * jnp.sqrt(curvatures)
      updates, state = tx.update(curvatures * x + noise, state, x)
      win_rate = optax.tree.get(state, 'win_rate')
      return (optax.apply_updates(x, updates), state), win_rate

    x = 3 * jax.random.normal(jax.random.PRNGKey(0), (200,))
    return jax.lax.scan(step, (x, tx.init(x)), keys)[1]

  gammas = jnp.array([3e-7, 0.3, 3e5])
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    got = jax.jit(jax.vmap(win_rates))(gammas)
  np.testing.assert_allclose(got[:, 300:], 0.3, atol=0.1)


class Constant(NamedTuple):
  """A training whose gradient and curvature are the same in each step."""

  grads: chex.Array
  curvature: chex.Array
  factor: tuple[float, float]  # the smallest and the largest in the end
  target: float = 0.3
  eps: float = 1e-20
  c: float = 1.0


ONES = np.ones(12)
SPREAD = np.array([0.01, 0.02, 0.05, 0.5, 2.0, 4.0] + [5e-4] * 6)
CONSTANT = {
  # Half win at any γ, although they have a gradient and positive curvature.
  'below_eps': Constant(SPREAD, ONES, (1e-3, 2e-2), eps=1e-3),
  'below_c_eps': Constant(SPREAD, ONES, (1e-5, 2e-4), eps=1e-5, c=100.0),
  # Ten lose at any γ, so the target can't be reached. The others win by little.
  'negative_curvature': Constant(
    np.linspace(0.1, 1, 12), np.repeat([-1, 1], [10, 2]), (0.1, 10), 0.5
  ),
  'all_lose': Constant(1e15 * ONES, ONES, (1e10, 1e10)),
  'all_win': Constant(ONES, 1e15 * ONES, (1e-10, 1e-10)),
  'no_gradient': Constant(0 * ONES, ONES, (1, 1)),
  # Regression: γ rose to infinity, and 0 · ∞ made the updates NaN.
  'infinite_gradient': Constant(np.inf * ONES, ONES, (1, 1)),
}


@functools.cache
def train_all():
  def train(grads, curvature, _, target, eps, c):
    tx = sophia_optax.scale_by_sophia(
      b1=0.5,
      b2=0.0,
      gamma=1.0,
      eps=eps,
      clip_threshold=c,
      update_interval=1,
      target_win_rate=target,
      hessian_diagonal_fn=optax.stateless(lambda g, _: curvature),
    )
    step = lambda state, _: tx.update(grads, state, grads)[::-1]
    state, updates = jax.lax.scan(step, tx.init(grads), length=100)
    return state.gamma_factor, updates

  arrays = jax.tree.map(lambda *x: jnp.float32(np.stack(x)), *CONSTANT.values())
  return jax.jit(jax.vmap(train))(*arrays)


@pytest.mark.parametrize('name', CONSTANT)
def test_gamma_that_settles(name):
  factor, updates = (x[list(CONSTANT).index(name)] for x in train_all())
  assert jnp.all(jnp.isfinite(updates))
  low, high = CONSTANT[name].factor
  assert low * (1 - 1e-5) <= factor <= high * (1 + 1e-5)


def test_divided_parameters_are_counted_as_one_and_replicas_agree():
  tx = sophia_optax.scale_by_sophia(
    b1=0.5,
    b2=0.5,
    gamma=1.0,
    update_interval=1,
    target_win_rate=0.3,
    diagnostics=True,
    hessian_diagonal_fn=optax.stateless(lambda g, _: jax.tree.map(jnp.cbrt, g)),
  )

  def train(grads):
    step = lambda state, scale: (
      tx.update(optax.tree.scale(scale, grads), state, grads)[1],
      None,
    )
    scales = jnp.array([1.0, 0.9, 1.1, 1.0])
    state = jax.lax.scan(step, tx.init(grads), scales)[0]
    found = sophia_optax.diagnose(state)
    return state.win_rate, state.gamma_factor, state.by_leaf, found

  divided = jnp.float32(np.random.default_rng(0).normal(size=16))
  grads = {'divided': divided, 'whole': divided[:5]}
  # JAX checks that the results are the same on all devices.
  specs = ({'divided': P('model'), 'whole': P()},)
  got = devices.map_grid(train, grads, specs=specs, out_specs=P())
  expected = jax.jit(train)(grads)
  assert 0 < expected[0] < 1
  assert expected[1] != 1
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize('injected', [False, True])
def test_donated_state(injected):
  # Regressions: the state could not be donated, as two of its arrays shared a
  # buffer; `gamma` was ambiguous.
  factory = sophia_optax.scale_by_sophia
  if injected:
    factory = optax.inject_hyperparams(factory)
  gamma = jnp.array(0.5)
  tx = factory(
    gamma=gamma, target_win_rate=0.3, hessian_diagonal_fn=optax.identity()
  )
  x = jnp.ones(2)
  step = jax.jit(lambda s: tx.update(x, s, x)[1], donate_argnums=0)
  state = step(step(tx.init(x)))
  assert gamma == 0.5  # The user's array is not donated.
  assert optax.tree.get(state, 'gamma') == (0.5 if injected else None)
  assert optax.tree.get(state, 'gamma_factor') == 4  # All have lost.
