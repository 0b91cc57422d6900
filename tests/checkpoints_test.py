"""Training continues from optimizer states that were saved and restored."""

import functools

import chex
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

P = jax.sharding.PartitionSpec
PARAMS = {'w': jnp.linspace(-1.0, 1.0, 16).reshape(8, 2), 'b': jnp.ones(2)}


def loss_fn(params):
  x = jnp.cosh(params['w'])
  return jnp.sum(x @ x.T) * 1e-2 + jnp.sum((params['b'] - 2) ** 4)


@functools.cache
def make_tx(make_key):
  sophia = sophia_optax.scale_by_sophia(
    update_interval=2,
    target_win_rate=0.3,
    adam_b2=0.9,
    diagnostics=True,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
      make_key(3)
    ),
  )
  return optax.chain(
    sophia_optax.in_eigenbasis(sophia),
    optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 100)),
  )


@functools.cache
def make_step(tx):
  @jax.jit
  def step(params, state):
    updates, state = tx.update(
      jax.grad(loss_fn)(params), state, params, obj_fn=loss_fn
    )
    return optax.apply_updates(params, updates), state

  return step


def train(tx, params, state, num_steps=3):
  step = make_step(tx)
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    for _ in range(num_steps):
      params, state = step(params, state)
  return params, state


def assert_same_bits(x, y):
  raw = lambda x: (
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(x, y)
  chex.assert_trees_all_equal(*jax.tree.map(raw, (x, y)))


def through_orbax(tmp_path, tree):
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'checkpoint', tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(tmp_path / 'checkpoint', like)


def through_bytes(tmp_path, tree):
  del tmp_path
  like = optax.tree.zeros_like(tree)
  return serialization.from_bytes(like, serialization.to_bytes(tree))


@pytest.mark.parametrize(
  ('trip', 'make_key'),
  [(through_orbax, jax.random.key), (through_bytes, jax.random.PRNGKey)],
)
def test_training_continues_with_the_same_bits(tmp_path, trip, make_key):
  tx = make_tx(make_key)
  half = train(tx, PARAMS, tx.init(PARAMS))
  restored = trip(tmp_path, half)
  assert_same_bits(restored, half)
  assert_same_bits(train(tx, *restored), train(tx, *half))


@pytest.mark.slow
def test_sharded_state(tmp_path):
  mesh = jax.make_mesh(
    (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  shardings = {
    'w': jax.sharding.NamedSharding(mesh, P('fsdp')),
    'b': jax.sharding.NamedSharding(mesh, P()),
  }
  tx = make_tx(jax.random.PRNGKey)
  with jax.set_mesh(mesh):
    params = jax.device_put(PARAMS, shardings)
    half = train(tx, params, tx.init(params))
    restored = through_orbax(tmp_path, half)
    assert_same_bits(restored, half)
    for a, b in zip(*map(jax.tree.leaves, (restored, half)), strict=True):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert len(restored[1][0].inner_state.nu['w'].sharding.device_set) == 8
    assert_same_bits(train(tx, *restored), train(tx, *half))


def test_state_of_optax_contrib():
  schedule = optax.linear_schedule(0.1, 0.0, 100)
  old_tx = optax.contrib.sophia(schedule, update_interval=2)
  new_tx = sophia_optax.sophia(schedule, update_interval=2)
  params, old = train(old_tx, PARAMS, old_tx.init(PARAMS))

  # As docs/migrating.md has it.
  scale = old[0]
  state = optax.tree.set(
    new_tx.init(params),
    count=scale.count,
    mu=scale.mu,
    nu=scale.nu,
    key=scale.hessian_fn_state.key,
  )
  expected, _ = train(old_tx, params, old)
  got, _ = train(new_tx, params, state)
  chex.assert_trees_all_close(got, expected, rtol=1e-6)
  anew, _ = train(new_tx, params, new_tx.init(params))
  assert not np.allclose(anew['w'], expected['w'])
