"""The conditional under `vmap`, and outside of `jit`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

PARAMS = jax.random.normal(jax.random.PRNGKey(1), (4, 3))


def loss_fn(x):
  return jnp.sum(jnp.cosh(x))


def make_optimizer(calls, key=0, **kwargs):
  """Sophia whose estimator appends to `calls` when it runs."""
  inner = sophia_optax.hutchinson_estimator_diag_hessian(key)

  def update(*args, **extra_args):
    jax.debug.callback(lambda: calls.append(None))
    return inner.update(*args, **extra_args)

  return sophia_optax.scale_by_sophia(
    gamma=0.3,
    b2=0.5,
    update_interval=3,
    hessian_diagonal_fn=optax.GradientTransformationExtraArgs(
      inner.init, update
    ),
    **kwargs,
  )


def make_step(tx):
  def step(x, state):
    updates, state = tx.update(jax.grad(loss_fn)(x), state, x, obj_fn=loss_fn)
    return x - 0.1 * updates, state

  return step


def train(step, x, state, num_steps=7):
  for _ in range(num_steps):
    x, state = step(x, state)
  return x, state


def members(tx, counts):
  """Returns batched states with these counts, and the states one by one."""
  states = [
    tx.init(x)._replace(count=jnp.int32(n))
    for x, n in zip(PARAMS, counts, strict=True)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *states), states


def without_typed_keys(state):
  key = jax.random.key_data(state.hessian_fn_state.key)
  return state._replace(hessian_fn_state=key)


@pytest.mark.parametrize(
  ('counts', 'expected', 'key'),
  [
    ([0, 0, 0, 0], 3, jax.random.PRNGKey(0)),
    # A refresh is due on steps 0, 3 and 6, and for others on 2 and 5.
    ([0, 1, 0, 1], 5, jax.random.key(0)),
  ],
)
def test_members_train_as_alone_and_compute_only_what_is_due(
  counts, expected, key
):
  calls = []
  tx = make_optimizer(
    calls, key, target_win_rate=0.4, adam_b2=0.9, diagnostics=True
  )
  together, alone = members(tx, counts)
  step = make_step(tx)
  x, state = train(jax.jit(jax.vmap(step)), PARAMS, together)
  jax.effects_barrier()
  assert len(calls) == expected
  single = jax.jit(step)
  for i in (0, 1):
    own = jax.tree.map(lambda leaf, i=i: leaf[i], (x, state))
    expected = train(single, PARAMS[i], alone[i])
    chex.assert_trees_all_close(own[0], expected[0], rtol=1e-6)
    chex.assert_trees_all_close(
      *map(without_typed_keys, (own[1], expected[1])), rtol=1e-6
    )


def test_nested_vmap_and_a_conditional_of_the_user():
  calls = []
  tx = make_optimizer(calls)
  step = make_step(tx)

  def skipping(x, state):  # The step of a member depends on its parameters.
    return jax.lax.cond(x[0] > -9, step, lambda *a: a, x, state)

  nested = jnp.stack([PARAMS, 2 * PARAMS])
  x, state = train(
    jax.jit(jax.vmap(jax.vmap(skipping))),
    nested,
    jax.vmap(jax.vmap(tx.init))(nested),
  )
  jax.effects_barrier()
  assert len(calls) == 3
  alone = train(jax.jit(step), nested[1, 2], tx.init(PARAMS[0]))
  together = x[1, 2], state.nu[1, 2]
  chex.assert_trees_all_close(together, (alone[0], alone[1].nu), rtol=1e-6)


@pytest.mark.parametrize('where', ['outside', 'inside'])
def test_gradient_through_steps(where):
  # With adam_b2 the derivative was NaN where a gradient is exactly 0.
  tx = make_optimizer([], adam_b2=0.9)
  x = PARAMS.at[:, 0].set(0.0)

  def meta_loss(x, rate, init, step):
    return jnp.sum((x - rate * step(x, init(x))[0]) ** 2)

  def single(x, rate):
    return meta_loss(x, rate, tx.init, make_step(tx))

  if where == 'outside':
    batched = jax.vmap(tx.init), jax.vmap(make_step(tx))
    gradient = jax.grad(lambda x: meta_loss(x, 0.5, *batched))
  else:
    gradient = jax.vmap(jax.grad(lambda x: single(x, 0.5)))
  got = jax.jit(gradient)(x)
  assert np.isfinite(got).all()
  delta = 1e-2 * jnp.ones(3)
  slope = (single(x[1] + delta, 0.5) - single(x[1] - delta, 0.5)) / 2
  np.testing.assert_allclose(got[1] @ delta, slope, rtol=0.02)


def test_a_loop_without_jit_compiles_nothing_after_a_cycle(capsys):
  tx = make_optimizer(
    [], verbose=True, print_win_rate_every_n_steps=2, adam_b2=0.9
  )
  step, compiled = make_step(tx), []
  x, state = train(step, PARAMS[0], tx.init(PARAMS[0]), num_steps=4)

  def listen(event, duration, **kwargs):
    del duration, kwargs
    if 'compile' in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  train(step, x, state, num_steps=3)
  jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled
  jax.effects_barrier()
  assert capsys.readouterr().out.count('win rate') == 3
