"""Meshes of devices, and how what a training holds is laid out on one.

Sequences are divided over all devices. Over the mesh axis called `fsdp` what
is kept is divided too: parameters, their moments and their curvature. Over
every other axis it is replicated.
"""

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def parse(spec: str) -> dict[str, int]:
  """Returns the axes of 'data:2,fsdp:4' and their sizes; '' is one device.

  Args:
    spec: `name:size` for each axis, with commas between.

  Raises:
    ValueError: if it is not of that form.
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
        'mesh must be name:size for each axis, with commas between and no '
        f'name twice, such as data:2,fsdp:4; got {spec!r}.'
      )
    axes[name] = int(size)
  return axes


def make_mesh(spec: str) -> jax.sharding.Mesh:
  """Returns the mesh of a description such as 'data:8' or 'data:2,fsdp:4'.

  Args:
    spec: see `parse`.

  Raises:
    ValueError: if `spec` is not of that form, or there are too few devices, or
      there are more and several processes.
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
      f'devices; {spec!r} has {size}. Pass for example --mesh=data:{count}.'
    )
  # Auto: XLA derives what the shardings here do not say.
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=jax.devices()[:size],
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
  )


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Divides an array's axis of sequences over all devices."""
  return NamedSharding(mesh, P(*[None] * axis, mesh.axis_names))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, P())


def state_sharding(mesh: jax.sharding.Mesh, state):
  """Returns the sharding of every array of a state, of parameters, or of both.

  Args:
    mesh: the mesh.
    state: arrays or `jax.ShapeDtypeStruct`s. What is shaped like a parameter,
      as its moments are, is laid out like it.

  Returns:
    A tree like `state`: of arrays with two axes or more the last one is divided
    if `fsdp` divides its length. It is never that of the layers, of which a
    scan takes one at a time.
  """
  return jax.tree.map(lambda x: NamedSharding(mesh, _kept(mesh, x)), state)


def _kept(mesh, x):
  size = mesh.shape.get('fsdp', 1)
  if size == 1 or x.ndim < 2 or x.shape[-1] % size:
    return P()
  return P(*[None] * (x.ndim - 1), 'fsdp')


def divide(x: jax.Array) -> jax.Array:
  """Divides the leading axis over all devices of the mesh in `jax.set_mesh`.

  Left alone, XLA may divide activations like the parameters that they meet,
  by channels, and send activations around instead of parameters.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def whole(x: jax.Array) -> jax.Array:
  """Gathers a parameter on every device of the mesh in `jax.set_mesh`.

  Said of the parameter, it is said of its tangent too, the curvature's probe:
  that one as well is drawn in parts and gathered then.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.axis_names:
    return x
  x = jax.lax.with_sharding_constraint(x, _kept(mesh, x))
  return jax.lax.with_sharding_constraint(x, P())


def put(x, sharding: NamedSharding) -> jax.Array:
  """Puts on each device its part of an array that every process has whole."""
  return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
