"""Whether a step refreshes h: decided by the count, an array or a bool."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

K = 10
RNG = np.random.default_rng(0)
PARAMS = {'w': jnp.float32(RNG.normal(size=(6, 4)))}
BATCHES = jnp.float32(RNG.normal(size=(25, 16, 6)))


def predict(params, x):
  return x @ params['w']


def loss_fn(params, x):
  return optax.softmax_cross_entropy_with_integer_labels(
    predict(params, x), jnp.argmax(x[:, :4], axis=-1)
  ).mean()


def extra_args(x):
  return {
    'obj_fn': lambda params: loss_fn(params, x),
    'predict_fn': lambda params: predict(params, x),
  }


def make_step(tx):
  def step(params, state, x, **decision):
    updates, state = tx.update(
      jax.grad(loss_fn)(params, x), state, params, **extra_args(x), **decision
    )
    return optax.apply_updates(params, updates), state

  return step


def estimate(updates, count, params, *, obj_fn, **extra_args):
  """A deterministic estimate, which changes with the state."""
  del updates, extra_args
  squares = jax.tree.map(jnp.square, jax.grad(obj_fn)(params))
  return optax.tree.scale(1.0 + jnp.cos(count), squares), count + 1.0


ESTIMATOR = optax.GradientTransformationExtraArgs(
  lambda params: jnp.zeros([]), estimate
)


def test_two_programs_have_the_bits_of_one():
  tx = sophia_optax.sophia(
    0.02,
    hessian_diagonal_fn=ESTIMATOR,
    refresh_before_update=True,
    target_win_rate=0.3,
    diagnostics=True,
    nu_bias_correction=True,
    nesterov=True,
    adam_b2=0.9,
  )
  step = make_step(tx)
  by_count, by_bool = jax.jit(step), jax.jit(step, static_argnames='refresh')
  one = two = PARAMS, tx.init(PARAMS)
  for i, x in enumerate(BATCHES):
    one, two = by_count(*one, x), by_bool(*two, x, refresh=i % K == 0)
    chex.assert_trees_all_equal(one, two)
  assert optax.tree.get(one[1], 'refresh_count') == 3


def test_scan_over_ordinary_steps_and_one_refresh():
  tx = sophia_optax.sophia(0.02, hessian_diagonal_fn=ESTIMATOR)
  step = make_step(tx)

  def body(carry, x, **decision):
    return step(*carry, x, **decision), None

  def cycle(carry, batches):
    carry, _ = body(carry, batches[0], refresh=True)
    ordinary = functools.partial(body, refresh=False)
    return jax.lax.scan(ordinary, carry, batches[1:])

  carry = PARAMS, tx.init(PARAMS)
  batches = BATCHES[: 2 * K]
  cycles = batches.reshape(2, K, *batches.shape[1:])
  chex.assert_trees_all_equal(
    jax.jit(lambda: jax.lax.scan(cycle, carry, cycles)[0])(),
    jax.jit(lambda: jax.lax.scan(body, carry, batches)[0])(),
  )


def counted(calls):
  """An estimator that adds to `calls` whenever Python runs it."""

  def update(updates, state, params=None, **extra_args):
    calls.append(None)
    return jax.tree.map(jnp.square, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@pytest.mark.parametrize(
  ('decision', 'conditionals', 'estimates'),
  [
    ({}, 1, 1),
    ({'refresh': jnp.array(False)}, 1, 1),
    ({'refresh': True, 'may_refresh': jnp.array(True)}, 1, 1),
    ({'refresh': True}, 0, 1),
    ({'refresh': np.bool_(True)}, 0, 1),
    ({'refresh': False}, 0, 0),
    ({'refresh': np.bool_(False)}, 0, 0),
    ({'refresh': True, 'may_refresh': False}, 0, 0),
    ({'may_refresh': False}, 0, 0),
    ({'refresh': False, 'may_refresh': jnp.array(True)}, 0, 0),
  ],
)
def test_a_bool_leaves_no_conditional(decision, conditionals, estimates):
  calls = []
  tx = sophia_optax.scale_by_sophia(hessian_diagonal_fn=counted(calls))
  known = {k: v for k, v in decision.items() if not isinstance(v, jax.Array)}
  jaxpr = jax.make_jaxpr(
    lambda grads, state, traced: tx.update(
      grads, state, PARAMS, **known, **traced
    )
  )(
    PARAMS,
    tx.init(PARAMS),
    {k: v for k, v in decision.items() if k not in known},
  )
  names = [equation.primitive.name for equation in jaxpr.eqns]
  assert names.count('cond') == conditionals
  assert len(calls) == estimates
  # Without a conditional, the estimate waits for the gradient.
  waits = estimates and not conditionals
  assert names.count('optimization_barrier') == waits


def test_outside_of_jit_only_a_refresh_calls_the_estimator():
  calls = []
  tx = sophia_optax.scale_by_sophia(
    update_interval=2, hessian_diagonal_fn=counted(calls)
  )
  state = tx.init(PARAMS)
  for number in (1, 1, 2, 2):
    _, state = tx.update(PARAMS, state, PARAMS)
    assert len(calls) == number


def test_the_last_micro_step_refreshes():
  n, k = 2, 5
  tx = sophia_optax.MultiSteps(
    sophia_optax.sophia(0.02, hessian_diagonal_fn=ESTIMATOR, update_interval=k),
    n,
  )
  step = make_step(tx)
  by_count, by_bool = jax.jit(step), jax.jit(step, static_argnames='refresh')
  one = two = PARAMS, tx.init(PARAMS)
  for i, x in enumerate(BATCHES):
    refresh = i % (n * k) == n - 1
    with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
      one, two = by_count(*one, x), by_bool(*two, x, refresh=refresh)
  chex.assert_trees_all_close(one, two, rtol=1e-5)
  assert optax.tree.get(two[1], 'refresh_count') == 3


def test_multi_steps_add_no_conditional():
  tx = sophia_optax.MultiSteps(sophia_optax.scale_by_sophia(), 2)
  for refresh in (True, False):
    update = functools.partial(
      tx.update, **extra_args(BATCHES[0]), refresh=refresh
    )
    with jax.numpy_dtype_promotion('standard'):
      jaxpr = jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS), PARAMS)
    # The conditional of optax.MultiSteps, whether to skip the step.
    assert str(jaxpr).count(' cond[') == 1


@pytest.mark.parametrize('as_decision', [bool, jnp.array])
def test_the_caller_overrides_the_count_and_the_interval(as_decision):
  b2 = 0.9
  tx = sophia_optax.scale_by_sophia(
    b2=b2,
    update_interval=3,
    hessian_diagonal_fn=sophia_optax.squared_gradient_estimator_diag_hessian(1),
  )
  x = jnp.zeros(2)
  state, nu, decisions = tx.init(x), np.zeros(2), [False, True, True, False]
  for i, refresh in enumerate(decisions):
    g = jnp.array([1.0, -2.0]) * (i + 1)
    _, state = tx.update(g, state, x, refresh=as_decision(refresh))
    nu = b2 * nu + (1 - b2) * np.square(g) if refresh else nu
    np.testing.assert_allclose(state.nu, nu, rtol=1e-6)
  assert state.count == 4
  assert state.refresh_count == 2


def test_a_step_without_a_refresh_needs_nothing_for_the_estimator():
  tx = sophia_optax.sophia(0.1)
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh=False)
  chex.assert_tree_all_finite(updates)
  with pytest.raises(ValueError, match='needs obj_fn'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh=True)
