"""Meshes of devices, and the sharding of batches and states.

Sequences are divided over all devices. Parameters and optimizer state are
divided over the mesh axis `fsdp`, and replicated over all other axes.
"""

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def parse(spec: str) -> dict[str, int]:
  """Returns the names and sizes of the axes in a string like 'data:2,fsdp:4'.

  Args:
    spec: `name:size` of each axis, separated by commas. '' is one device.

  Raises:
    ValueError: if `spec` does not have this form.
  """
  axes = {}
  for axis in (spec or 'data:1').split(','):
    name, _, size = axis.partition(':')
    if (
      not name.isidentifier()
      or name in axes
      or not (size.isdecimal() and int(size))
    ):
      raise ValueError(
        'mesh must be name:size for each axis, separated by commas and with '
        f'different names, such as data:2,fsdp:4; got {spec!r}.'
      )
    axes[name] = int(size)
  return axes


def make_mesh(spec: str) -> jax.sharding.Mesh:
  """Returns the mesh for a string like 'data:8' or 'data:2,fsdp:4'.

  Args:
    spec: see `parse`.

  Raises:
    ValueError: if `spec` does not have this form, if there are too few devices,
      or if several processes have more devices than the mesh.
  """
  axes = parse(spec)
  size, count = math.prod(axes.values()), jax.device_count()
  if size > count:
    raise ValueError(
      f'mesh {spec!r} needs {size} devices; there are {count} '
      f'({jax.default_backend()}). Pass a smaller mesh, or simulate devices '
      'on a CPU with the environment variables JAX_PLATFORMS=cpu '
      f'JAX_NUM_CPU_DEVICES={size}.'
    )
  if size < count and jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes need a mesh of all their {count} '
      f'devices; {spec!r} has {size}. For example, pass --mesh=data:{count}.'
    )
  # Auto: XLA chooses the shardings that this module does not specify.
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=jax.devices()[:size],
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
  )


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Returns a sharding that divides the axis of sequences over all devices."""
  return NamedSharding(mesh, P(*[None] * axis, mesh.axis_names))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding that replicates an array on all devices."""
  return NamedSharding(mesh, P())


def state_sharding(mesh: jax.sharding.Mesh, state):
  """Returns the sharding of each array in a tree of parameters or a state.

  Args:
    mesh: the mesh.
    state: arrays or `jax.ShapeDtypeStruct`s. Moments are sharded like their
      parameters, because they have the same shapes.

  Returns:
    A tree like `state`. If an array has at least two axes and `fsdp` divides
    the length of the last one, that axis is divided. The axis of layers is
    never divided, because a scan takes one layer at a time.
  """
  return jax.tree.map(lambda x: NamedSharding(mesh, _kept(mesh, x)), state)


def _kept(mesh, x):
  size = mesh.shape.get('fsdp', 1)
  if size == 1 or x.ndim < 2 or x.shape[-1] % size:
    return P()
  return P(*[None] * (x.ndim - 1), 'fsdp')


def divide(x: jax.Array) -> jax.Array:
  """Divides the leading axis over all devices of the mesh in `jax.set_mesh`.

  Without this, XLA may divide activations by channels, like the parameters,
  and then communicate activations instead of parameters.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def whole(x: jax.Array) -> jax.Array:
  """Gathers a parameter on every device of the mesh in `jax.set_mesh`.

  The constraints also apply to the tangent of the parameter, the probe of the
  curvature. It is drawn in shards and then gathered.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.axis_names:
    return x
  x = jax.lax.with_sharding_constraint(x, _kept(mesh, x))
  return jax.lax.with_sharding_constraint(x, P())


def put(x, sharding: NamedSharding) -> jax.Array:
  """Shards an array over the devices. Each process must have all of it."""
  return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
