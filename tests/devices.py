"""A small model, a batch in eight parts, and maps over eight devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

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


def predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w'] + params['b'])


def loss_fn(params, inputs):
  return jnp.mean(predict(params, inputs) ** 2)


def mesh():
  return jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


def pmapped(fn):
  """Maps fn(replicated, shard); returns the results of all devices."""
  mapped = jax.pmap(fn, axis_name='data', in_axes=(None, 0))
  return lambda replicated: mapped(replicated, INPUTS)


def shard_mapped(fn, check_vma):
  # The output is declared replicated. With check_vma JAX checks that it is.
  mapped = jax.jit(
    jax.shard_map(
      lambda replicated, shard: fn(replicated, shard[0]),
      mesh=mesh(),
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=check_vma,
    )
  )

  def run(replicated):
    every_device = lambda x: jnp.stack(
      [jnp.asarray(np.array(s.data)) for s in x.addressable_shards]
    )
    return jax.tree.map(every_device, mapped(replicated, INPUTS))

  return run


MAPS = {
  'pmap': pmapped,
  'shard_map': functools.partial(shard_mapped, check_vma=True),
  'shard_map_unchecked': functools.partial(shard_mapped, check_vma=False),
}

maps = pytest.mark.parametrize(
  'map_name',
  [
    'pmap',
    'shard_map',
    pytest.param('shard_map_unchecked', marks=pytest.mark.slow),
  ],
)


def map_grid(fn, *args, specs, out_specs, check_vma=True):
  """Runs fn(*args) on two rows of four devices."""
  grid = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  return jax.jit(
    jax.shard_map(
      fn, mesh=grid, in_specs=specs, out_specs=out_specs, check_vma=check_vma
    )
  )(*args)
