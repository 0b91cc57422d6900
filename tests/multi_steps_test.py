"""How often gradient accumulation estimates the curvature, on which data."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

PARAMS = jnp.array([0.5, -0.3])
BATCHES = jax.random.normal(jax.random.PRNGKey(0), (12, 4, 2))


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
    yield


def loss_fn(x, batch):  # Its Hessian is diagonal, so every estimate is exact.
  return jnp.mean(jnp.exp(batch * x))


def counted(calls):
  """Hutchinson's estimator, which counts how often it really runs."""
  inner = sophia_optax.hutchinson_estimator_diag_hessian()

  def update(updates, state, params=None, **extra_args):
    jax.debug.callback(lambda: calls.append(1))
    return inner.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def train(multi_steps, every_k, tx, **decision):
  tx = multi_steps(tx, every_k)

  @jax.jit
  def step(x, state, batch):
    grads = jax.grad(loss_fn)(x, batch)
    obj_fn = lambda x: loss_fn(x, batch)
    updates, state = tx.update(grads, state, x, obj_fn=obj_fn, **decision)
    return optax.apply_updates(x, updates), state

  x, state = PARAMS, tx.init(PARAMS)
  history = []
  for batch in BATCHES:
    x, state = step(x, state, batch)
    history.append(x)
  jax.effects_barrier()
  return jnp.stack(history), state


# 12 micro-steps are 4 steps of 3; of these, 0 and 2 refresh when k = 2.
@pytest.mark.parametrize(
  ('multi_steps', 'every_k', 'expected'),
  [
    (sophia_optax.MultiSteps, 3, 2),
    (sophia_optax.MultiSteps, lambda step: 3, 2),
    (sophia_optax.MultiSteps, 1, 6),
    (optax.MultiSteps, 3, 6),
  ],
)
def test_number_of_estimates(multi_steps, every_k, expected):
  calls = []
  tx = sophia_optax.sophia(
    0.1, update_interval=2, hessian_diagonal_fn=counted(calls)
  )
  train(multi_steps, every_k, tx)
  assert len(calls) == expected


@pytest.mark.parametrize(
  ('decision', 'expected'),
  [
    ({'refresh': None}, 2),  # Regression: every micro-step refreshed.
    ({'may_refresh': True}, 2),
    ({'may_refresh': jnp.array(False)}, 0),
  ],
)
def test_number_of_estimates_with_arguments(decision, expected):
  calls = []
  tx = sophia_optax.sophia(
    0.1, update_interval=2, hessian_diagonal_fn=counted(calls)
  )
  train(sophia_optax.MultiSteps, 3, tx, **decision)
  assert len(calls) == expected


def test_all_else_is_as_in_optax():
  tx = sophia_optax.sophia(0.1, update_interval=2)
  chex.assert_trees_all_equal(
    train(sophia_optax.MultiSteps, 3, tx), train(optax.MultiSteps, 3, tx)
  )


def test_as_a_transformation_in_a_chain_and_with_other_optimizers():
  for tx in (sophia_optax.sophia(0.1), optax.sgd(0.1)):
    multi_steps = sophia_optax.MultiSteps(
      optax.chain(optax.clip(1.0), tx), 2, use_grad_mean=False
    )
    chained = optax.chain(
      multi_steps.gradient_transformation(), optax.identity()
    )
    state = chained.init(PARAMS)
    moved = []
    for batch in BATCHES[:4]:
      updates, state = chained.update(
        jax.grad(loss_fn)(PARAMS, batch),
        state,
        PARAMS,
        obj_fn=lambda x, batch=batch: loss_fn(x, batch),
      )
      moved.append(bool(jnp.any(updates != 0)))
    assert moved == [False, True, False, True]


def test_curvature_of_all_micro_batches():
  tx = sophia_optax.MultiSteps(
    sophia_optax.scale_by_sophia(
      b2=0.0,
      hessian_diagonal_fn=sophia_optax.microbatched(
        sophia_optax.hutchinson_estimator_diag_hessian(), 3
      ),
    ),
    3,
  )
  state = tx.init(PARAMS)
  for batch in BATCHES[:3]:
    _, state = tx.update(
      jax.grad(loss_fn)(PARAMS, batch),
      state,
      PARAMS,
      obj_fn=loss_fn,
      batch=BATCHES[:3].reshape(12, 2),
    )
  exact = jnp.diag(jax.jit(jax.hessian(loss_fn))(PARAMS, BATCHES[:3]))
  chex.assert_trees_all_close(optax.tree.get(state, 'nu'), exact, rtol=1e-5)


def test_may_refresh():
  tx = sophia_optax.scale_by_sophia()
  extra = {'obj_fn': lambda x: loss_fn(x, BATCHES[0])}
  _, state = tx.update(
    PARAMS, tx.init(PARAMS), PARAMS, may_refresh=False, **extra
  )
  assert not jnp.any(state.nu)
  assert state.count == 1
  _, state = tx.update(
    PARAMS, tx.init(PARAMS), PARAMS, may_refresh=jnp.array(True), **extra
  )
  assert jnp.all(state.nu != 0)


def test_schedule_of_micro_steps_counts_the_steps_taken():
  # The first step has one micro-step, the others have two.
  calls = []
  tx = sophia_optax.sophia(
    0.1, update_interval=1, hessian_diagonal_fn=counted(calls)
  )
  _, state = train(
    sophia_optax.MultiSteps, lambda step: jnp.where(step == 0, 1, 2), tx
  )
  assert state.gradient_step == 6  # 1 + 5 · 2 micro-steps of the 12
  assert len(calls) == 6
  assert optax.tree.get(state, 'refresh_count') == 6


@pytest.mark.parametrize(
  ('tx', 'value_fn'),
  [
    (optax.sgd(0.1), lambda x, obj_fn=None: jnp.sum(x**2)),
    (
      sophia_optax.sophia(0.1),
      lambda x, obj_fn=None, may_refresh=None: jnp.sum(x**2),
    ),
  ],
)
def test_line_search(tx, value_fn):
  # A line search refuses arguments that value_fn does not have.
  tx = optax.chain(
    tx, optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
  )
  tx = sophia_optax.MultiSteps(tx, 2)
  x = jnp.ones(3)
  state = tx.init(x)
  for _ in range(2):
    grads = jax.grad(value_fn)(x)
    updates, state = tx.update(
      grads,
      state,
      x,
      obj_fn=value_fn,
      value=value_fn(x),
      grad=grads,
      value_fn=value_fn,
    )
  assert value_fn(x + updates) < value_fn(x)
