"""SophiaTrainState, Flax's TrainState with extra arguments."""

import os
import subprocess
import sys
from typing import Any

import chex
from flax import jax_utils
from flax import serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

# Flax's 8-bit layers keep scales here. The gradient is their new value.
OVERWRITTEN = '_overwrite_with_gradient'


class TrainState(sophia_optax.SophiaTrainState):
  batch_stats: Any
  dropout_key: jax.Array


def loss_fn(params, x=1.0):
  return jnp.mean(jnp.cosh(x * params['w'])) + jnp.sum(params['b'] ** 4)


def init_params():  # New for each test, because some donate them.
  return {'w': jnp.array([0.5, -1.0, 2.0]), 'b': jnp.array([1.0, -2.0])}


def make_optimizer(**kwargs):
  return sophia_optax.sophia(
    0.1,
    update_interval=2,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
      **kwargs
    ),
  )


def create(tx, params=None):
  return TrainState.create(
    apply_fn=loss_fn,
    params=init_params() if params is None else params,
    tx=tx,
    batch_stats={'mean': jnp.zeros(2)},
    dropout_key=jax.random.key(0),
  )


def train_step(state, x=1.0, axis_name=None):
  local_loss = lambda params: state.apply_fn(params, x)
  grads = jax.grad(local_loss)(state.params)
  mean = state.batch_stats['mean'] + 1.0
  if axis_name is not None:
    grads = jax.lax.pmean(grads, axis_name)
  return state.apply_gradients(
    grads=grads, obj_fn=local_loss, batch_stats={'mean': mean}
  )


def recorder():
  """An optimizer whose state is the names of the extra arguments it got."""

  def update_fn(updates, state, params=None, **extra_args):
    del state, params
    return updates, tuple(sorted(extra_args))

  return optax.GradientTransformationExtraArgs(lambda params: (), update_fn)


def test_is_the_same_as_an_explicit_loop():
  tx = make_optimizer()
  params = init_params()
  opt_state = tx.init(params)

  @jax.jit
  def expected_step(params, opt_state):
    updates, opt_state = tx.update(
      jax.grad(loss_fn)(params), opt_state, params, obj_fn=loss_fn
    )
    return optax.apply_updates(params, updates), opt_state

  step = jax.jit(train_step, donate_argnums=0)
  state = create(tx)
  for _ in range(5):
    donated = state.params['w']
    state = step(state)
    params, opt_state = expected_step(params, opt_state)
    assert donated.is_deleted()

  chex.assert_trees_all_close(state.params, params, rtol=1e-6)
  chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-6)
  assert state.step == 5
  np.testing.assert_array_equal(state.batch_stats['mean'], 5.0)
  chex.assert_trees_all_equal(state.dropout_key, jax.random.key(0))


def test_a_step_is_compiled_once():
  num_traces = 0

  @jax.jit
  def step(state):
    nonlocal num_traces
    num_traces += 1
    return train_step(state)

  state = create(make_optimizer())
  structure = jax.tree.structure(state)
  for _ in range(3):
    state = step(state)
    assert jax.tree.structure(state) == structure
  assert num_traces == 1


def test_fields_are_replaced_and_the_rest_is_forwarded():
  state = create(recorder())
  state = state.apply_gradients(
    grads=init_params(),
    dropout_key=jax.random.key(1),
    value=1.0,
    obj_fn=loss_fn,
  )
  assert state.opt_state == ('obj_fn', 'value')
  chex.assert_trees_all_equal(state.dropout_key, jax.random.key(1))

  tx = optax.sgd(0.1)
  assert state.apply_gradients(grads=init_params(), tx=tx).tx is tx
  for name in ('step', 'params', 'opt_state'):
    with pytest.raises(TypeError, match=f'multiple values.*{name}'):
      state.apply_gradients(grads=init_params(), **{name: None})


@pytest.mark.parametrize('tx', [optax.sgd(0.1, 0.9), optax.scale(-0.1)])
def test_optimizers_without_extra_arguments(tx):
  kwargs = {'apply_fn': loss_fn, 'params': init_params(), 'tx': tx}
  state = sophia_optax.SophiaTrainState.create(**kwargs)
  expected = train_state.TrainState.create(**kwargs)
  for _ in range(2):
    grads = jax.grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads, obj_fn=loss_fn, misspelt=1)
    expected = expected.apply_gradients(grads=grads)
  assert isinstance(state, train_state.TrainState)
  chex.assert_trees_all_equal(vars(state), vars(expected))


def test_error_names_the_missing_argument():
  state = create(make_optimizer())
  with pytest.raises(ValueError, match='needs obj_fn, got only objfn'):
    state.apply_gradients(grads=init_params(), objfn=loss_fn)


def test_collections_that_are_overwritten():
  scales = {'scale': jnp.array(3.0)}
  variables = {'params': init_params(), OVERWRITTEN: scales}
  new_scales = {'scale': jnp.array(4.0)}
  state = create(make_optimizer(), variables)
  plain = create(make_optimizer())

  @jax.jit
  def step(state, plain):
    grads = jax.grad(loss_fn)(plain.params)
    # The curvature, too, is that of the parameters that are trained.
    state = state.apply_gradients(
      grads={'params': grads, OVERWRITTEN: new_scales}, obj_fn=loss_fn
    )
    return state, plain.apply_gradients(grads=grads, obj_fn=loss_fn)

  for _ in range(2):
    state, plain = step(state, plain)
  chex.assert_trees_all_equal(state.params['params'], plain.params)
  chex.assert_trees_all_equal(state.params[OVERWRITTEN], new_scales)


def test_continues_from_bytes():
  class Stored(sophia_optax.SophiaTrainState):  # Flax stores raw keys only.
    dropout_key: jax.Array

  tx = make_optimizer()

  def make(seed):
    return Stored.create(
      apply_fn=loss_fn,
      params=init_params(),
      tx=tx,
      dropout_key=jax.random.PRNGKey(seed),
    )

  @jax.jit
  def step(state):
    return state.apply_gradients(
      grads=jax.grad(loss_fn)(state.params), obj_fn=loss_fn
    )

  state = step(make(seed=1))
  stored = serialization.to_bytes(state)
  restored = serialization.from_bytes(make(seed=2), stored)
  assert isinstance(restored, Stored)
  for _ in range(2):  # With a refresh, which needs the key of the probes.
    state, restored = step(state), step(restored)
  chex.assert_trees_all_equal(restored, state)


def test_replicas():
  devices = jax.devices()[:2]
  x = jnp.array([0.5, 1.5])
  state = jax_utils.replicate(
    create(make_optimizer(axis_name='data')), devices, axis_name='data'
  )
  step = jax.pmap(
    lambda state, x: train_step(state, x, axis_name='data'),
    axis_name='data',
    devices=devices,
    donate_argnums=0,
  )
  # The Hessian is diagonal, so every estimate is exact.
  mean_loss = lambda params, x: loss_fn(params, x[0]) + loss_fn(params, x[1])
  whole = create(make_optimizer()).replace(
    apply_fn=lambda params, x: mean_loss(params, x) / 2
  )
  step_of_whole = jax.jit(train_step)
  for _ in range(3):
    state = step(state, x)
    whole = step_of_whole(whole, x)
  trained = lambda s: (s.step, s.params, s.opt_state[0].nu, s.batch_stats)
  for leaf in jax.tree.leaves((trained(state), state.opt_state)):
    np.testing.assert_array_equal(leaf[0], leaf[1])
  one = jax_utils.unreplicate(state)
  chex.assert_trees_all_close(trained(one), trained(whole), rtol=1e-5)


def test_the_name_is_listed_and_others_are_not_there():
  assert 'SophiaTrainState' in dir(sophia_optax)
  assert 'sophia_g' in dir(sophia_optax)
  with pytest.raises(AttributeError, match='no attribute'):
    _ = sophia_optax.SophiaTrainStates


def test_without_flax():
  script = """
import sys
sys.modules['flax'] = None  # As if it was not installed.
import sophia_optax
from sophia_optax import *
sophia(0.1)
assert 'SophiaTrainState' not in dir(sophia_optax)
try:
  import sophia_optax.flax
except ImportError as error:
  print(error)
"""
  finished = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    check=True,
    capture_output=True,
    text=True,
  )
  assert "pip install 'sophia-optax[flax]'" in finished.stdout


@pytest.mark.parametrize('multi_steps', [sophia_optax.MultiSteps,
                                         optax.MultiSteps])  # fmt: skip
def test_extra_arguments_reach_an_optimizer_in_multi_steps(multi_steps):
  # Regression: they were dropped, because MultiSteps is not a
  # GradientTransformationExtraArgs; moments were loss_scale times too large.
  scale, params = 1024.0, {'w': jnp.array([1.0, 2.0]), 'b': jnp.ones(2)}
  tx = multi_steps(make_optimizer(), 2)
  scaled = lambda params: scale * loss_fn(params)
  with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
    state = create(tx, params)
    for _ in range(2):
      state = state.apply_gradients(
        grads=jax.grad(scaled)(params), obj_fn=scaled, loss_scale=scale
      )
  mu = optax.tree.get(state.opt_state, 'mu')
  grads = jax.grad(loss_fn)(params)
  chex.assert_trees_all_close(mu, optax.tree.scale(0.035, grads), rtol=1e-5)
