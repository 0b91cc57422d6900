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


def every_coordinate(params):
  leaves = [x.ravel().astype(jnp.float32) for x in jax.tree.leaves(params)]
  return jnp.concatenate(leaves)


SOPHIA_NUMBERS = {
  'b1': 0.9,
  'b2': 0.95,
  'eps': 1e-8,
  'weight_decay': 1e-3,
  'gamma': 0.05,
  'clip_threshold': 0.9,
  'update_interval': 2,
  'print_win_rate_every_n_steps': 0,
}

ROWS = {
  'sophia': Row(
    functools.partial(sophia_optax.sophia, weight_decay=0.0),
    lambda loss_fn: {'obj_fn': loss_fn},
    SOPHIA_NUMBERS,
  ),
  'sophia_normal_probes': Row(
    functools.partial(
      sophia_optax.sophia,
      hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
        jax.random.key_data(jax.random.key(0)),
        num_samples=2,
        distribution='normal',
      ),
      weight_decay=0.0,
      refresh_before_update=True,
      bias_correction=False,
    ),
    lambda loss_fn: {'obj_fn': loss_fn},
    SOPHIA_NUMBERS,
  ),
  'sophia_typed_key': Row(
    functools.partial(
      sophia_optax.sophia,
      hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
        jax.random.key(1)
      ),
    ),
    lambda loss_fn: {'obj_fn': loss_fn},
    SOPHIA_NUMBERS,
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
    ),
    lambda loss_fn: {'predict_fn': every_coordinate},
    {
      'b1': 0.9,
      'b2': 0.95,
      'rho': 0.05,
      'weight_decay': 1e-3,
      'update_interval': 2,
    },
  ),
  'sophia_g_squared_gradient': Row(
    functools.partial(
      sophia_optax.sophia_g,
      hessian_diagonal_fn=(
        sophia_optax.squared_gradient_estimator_diag_hessian(2)
      ),
      rho=1e-3,
      weight_decay=0.0,
      adam_b2=0.95,
    ),
    lambda loss_fn: {},
    {'b1': 0.9, 'b2': 0.95, 'rho': 0.05, 'weight_decay': 1e-3, 'adam_b2': 0.9},
  ),
}

PARAMS = {'w': jnp.array([[0.5, -1.0], [2.0, 0.1]]), 'b': jnp.array([1.0, -2])}


def loss_fn(params):
  return jnp.sum(jnp.cosh(params['w'])) + jnp.sum((params['b'] - 1) ** 4)


@pytest.fixture(
  name='row',
  params=[
    pytest.param(name, marks=pytest.mark.slow)
    if name in ('sophia_normal_probes', 'sophia_typed_key')
    else name
    for name in ROWS
  ],
)
def _row(request):
  return ROWS[request.param]


def make_step(tx, extra_args):
  def step(params, state):
    grads = jax.grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, **extra_args(loss_fn))
    return optax.apply_updates(params, updates), state

  return step


def train(tx, extra_args, params=PARAMS, steps=6, step=None):
  """Parameters and state after some steps, compiled unless step is given."""
  step = step or jax.jit(make_step(tx, extra_args))
  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def test_jit_eager_and_scan_agree(row):
  tx = row.factory(0.1)
  jitted = train(tx, row.extra_args, steps=4)
  step = make_step(tx, row.extra_args)
  eager = train(tx, row.extra_args, steps=4, step=step)
  scanned, _ = jax.lax.scan(
    lambda carry, _: (step(*carry), None), (PARAMS, tx.init(PARAMS)), length=4
  )
  for other in (eager, scanned):
    jax.tree.map(assert_close, jitted, other)


def assert_close(x, y):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x, y = jax.random.key_data(x), jax.random.key_data(y)
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_population_under_vmap(row):
  tx = row.factory(0.1)
  members = [optax.tree.scale(x, PARAMS) for x in (1.0, 0.5, -1.0)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
  step = jax.jit(make_step(tx, row.extra_args))
  trained = jax.vmap(lambda p: train(tx, row.extra_args, p, step=step))(stacked)
  for i, member in enumerate(members):
    alone = train(tx, row.extra_args, member, step=step)
    jax.tree.map(lambda x, y, i=i: assert_close(x[i], y), trained, alone)


def test_second_call_does_not_recompile(row):
  tx = row.factory(optax.linear_schedule(0.1, 0.0, 10))
  traces = []

  @jax.jit
  def step(params, state):
    traces.append(None)
    grads = jax.grad(loss_fn)(params)
    updates, state = tx.update(
      grads, state, params, **row.extra_args(loss_fn), unknown=3
    )
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  before = state
  for _ in range(3):
    params, state = step(params, state)
  assert len(traces) == 1
  chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
  # Weak types would change the type of a lax.cond or lax.scan carry.
  assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, state)


def test_unknown_extra_args_are_ignored(row):
  tx = row.factory(0.1)
  chex.assert_trees_all_equal(
    train(tx, row.extra_args, steps=2)[0],
    train(
      tx,
      lambda loss_fn: {**row.extra_args(loss_fn), 'value': 1.0, 'x': 'y'},
      steps=2,
    )[0],
  )


def test_state_types_are_stable_under_cond(row):
  tx = row.factory(0.1)

  @jax.jit
  def maybe_update(flag, state):
    return jax.lax.cond(
      flag,
      lambda s: tx.update(PARAMS, s, PARAMS, **row.extra_args(loss_fn)),
      lambda s: (PARAMS, s),
      state,
    )

  _, state = maybe_update(True, tx.init(PARAMS))
  assert optax.tree.get(state[0], 'count') == 1


def test_inject_hyperparams(row):
  # Every number, so that all are traced, and a schedule for the rate.
  schedule = optax.linear_schedule(0.1, 0.05, 5)
  injected = optax.inject_hyperparams(row.factory)(
    learning_rate=schedule, **row.numbers
  )
  fixed = row.factory(schedule, **row.numbers)
  params, state = train(injected, row.extra_args)
  expected, _ = train(fixed, row.extra_args)
  chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
  assert set(row.numbers) <= set(state.hyperparams)

  # A number changed between two steps takes effect.
  state.hyperparams['weight_decay'] = jnp.float32(10.0)
  update = lambda s: injected.update(
    PARAMS, s, PARAMS, **row.extra_args(loss_fn)
  )[0]
  changed = update(state)
  state.hyperparams['weight_decay'] = jnp.float32(0.0)
  assert not np.allclose(changed['w'], update(state)['w'])


@jax.numpy_dtype_promotion('standard')  # MultiSteps itself needs it.
def test_multi_steps(row):
  tx = optax.MultiSteps(row.factory(0.1), every_k_schedule=2)
  once = train(row.factory(0.1), row.extra_args, steps=1)[0]
  step = jax.jit(make_step(tx, row.extra_args))
  first, _ = train(tx, row.extra_args, steps=1, step=step)
  second, _ = train(tx, row.extra_args, steps=2, step=step)
  chex.assert_trees_all_equal(first, PARAMS)
  chex.assert_trees_all_close(second, once, rtol=1e-6, atol=1e-6)


def test_apply_if_finite(row):
  tx = optax.apply_if_finite(row.factory(0.1), max_consecutive_errors=3)
  state = tx.init(PARAMS)
  update = jax.jit(
    lambda g, s: tx.update(g, s, PARAMS, **row.extra_args(loss_fn))
  )
  bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
  updates, after = update(bad, state)
  chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))
  jax.tree.map(assert_close, after.inner_state, state.inner_state)
  updates, after = update(PARAMS, after)
  assert all(jnp.all(u != 0) for u in jax.tree.leaves(updates))


def test_masked(row):
  mask = {'w': True, 'b': False}
  tx = optax.masked(row.factory(0.1), mask)
  updates, _ = tx.update(
    PARAMS,
    tx.init(PARAMS),
    PARAMS,
    full_params=PARAMS,
    **row.extra_args(loss_fn),
  )
  chex.assert_trees_all_equal(updates['b'], PARAMS['b'])
  assert np.all(np.array(updates['w']) * np.array(PARAMS['w']) < 0)


@jax.numpy_dtype_promotion('standard')  # optax.ema itself needs it.
def test_chain_with_clipping_before_and_ema_after(row):
  tx = optax.chain(
    optax.clip_by_global_norm(1e-3), row.factory(0.1), optax.ema(0.5)
  )
  params, state = train(tx, row.extra_args, steps=1)
  # The moment saw the clipped gradient, and the EMA the update: debiased, the
  # average of one update is that update.
  assert optax.tree.norm(optax.tree.get(state, 'mu')) < 1e-3
  moved = optax.tree.sub(params, PARAMS)
  chex.assert_trees_all_close(
    optax.tree.get(state, 'ema'), optax.tree.scale(0.5, moved), atol=2e-7
  )
  assert optax.tree.norm(moved) > 0


def test_map_params(row):
  tx = row.factory(0.1)
  state = tx.init(PARAMS)
  marked = optax.tree.map_params(
    tx,
    lambda x: 'like a parameter',
    state,
    transform_non_params=lambda x: 'not',
  )
  sophia_state = optax.tree.get(marked, 'SophiaState')
  same = jax.tree.map(lambda _: 'like a parameter', PARAMS)
  assert sophia_state.mu == sophia_state.nu == same
  assert sophia_state.count == sophia_state.win_rate == 'not'


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_update_keeps_the_dtype(row, dtype):
  params = optax.tree.cast(PARAMS, dtype)
  params, state = train(row.factory(0.1), row.extra_args, params=params)
  assert all(p.dtype == dtype for p in jax.tree.leaves(params))
  chex.assert_tree_all_finite(state[0].mu)


PROBLEMS = {
  'parabola': (lambda x: jnp.sum((x - jnp.array([1.0, -2.0])) ** 2), [1, -2]),
  'rosenbrock': (
    lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    [1, 1],
  ),
}


@pytest.mark.parametrize('problem', PROBLEMS)
def test_converges(row, problem):
  problem_fn, minimum = PROBLEMS[problem]
  steps = 3000
  tx = row.factory(optax.linear_schedule(2e-2, 0.0, steps), weight_decay=0.0)

  def step(carry, _):
    params, state = carry
    grads = jax.grad(problem_fn)(params)
    updates, state = tx.update(
      grads, state, params, **row.extra_args(problem_fn)
    )
    return (optax.apply_updates(params, updates), state), None

  params = jnp.array([-1.0, 1.5])
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
  np.testing.assert_allclose(params, minimum, atol=3e-2)
