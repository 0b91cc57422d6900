"""The Flax train state example."""

import jax
import numpy as np
import optax
import pytest

import digits
import flax_train_state

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.fixture(autouse=True)
def _promote_as_flax_does():
  with jax.numpy_dtype_promotion('standard'):  # nn.avg_pool needs it.
    yield


@pytest.mark.slow
@pytest.mark.parametrize('pmap', [False, True])
def test_learns(pmap):
  state, accuracy = flax_train_state.train(60, pmap=pmap)
  assert accuracy > 0.9  # 0.99 after the 200 steps of the script.
  assert state.step == 60
  assert 0 < optax.tree.get(state.opt_state, 'win_rate') < 1


@pytest.mark.slow
def test_replicas_stay_equal_and_statistics_move_once():
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

  for leaf in jax.tree.leaves(
    (
      after.params,
      after.batch_stats,
      after.opt_state,
      jax.random.key_data(after.dropout_key),
    )
  ):
    np.testing.assert_array_equal(leaf[0], leaf[1])
  np.testing.assert_array_equal(
    jax.random.key_data(after.dropout_key[0]),
    jax.random.key_data(before.dropout_key),
  )
  # The statistics moved once, although the curvature took a second pass.
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


def test_devices_that_do_not_divide_the_batch(monkeypatch):
  monkeypatch.setattr(jax, 'local_device_count', lambda: 3)
  with pytest.raises(ValueError, match=r'must divide .*; got 3'):
    flax_train_state.train(1, pmap=True)
