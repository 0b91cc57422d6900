"""A small model, a batch in eight parts, and maps over eight devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

import sophia_optax

INPUTS = jnp.float32(np.random.default_rng(0).normal(size=(8, 4, 3)))
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3]), 'b': jnp.array(0.2)}
ESTIMATORS = {
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian,
  'gauss_newton': functools.partial(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
    likelihood='gaussian',
  ),
}
# Deterministic: B ĝ² is (Σ ∇z)²/B.
ONES = functools.partial(
  sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
  likelihood=lambda key, outputs: jnp.ones_like(outputs),
)


def predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w'] + params['b'])


def loss_fn(params, inputs):
  return jnp.mean(predict(params, inputs) ** 2)


def mesh(*sizes):
  """Returns a mesh of eight devices, or of two rows of four."""
  sizes = sizes or (8,)
  return jax.make_mesh(
    sizes,
    ('data', 'model')[: len(sizes)],
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )


def pmapped(fn):
  """Maps fn(replicated, shard); returns the results of all devices."""
  mapped = jax.pmap(fn, axis_name='data', in_axes=(None, 0))
  return lambda replicated: mapped(replicated, INPUTS)


def shard_mapped(fn, check_vma, sizes=(8,)):
  # The output is declared replicated. With check_vma JAX checks that it is.
  grid = mesh(*sizes)
  mapped = jax.jit(
    jax.shard_map(
      lambda replicated, shard: fn(replicated, shard[0]),
      mesh=grid,
      in_specs=(P(), P(grid.axis_names)),
      out_specs=P(),
      check_vma=check_vma,
    )
  )

  def run(replicated):
    every_device = lambda x: np.stack([s.data for s in x.addressable_shards])
    return jax.tree.map(every_device, mapped(replicated, INPUTS))

  return run


MAPS = {
  'pmap': pmapped,
  'shard_map': functools.partial(shard_mapped, check_vma=True),
  'unchecked': functools.partial(shard_mapped, check_vma=False),
  'grid': functools.partial(shard_mapped, check_vma=True, sizes=(2, 4)),
  'grid_unchecked': functools.partial(
    shard_mapped, check_vma=False, sizes=(2, 4)
  ),
}


def map_grid(fn, *args, specs, out_specs, check_vma=True):
  """Runs fn(*args) on two rows of four devices."""
  mapped = jax.shard_map(
    fn,
    mesh=mesh(2, 4),
    in_specs=specs,
    out_specs=out_specs,
    check_vma=check_vma,
  )
  return jax.jit(mapped)(*args)
