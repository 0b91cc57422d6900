"""Trains a Flax network with batch statistics and dropout, with Sophia-H.

  python examples/flax_train_state.py
  JAX_NUM_CPU_DEVICES=8 python examples/flax_train_state.py --pmap

Batch normalization has statistics that change in every step, and dropout needs
random numbers. The loss whose curvature Sophia-H estimates depends on both. A
subclass of `sophia_optax.SophiaTrainState` holds them. Training runs on one
device or, with `--pmap`, on all devices.
"""

import functools
from typing import Any

from absl import app
from absl import flags
from flax import jax_utils
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import digits
import sophia_optax

_BATCH_SIZE = 128  # Sum over all devices.
_LEARNING_RATE = 3e-3


class TrainState(sophia_optax.SophiaTrainState):
  batch_stats: Any  # Means and variances for evaluation.
  dropout_key: jax.Array  # Constant. Each step folds its number into a copy.


class Network(nn.Module):
  """Two convolutions with batch normalization, a hidden layer and dropout."""

  @nn.compact
  def __call__(self, x, train):  # (B, 8, 8, 1)
    # BatchNorm gets no axis_name. With it, the loss of a replica would depend
    # on the parameters of all, but Sophia needs a loss of its replica alone.
    normalize = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9
    )
    for features in (16, 32):
      x = nn.Conv(features, (3, 3), use_bias=False)(x)
      x = nn.relu(normalize()(x))
      x = nn.avg_pool(x, (2, 2), strides=(2, 2))
    x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))  # (B, 64)
    return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))  # (B, 10)


def create(seed: int, steps: int, axis_name: str | None = None) -> TrainState:
  """Returns the initial state."""
  params_key, dropout_key = jax.random.split(jax.random.key(seed))
  network = Network()
  variables = network.init(params_key, jnp.zeros((1, 8, 8, 1)), train=False)
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(
    has_aux=True,  # The loss below also returns statistics.
    axis_name=axis_name,
  )
  optimizer = sophia_optax.sophia(
    optax.cosine_decay_schedule(_LEARNING_RATE, steps),
    b1=0.9,
    b2=0.9,
    update_interval=5,
    hessian_diagonal_fn=estimator,
  )
  return TrainState.create(
    apply_fn=network.apply,
    params=variables['params'],
    tx=optimizer,
    batch_stats=variables['batch_stats'],
    dropout_key=dropout_key,
  )


def train_step(
  state: TrainState, batch: digits.Split, axis_name: str | None = None
) -> tuple[TrainState, jax.Array]:
  """Returns the next state and the loss."""
  key = jax.random.fold_in(state.dropout_key, state.step)
  if axis_name is not None:  # Each device draws different masks.
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

  def loss_fn(params):
    logits, updated = state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats},
      batch.images,
      train=True,
      rngs={'dropout': key},
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch.labels
    )
    return losses.mean(), updated['batch_stats']

  (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  if axis_name is not None:  # The new state must be equal on all devices.
    loss, batch_stats, grads = jax.lax.pmean(
      (loss, batch_stats, grads), axis_name
    )

  # Gradient and curvature use the same function, with the same images, masks
  # and old statistics. obj_fn does not average over devices, because the
  # optimizer averages the estimates. It ignores the statistics.
  state = state.apply_gradients(
    grads=grads, batch_stats=batch_stats, obj_fn=loss_fn
  )
  return state, loss


@jax.jit
def count_right(state: TrainState, images: jax.Array, labels: jax.Array):
  logits = state.apply_fn(
    {'params': state.params, 'batch_stats': state.batch_stats},
    images,
    train=False,
  )
  return jnp.sum(jnp.argmax(logits, -1) == labels)


def train(
  steps: int, pmap: bool = False, seed: int = 0
) -> tuple[TrainState, float]:
  """Trains a network.

  Args:
    steps: number of batches.
    pmap: whether to divide batches over all local devices.
    seed: seed of parameters, dropout and batches.

  Returns:
    The state of one device, and the accuracy on held-out images.
  """
  training, held_out = digits.load()
  num_devices = jax.local_device_count() if pmap else 1
  if _BATCH_SIZE % num_devices:
    raise ValueError(
      f'The number of devices must divide the batch of {_BATCH_SIZE} images; '
      f'got {num_devices}. Set JAX_NUM_CPU_DEVICES or leave --pmap out.'
    )

  if pmap:
    # With another axis_name than pmap's, the second step would compile again.
    state = jax_utils.replicate(
      create(seed, steps, axis_name='batch'), axis_name='batch'
    )
    step = jax.pmap(
      functools.partial(train_step, axis_name='batch'),
      axis_name='batch',
      donate_argnums=0,
    )
  else:
    state = create(seed, steps)
    step = jax.jit(train_step, donate_argnums=0)

  rng = np.random.default_rng(seed)
  with tqdm.trange(steps) as progress:
    for t in progress:
      rows = rng.choice(len(training.labels), _BATCH_SIZE, replace=False)
      if pmap:
        rows = rows.reshape(num_devices, -1)  # (D, B / D)
      batch = digits.Split(training.images[rows], training.labels[rows])
      state, loss = step(state, batch)
      if (t + 1) % 20 == 0:
        progress.set_postfix(loss=f'{np.mean(loss):.3f}')

  if pmap:
    state = jax_utils.unreplicate(state)
  right = count_right(state, held_out.images, held_out.labels)
  return state, float(right) / len(held_out.labels)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --steps=9; got {argv[1:]}.'
    )
  state, accuracy = train(_STEPS.value, _PMAP.value)
  win_rate = optax.tree.get(state.opt_state, 'win_rate')
  print(
    f'Accuracy on held-out images: {100 * accuracy:.1f} %.'
    f' Coordinates not clipped: {100 * win_rate:.0f} %.'
  )


if __name__ == '__main__':
  _STEPS = flags.DEFINE_integer('steps', 200, 'Number of batches (128 images).')
  _PMAP = flags.DEFINE_bool('pmap', False, 'Train on all local devices.')
  app.run(main)
