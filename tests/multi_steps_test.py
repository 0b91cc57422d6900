"""How often gradient accumulation estimates the curvature, on which data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
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


def train(multi_steps, every_k, k=2, **decision):
  """Returns parameters, state and number of estimates of each micro-step."""
  calls = []

  def exact(updates, state, params=None, *, obj_fn, **extra_args):
    del updates, extra_args
    jax.debug.callback(lambda: calls.append(1))
    return jax.grad(lambda x: jnp.sum(jax.grad(obj_fn)(x)))(params), state

  estimator = optax.GradientTransformationExtraArgs(
    optax.init_empty_state, exact
  )
  tx = sophia_optax.sophia(
    0.1, update_interval=k, hessian_diagonal_fn=estimator
  )
  tx = multi_steps(tx, every_k)

  def step(carry, batch):
    x, state = carry
    grads = jax.grad(loss_fn)(x, batch)
    obj_fn = lambda x: loss_fn(x, batch)
    updates, state = tx.update(grads, state, x, obj_fn=obj_fn, **decision)
    x = optax.apply_updates(x, updates)
    return (x, state), (x, state)

  carry = PARAMS, tx.init(PARAMS)
  history = jax.jit(lambda *args: jax.lax.scan(step, *args)[1])(carry, BATCHES)
  jax.block_until_ready(history)
  jax.effects_barrier()
  return history, len(calls)


# 12 micro-steps are 4 steps of 3; of these, 0 and 2 refresh when k = 2.
@pytest.mark.parametrize(
  ('every_k', 'decision', 'expected'),
  [
    (lambda step: 3, {'refresh': None}, 2),
    (1, {}, 6),
    (3, {'may_refresh': jnp.array(False)}, 0),
    (3, {'refresh': True}, 12),
  ],
)
def test_number_of_estimates(every_k, decision, expected):
  _, calls = train(sophia_optax.MultiSteps, every_k, **decision)
  assert calls == expected


def test_all_but_the_number_of_estimates_is_as_in_optax():
  ours, calls = train(sophia_optax.MultiSteps, 3)
  theirs, calls_in_optax = train(optax.MultiSteps, 3)
  chex.assert_trees_all_equal(ours, theirs)
  assert (calls, calls_in_optax) == (2, 6)
  params, state = ours
  np.testing.assert_array_equal(params[:2], [PARAMS] * 2)
  # The gradient is the mean, the curvature that of the last micro-batch.
  grads = jax.vmap(jax.grad(loss_fn), (None, 0))(PARAMS, BATCHES[:3])
  mu, nu = (optax.tree.get(state, name)[2] for name in ('mu', 'nu'))
  np.testing.assert_allclose(mu, 0.035 * jnp.mean(grads, axis=0), rtol=1e-5)
  hessian = jax.jit(jax.hessian(loss_fn))(PARAMS, BATCHES[2])
  np.testing.assert_allclose(nu, 0.01 * jnp.diag(hessian), rtol=1e-5)


def test_schedule_of_micro_steps_counts_the_steps_taken():
  # The first step has one micro-step, the others have two.
  (_, state), calls = train(
    sophia_optax.MultiSteps, lambda step: jnp.where(step == 0, 1, 2), k=1
  )
  assert state.gradient_step[-1] == 6  # 1 + 5 · 2 micro-steps of the 12
  assert optax.tree.get(state, 'refresh_count')[-1] == calls == 6


@pytest.mark.parametrize(
  ('tx', 'value_fn'),
  [
    (optax.sgd(0.1), lambda x, obj_fn=None: jnp.sum(x**2)),
    (
      sophia_optax.sophia(0.1),
      lambda x, obj_fn=None, may_refresh=None: jnp.sum(x**2),
    ),
  ],
  ids=['sgd', 'sophia'],
)
def test_chain_around_and_line_search_within(tx, value_fn):
  # A line search refuses arguments that value_fn does not have.
  tx = optax.chain(
    tx, optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
  )
  tx = sophia_optax.MultiSteps(tx, 2, use_grad_mean=False)
  tx = optax.chain(tx.gradient_transformation(), optax.identity())
  x = jnp.ones(3)

  @jax.jit
  def step(state):
    value, grads = jax.value_and_grad(value_fn)(x)
    arguments = {'value': value, 'grad': grads, 'value_fn': value_fn}
    return tx.update(grads, state, x, obj_fn=value_fn, **arguments)

  updates, state = step(tx.init(x))
  assert not jnp.any(updates)
  updates, _ = step(state)
  assert value_fn(x + updates) < value_fn(x)


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
  batch = BATCHES[:3].reshape(12, 2)
  step = jax.jit(
    lambda state: tx.update(PARAMS, state, PARAMS, obj_fn=loss_fn, batch=batch)
  )
  state = tx.init(PARAMS)
  for _ in range(3):
    _, state = step(state)
  exact = jnp.diag(jax.jit(jax.hessian(loss_fn))(PARAMS, batch))
  chex.assert_trees_all_close(optax.tree.get(state, 'nu'), exact, rtol=1e-5)
