"""Data parallel training with Sophia, under jax.pmap or jax.shard_map.

  python examples/data_parallel.py --map=shard_map

Both map the same training step. Each device has its own part of the batch and
its own probe of the curvature. Parameters and optimizer state are equal on all
devices, bit for bit. Without accelerators, the script uses eight virtual CPU
devices.
"""

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
import tqdm

import sophia_optax

AXIS = 'data'
_BATCH_SIZE = 256  # over all devices


def load():
  """Returns 1,797 handwritten digits: images (N, 64) and labels (N,)."""
  images, labels = datasets.load_digits(return_X_y=True)
  return np.float32(images) / 16, np.int32(labels)


def init_params(key):
  keys = jax.random.split(key)
  return {
    'hidden': jax.random.normal(keys[0], (64, 64)) / 8,
    'output': jax.random.normal(keys[1], (64, 10)) / 8,
  }


def loss_fn(params, batch):
  """Returns the mean loss on this device's part of the batch."""
  images, labels = batch  # (B / D, 64), (B / D,)
  logits = jnp.tanh(images @ params['hidden']) @ params['output']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_optimizer():
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(axis_name=AXIS)
  return sophia_optax.sophia(
    3e-3, b1=0.9, gamma=0.1, update_interval=5, hessian_diagonal_fn=estimator
  )


def train_step(params, state, batch):
  """Takes a step on one device, with its part of the batch."""
  # Marks the replicated parameters as varying. The gradient is then that of the
  # local loss. Otherwise shard_map would sum it over the devices.
  own = jax.lax.pcast(params, AXIS, to='varying')
  loss, grads = jax.value_and_grad(loss_fn)(own, batch)
  loss, grads = jax.lax.pmean((loss, grads), AXIS)
  updates, state = make_optimizer().update(
    grads, state, params, obj_fn=lambda p: loss_fn(p, batch)
  )
  return optax.apply_updates(params, updates), state, loss


def with_pmap():
  """Prepares pmap. All arrays have a leading axis of devices, (D, ...)."""
  num_devices = jax.device_count()

  def init(_):
    params = init_params(jax.random.key(0))
    return params, make_optimizer().init(params)

  def shard(batch):  # (B, ...) to (D, B / D, ...)
    return jax.tree.map(
      lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch
    )

  params, state = jax.pmap(init, AXIS)(np.arange(num_devices))
  step = jax.pmap(train_step, AXIS, donate_argnums=(0, 1))
  return params, state, step, shard


def with_shard_map():
  """Prepares shard_map. Arrays have the same shapes as on one device."""
  mesh = jax.make_mesh(
    (jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  everywhere = jax.sharding.PartitionSpec()
  rows = jax.sharding.PartitionSpec(AXIS)

  def shard(batch):
    return jax.device_put(batch, jax.sharding.NamedSharding(mesh, rows))

  params = init_params(jax.random.key(0))
  start = jax.device_put(
    (params, make_optimizer().init(params)),
    jax.sharding.NamedSharding(mesh, everywhere),
  )
  step = jax.jit(
    jax.shard_map(
      train_step,
      mesh=mesh,
      in_specs=(everywhere, everywhere, rows),
      out_specs=everywhere,
    ),
    donate_argnums=(0, 1),
  )
  return *start, step, shard


MAPS = {'pmap': with_pmap, 'shard_map': with_shard_map}


def train(map_name, num_steps):
  """Trains, and returns parameters, optimizer state and losses."""
  if _BATCH_SIZE % jax.device_count():
    raise ValueError(
      f'The number of devices must divide the batch of {_BATCH_SIZE} images; '
      f'got {jax.device_count()}. Change _BATCH_SIZE.'
    )
  images, labels = load()
  params, state, step, shard = MAPS[map_name]()
  rng = np.random.default_rng(0)
  losses = []
  for _ in tqdm.trange(num_steps, desc=map_name):
    rows = rng.choice(len(labels), _BATCH_SIZE, replace=False)
    params, state, loss = step(
      params, state, shard((images[rows], labels[rows]))
    )
    losses.append(float(np.mean(loss)))  # pmap returns one for each device.
  return params, state, losses


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --steps=9; got {argv[1:]}.'
    )
  jax.config.update('jax_num_cpu_devices', 8)
  _, _, losses = train(_MAP.value, _STEPS.value)
  print(
    f'{jax.device_count()} devices: loss from {losses[0]:.3f} to '
    f'{losses[-1]:.3f}'
  )


if __name__ == '__main__':
  _MAP = flags.DEFINE_enum('map', 'pmap', list(MAPS), 'Transformation to use.')
  _STEPS = flags.DEFINE_integer('steps', 300, 'Number of batches (256 images).')
  app.run(main)
