"""SophiaTrainState, Flax's TrainState with extra arguments, and its example."""

import functools
import os
import subprocess
import sys
from typing import Any

import chex
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import digits
import flax_train_state
import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

# Flax's 8-bit layers keep scales here. The gradient is their new value.
OVERWRITTEN = '_overwrite_with_gradient'


class TrainState(sophia_optax.SophiaTrainState):
  batch_stats: Any
  dropout_key: jax.Array


def loss_fn(params):
  return jnp.mean(jnp.cosh(params['w'])) + jnp.sum(params['b'] ** 4)


def init_params():  # New for each test, because some donate them.
  return {'w': jnp.array([0.5, -1.0, 2.0]), 'b': jnp.array([1.0, -2.0])}


def create(tx, params=None):
  return TrainState.create(
    apply_fn=loss_fn,
    params=init_params() if params is None else params,
    tx=tx,
    batch_stats={'mean': jnp.zeros(2)},
    dropout_key=jax.random.key(0),
  )


def recorder():
  """An optimizer whose state is the names of the extra arguments it got."""

  def update_fn(updates, state, params=None, **extra_args):
    del state, params
    return updates, tuple(sorted(extra_args))

  return optax.GradientTransformationExtraArgs(lambda params: (), update_fn)


def test_is_the_same_as_an_explicit_loop():
  tx = sophia_optax.sophia(0.1, update_interval=2)
  params = init_params()
  opt_state = tx.init(params)

  @jax.jit
  def expected_step(params, opt_state):
    updates, opt_state = tx.update(
      jax.grad(loss_fn)(params), opt_state, params, obj_fn=loss_fn
    )
    return optax.apply_updates(params, updates), opt_state

  traces = []

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    traces.append(None)
    return state.apply_gradients(
      grads=jax.grad(loss_fn)(state.params),
      obj_fn=loss_fn,
      batch_stats={'mean': state.batch_stats['mean'] + 1.0},
    )

  state = create(tx)
  structure = jax.tree.structure(state)
  for _ in range(5):
    donated = state.params['w']
    state = step(state)
    params, opt_state = expected_step(params, opt_state)
    assert donated.is_deleted()

  assert len(traces) == 1
  assert jax.tree.structure(state) == structure
  chex.assert_trees_all_close(state.params, params, rtol=1e-6)
  chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-6)
  assert state.step == 5
  np.testing.assert_array_equal(state.batch_stats['mean'], 5.0)
  chex.assert_trees_all_equal(state.dropout_key, jax.random.key(0))


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


def test_collections_that_are_overwritten():
  scales = {'scale': jnp.array(3.0)}
  variables = {'params': init_params(), OVERWRITTEN: scales}
  new_scales = {'scale': jnp.array(4.0)}
  estimator = optax.GradientTransformationExtraArgs(
    optax.init_empty_state,
    lambda g, s, params, *, obj_fn: (jax.grad(obj_fn)(params), s),
  )
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=estimator)
  state, plain = create(tx, variables), create(tx)
  for _ in range(2):
    grads = jax.grad(loss_fn)(plain.params)
    # The curvature, too, is that of the parameters that are trained.
    state = state.apply_gradients(
      grads={'params': grads, OVERWRITTEN: new_scales}, obj_fn=loss_fn
    )
    plain = plain.apply_gradients(grads=grads, obj_fn=loss_fn)
  chex.assert_trees_all_equal(state.params['params'], plain.params)
  chex.assert_trees_all_equal(state.params[OVERWRITTEN], new_scales)


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


@pytest.mark.parametrize(
  'multi_steps', [sophia_optax.MultiSteps, optax.MultiSteps]
)
def test_extra_arguments_reach_an_optimizer_in_multi_steps(multi_steps):
  # Regression: they were dropped, because MultiSteps is not a
  # GradientTransformationExtraArgs; moments were loss_scale times too large.
  estimator = sophia_optax.squared_gradient_estimator_diag_hessian(1)
  tx = multi_steps(sophia_optax.sophia(0.1, hessian_diagonal_fn=estimator), 2)
  grads = init_params()
  with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
    state = create(tx)
    for _ in range(2):
      state = state.apply_gradients(
        grads=optax.tree.scale(1024.0, grads), loss_scale=1024.0
      )
  mu = optax.tree.get(state.opt_state, 'mu')
  chex.assert_trees_all_close(mu, optax.tree.scale(0.035, grads), rtol=1e-5)


# The example.


@pytest.fixture(name='_as_flax')
def _promote_as_flax_does():
  with jax.numpy_dtype_promotion('standard'):  # nn.avg_pool needs it.
    yield


@pytest.mark.slow
@pytest.mark.usefixtures('_as_flax')
@pytest.mark.parametrize('pmap', [False, True])
def test_example_learns(pmap):
  state, accuracy = flax_train_state.train(60, pmap=pmap)
  assert accuracy > 0.9  # 0.99 after the 200 steps of the script.
  assert state.step == 60
  assert 0 < optax.tree.get(state.opt_state, 'win_rate') < 1


@pytest.mark.slow
@pytest.mark.usefixtures('_as_flax')
def test_statistics_of_the_example_move_once_and_replicas_stay_equal():
  training, _ = digits.load()
  images, labels = (x[:16].reshape(2, 8, *x.shape[1:]) for x in training)
  before = flax_train_state.create(seed=0, steps=2, axis_name='batch')
  step = jax.pmap(
    lambda state, batch: flax_train_state.train_step(state, batch, 'batch'),
    axis_name='batch',
    in_axes=(None, 0),
    devices=jax.devices()[:2],
  )
  after, _ = step(before, digits.Split(images, labels))
  key = jax.random.key_data(after.dropout_key)
  for leaf in jax.tree.leaves(
    (after.params, after.batch_stats, after.opt_state, key)
  ):
    np.testing.assert_array_equal(leaf[0], leaf[1])
  np.testing.assert_array_equal(key[0], jax.random.key_data(before.dropout_key))
  # Although the curvature took a second pass.
  channels = jax.lax.conv_general_dilated(
    training.images[:16],
    before.params['Conv_0']['kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  np.testing.assert_allclose(
    after.batch_stats['BatchNorm_0']['mean'][0],
    0.1 * channels.mean((0, 1, 2)),
    rtol=1e-4,
    atol=1e-6,
  )
