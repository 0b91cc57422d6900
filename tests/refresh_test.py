"""Whether a step refreshes h: decided by the count, an array or a bool."""

import functools

import chex
import devices
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax

K = 10
RNG = np.random.default_rng(0)
PARAMS = {
  'a': jnp.float32(RNG.normal(0, 1 / 2, (6, 8))),
  'b': jnp.float32(RNG.normal(0, 1 / 3, (8, 4))),
}
BATCHES = jnp.float32(RNG.normal(size=(25, 16, 6)))
ESTIMATORS = {
  'H': sophia_optax.hutchinson_estimator_diag_hessian,
  'G': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}
estimators = pytest.mark.parametrize(
  'estimator',
  [
    # Second derivatives take longer to compile.
    pytest.param(make, id=name, marks=[pytest.mark.slow] * (name == 'H'))
    for name, make in ESTIMATORS.items()
  ],
)


def predict(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


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
    grads = jax.grad(loss_fn)(params, x)
    updates, state = tx.update(
      grads, state, params, **extra_args(x), **decision
    )
    return optax.apply_updates(params, updates), state

  return step


def is_due(i, k=K):
  return i % k == 0


def check_same(
  carry, by_count, by_bool, batches=BATCHES, is_due=is_due, atol=0.0
):
  """Compares two programs with one program, by default bit by bit."""
  one = two = carry
  for i, x in enumerate(batches):
    one = by_count(*one, x)
    two = by_bool(*two, x, refresh=is_due(i))
    chex.assert_trees_all_close(one, two, rtol=0.0, atol=atol)
  return one


@estimators
@pytest.mark.parametrize(
  'options',
  [
    {},
    pytest.param(
      {'target_win_rate': 0.3, 'diagnostics': True}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'refresh_before_update': True, 'target_win_rate': 0.3},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'nu_bias_correction': True, 'nesterov': True}, marks=pytest.mark.slow
    ),
  ],
  ids=str,
)
def test_two_programs_have_the_bits_of_one(estimator, options):
  tx = sophia_optax.sophia(0.02, hessian_diagonal_fn=estimator(), **options)
  step = make_step(tx)
  _, state = check_same(
    (PARAMS, tx.init(PARAMS)),
    jax.jit(step),
    jax.jit(step, static_argnames='refresh'),
  )
  assert optax.tree.get(state, 'refresh_count') == 3


@estimators
def test_two_programs_with_moments_in_bfloat16(estimator):
  # XLA may omit a rounding to bfloat16 within a program.
  tx = sophia_optax.sophia(
    0.02,
    mu_dtype=jnp.bfloat16,
    nu_dtype=jnp.bfloat16,
    hessian_diagonal_fn=estimator(),
  )
  step = make_step(tx)
  by_count, by_bool = jax.jit(step), jax.jit(step, static_argnames='refresh')
  one = two = PARAMS, tx.init(PARAMS)
  for i, x in enumerate(BATCHES):
    one, two = by_count(*one, x), by_bool(*two, x, refresh=is_due(i))
  chex.assert_trees_all_close(one[0], two[0], atol=1e-2)
  assert optax.tree.get(two[1], 'refresh_count') == 3


@pytest.mark.slow
@estimators
def test_two_programs_under_shard_map(estimator):
  tx = sophia_optax.sophia(
    0.02, hessian_diagonal_fn=estimator(axis_name='data')
  )

  def step(params, state, x, **decision):
    own = jax.lax.pcast(params, 'data', to='varying')
    grads = jax.lax.pmean(jax.grad(loss_fn)(own, x), 'data')
    updates, state = tx.update(
      grads, state, params, **extra_args(x), **decision
    )
    return optax.apply_updates(params, updates), state

  def mapped(*args, **decision):
    return jax.shard_map(
      functools.partial(step, **decision),
      mesh=devices.mesh(),
      in_specs=(P(), P(), P('data')),
      out_specs=P(),
    )(*args)

  check_same(
    (PARAMS, tx.init(PARAMS)),
    jax.jit(mapped),
    jax.jit(mapped, static_argnames='refresh'),
    BATCHES[:12],
    # XLA fuses the mean over replicas differently, which rounds differently.
    atol=1e-7,
  )


@estimators
def test_scan_over_ordinary_steps_and_one_refresh(estimator):
  tx = sophia_optax.sophia(0.02, hessian_diagonal_fn=estimator())
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


@estimators
def test_flax_train_state(estimator):
  tx = sophia_optax.sophia(0.02, hessian_diagonal_fn=estimator())

  def step(state, x, **decision):
    grads = jax.grad(loss_fn)(state.params, x)
    return state.apply_gradients(grads=grads, **extra_args(x), **decision)

  state = sophia_optax.SophiaTrainState.create(
    apply_fn=predict, params=PARAMS, tx=tx
  )
  check_same(
    (state,),
    lambda *args: (jax.jit(step)(*args),),
    lambda *args, **decision: (
      jax.jit(step, static_argnames='refresh')(*args, **decision),
    ),
  )


@pytest.mark.slow  # Without optimizations, a last bit differs.
@estimators
def test_multi_steps(estimator):
  n, k = 3, 2
  tx = sophia_optax.MultiSteps(
    sophia_optax.sophia(
      0.02, update_interval=k, hessian_diagonal_fn=estimator()
    ),
    n,
  )
  step = make_step(tx)
  with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
    _, state = check_same(
      (PARAMS, tx.init(PARAMS)),
      jax.jit(step),
      jax.jit(step, static_argnames='refresh'),
      is_due=lambda i: i % (n * k) == n - 1,
      atol=1e-7,  # JAX 0.12 rounds the two programs differently.
    )
    assert optax.tree.get(state, 'refresh_count') == 4
    # `refresh` may be True on all micro-steps; only the last estimate is kept.
    check_same(
      (PARAMS, tx.init(PARAMS)),
      jax.jit(step),
      jax.jit(step, static_argnames='refresh'),
      is_due=lambda i: i // n % k == 0,
      atol=1e-7,
    )


@pytest.mark.slow
@estimators
def test_hyperparameters_that_are_arrays(estimator):
  tx = optax.inject_hyperparams(sophia_optax.sophia)(
    0.02, update_interval=4, hessian_diagonal_fn=estimator()
  )
  step = make_step(tx)
  with jax.numpy_dtype_promotion('standard'):
    check_same(
      (PARAMS, tx.init(PARAMS)),
      jax.jit(step),
      jax.jit(step, static_argnames='refresh'),
      BATCHES[:9],
      functools.partial(is_due, k=4),
    )


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

  def estimate(updates, state, params, **extra_args):
    calls.append(1)
    return jax.tree.map(jnp.square, updates), state

  tx = sophia_optax.scale_by_sophia(
    hessian_diagonal_fn=optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), estimate
    )
  )
  jaxpr = jax.make_jaxpr(lambda *args: tx.update(*args, **decision))(
    PARAMS, tx.init(PARAMS), PARAMS
  )
  names = [equation.primitive.name for equation in jaxpr.eqns]
  assert names.count('cond') == conditionals
  assert len(calls) == estimates
  # Without a conditional, the estimate waits for the gradient.
  waits = estimates and not conditionals
  assert names.count('optimization_barrier') == waits


def test_multi_steps_add_no_conditional():
  tx = sophia_optax.scale_by_sophia()
  tx = sophia_optax.MultiSteps(tx, 2)
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


@pytest.mark.parametrize('name', ['refresh', 'may_refresh'])
@pytest.mark.parametrize(
  'value', [1, 'yes', jnp.array(1), lambda step: True, np.array([True, False])]
)
def test_a_decision_that_is_not_a_boolean_is_an_error(name, value):
  tx = sophia_optax.sophia(0.1)
  with pytest.raises(TypeError, match=f'^{name} must be a bool or an array'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, **{name: value})
