"""Properties of all optax optimizers, tested for those of this library.

A row brings its own factory and the extra arguments of its update, as a
function of the loss, so that no test needs to know what it is testing.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax


class Row(NamedTuple):
  factory: Callable[..., Any]  # Takes learning_rate and `numbers`.
  extra_args: Callable[[Callable[..., Any]], dict[str, Any]]
  numbers: dict[str, float]  # Hyperparameters to inject.
  static: tuple[str, ...] = ()  # Those that can not be injected.
  distance: float = 3e-2  # From the minimum of Rosenbrock's function.


def every_coordinate(params):
  leaves = [x.ravel().astype(jnp.float32) for x in jax.tree.leaves(params)]
  return jnp.concatenate(leaves)


ROWS = {
  'sophia': Row(
    functools.partial(
      sophia_optax.sophia,
      hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
        jax.random.key(1)
      ),
      weight_decay=0.0,
      diagnostics=True,
    ),
    lambda loss_fn: {'obj_fn': loss_fn},
    {
      'b1': 0.9,
      'b2': 0.95,
      'eps': 1e-8,
      'weight_decay': 1e-3,
      'gamma': 0.05,
      'clip_threshold': 0.9,
      'update_interval': 2,
      'print_win_rate_every_n_steps': 0,
    },
  ),
  'sophia_g': Row(
    # As many outputs as parameters, so that all have curvature.
    functools.partial(
      sophia_optax.sophia_g,
      hessian_diagonal_fn=(
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
          likelihood='gaussian'
        )
      ),
      weight_decay=0.0,
      nesterov=True,
      nu_bias_correction=True,
      adam_b2=0.95,
      target_win_rate=0.3,
    ),
    lambda loss_fn: {'predict_fn': every_coordinate},
    {
      'b1': 0.9,
      'b2': 0.95,
      'rho': 0.05,
      'weight_decay': 1e-3,
      'update_interval': 2,
      'adam_b2': 0.9,
      'target_win_rate': 0.4,
    },
  ),
  'in_eigenbasis': Row(
    functools.partial(
      sophia_optax.sophiaw, curvature='hessian', eigenbasis=True
    ),
    lambda loss_fn: {'obj_fn': loss_fn},
    {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 1e-3},
    ('curvature_fraction', 'curvature_parts'),
    0.2,
  ),
}

PARAMS = {'w': jnp.array([[0.5, -1.0], [2.0, 0.1]]), 'b': jnp.array([1.0, -2])}


def loss_fn(params):
  return jnp.sum(jnp.cosh(params['w'])) + jnp.sum((params['b'] - 1) ** 4)


@pytest.fixture(name='row', params=ROWS)
def _row(request):
  return ROWS[request.param]


def make_step(tx, extra_args, traces=None):
  """Returns a step that is added to `traces` whenever Python runs it."""

  def step(params, state):
    if traces is not None:
      traces.append(step)
    grads = jax.grad(loss_fn)(params)
    # An extra argument that no part of the optimizer knows.
    updates, state = tx.update(
      grads, state, params, **extra_args(loss_fn), unknown='x'
    )
    return optax.apply_updates(params, updates), state

  return step


def train(tx, extra_args, params=PARAMS, steps=4, step=None):
  """Parameters and state after some steps, compiled unless step is given."""
  step = step or jax.jit(make_step(tx, extra_args))
  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def assert_close(x, y):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x, y = jax.random.key_data(x), jax.random.key_data(y)
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_step_is_compiled_once_and_keeps_the_types_of_the_state(row):
  tx = row.factory(optax.linear_schedule(0.1, 0.0, 10))
  traces = []
  step = jax.jit(make_step(tx, row.extra_args, traces), donate_argnums=1)
  before = jax.tree.map(jax.typeof, tx.init(PARAMS))
  _, state = train(tx, row.extra_args, step=step)
  assert len(traces) == 1
  # Weak types would change the type of a lax.cond or lax.scan carry.
  assert before == jax.tree.map(jax.typeof, state)


def test_eager_agrees_with_jit():
  tx, extra_args = ROWS['sophia'].factory(0.1), ROWS['sophia'].extra_args
  eager = train(tx, extra_args, steps=2, step=make_step(tx, extra_args))
  jax.tree.map(assert_close, train(tx, extra_args, steps=2), eager)


def test_scan_and_a_population_under_vmap_agree_with_jit(row):
  tx = row.factory(0.1)
  step = make_step(tx, row.extra_args)

  def scanned(params):
    carry = params, tx.init(params)
    return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=3)[0]

  members = [PARAMS, optax.tree.scale(-1.0, PARAMS)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
  population = jax.jit(jax.vmap(scanned))(stacked)
  jitted = jax.jit(step)
  for i, member in enumerate(members):
    alone = train(tx, row.extra_args, member, 3, jitted)
    jax.tree.map(lambda x, y, i=i: assert_close(x[i], y), population, alone)


def test_inject_hyperparams(row):
  # Every number, so that all are traced, and a schedule for the rate.
  schedule = optax.linear_schedule(0.1, 0.05, 5)
  injected = optax.inject_hyperparams(row.factory, static_args=row.static)(
    learning_rate=schedule, **row.numbers
  )
  traces = []
  step = jax.jit(make_step(injected, row.extra_args, traces))
  params, state = train(injected, row.extra_args, step=step)
  fixed = row.factory(schedule, **row.numbers)
  expected, _ = train(fixed, row.extra_args)
  chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
  assert set(row.numbers) <= set(state.hyperparams)

  # A number changed between two steps takes effect.
  def after(**numbers):
    hyperparams = state.hyperparams | jax.tree.map(jnp.float32, numbers)
    return step(PARAMS, state._replace(hyperparams=hyperparams))

  before, _ = after(weight_decay=0.0)
  decayed, _ = after(weight_decay=10.0)
  assert not np.allclose(before['w'], decayed['w'])
  _, changed = after(b1=0.0)
  gradient = jax.grad(loss_fn)(PARAMS)
  if bases := optax.tree.get(changed, 'bases'):
    left, right = bases['w']
    gradient['w'] = left[0].T @ gradient['w'] @ right[0]
  chex.assert_trees_all_close(
    optax.tree.get(changed, 'mu'), gradient, rtol=1e-6
  )
  assert len(traces) == 1


def test_apply_if_finite_clipping_before_and_ema_after(row):
  chained = optax.chain(
    optax.clip_by_global_norm(1e-3), row.factory(0.1), optax.ema(0.5)
  )
  tx = optax.apply_if_finite(chained, max_consecutive_errors=3)
  state = tx.init(PARAMS)
  update = jax.jit(
    lambda g, s: tx.update(g, s, PARAMS, **row.extra_args(loss_fn))
  )
  with jax.numpy_dtype_promotion('standard'):  # optax.ema itself needs it.
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    updates, after = update(bad, state)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))
    jax.tree.map(assert_close, after.inner_state, state.inner_state)
    updates, state = update(PARAMS, after)
  # The moment saw the clipped gradient, and the EMA the update: debiased, the
  # average of one update is that update.
  assert 0 < optax.tree.norm(optax.tree.get(state, 'mu')) < 1e-3
  chex.assert_trees_all_close(
    optax.tree.get(state, 'ema'), optax.tree.scale(0.5, updates), atol=2e-7
  )
  assert all(jnp.all(u != 0) for u in jax.tree.leaves(updates))


def test_map_params(row):
  tx = row.factory(0.1)
  marked = optax.tree.map_params(
    tx,
    lambda x: 'like a parameter',
    tx.init(PARAMS),
    transform_non_params=lambda x: 'not',
  )
  sophia_state = optax.tree.get(marked, 'SophiaState')._asdict()
  same = jax.tree.map(lambda _: 'like a parameter', PARAMS)
  for name in ('mu', 'nu', 'second_moment'):
    assert sophia_state.pop(name) in (same, None)
  assert set(jax.tree.leaves(sophia_state)) == {'not'}


def test_minimizes_rosenbrock(row):
  rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
  steps = 3000
  tx = row.factory(optax.linear_schedule(2e-2, 0.0, steps), weight_decay=0.0)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(
      jax.grad(rosenbrock)(params), state, params, **row.extra_args(rosenbrock)
    )
    return (optax.apply_updates(params, updates), state), None

  params = jnp.array([-1.0, 1.5])
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
  np.testing.assert_allclose(params, 1.0, atol=row.distance)
