"""Communication between devices in a compiled step."""

import re

from devices import ESTIMATORS
from devices import INPUTS
from devices import loss_fn
from devices import mesh
from devices import PARAMS
from devices import predict
import jax
from jax.sharding import PartitionSpec as P
import pytest

import sophia_optax


def collectives(text):
  """Returns the collectives of a compiled program by their computation."""
  found = {}
  for computation in re.split(r'\n(?=%|ENTRY)', text):
    name = computation.split(' ', 1)[0]
    ops = re.findall(
      r'= .* (all-reduce|all-gather|reduce-scatter|all-to-all'
      r'|collective-permute)(?:-start)?\(',
      computation,
    )
    if ops:
      found[name] = ops
  return found


def compiled(update, *args, in_specs):
  mapped = jax.jit(
    jax.shard_map(update, mesh=mesh(), in_specs=in_specs, out_specs=P())
  )
  return mapped.lower(*args).compile().as_text()


@pytest.mark.parametrize('name', ESTIMATORS)
def test_one_all_reduce_in_a_refresh_and_none_in_other_steps(name):
  estimator = sophia_optax.microbatched(
    ESTIMATORS[name](axis_name='data', num_samples=3), 2
  )
  tx = sophia_optax.sophia(0.01, hessian_diagonal_fn=estimator)
  state = tx.init(PARAMS)

  # The gradients are arguments, so the program has no collectives for them.
  def update(params, state, shard):
    return tx.update(
      params, state, params, obj_fn=loss_fn, predict_fn=predict, batch=shard[0]
    )

  text = compiled(update, PARAMS, state, INPUTS, in_specs=(P(), P(), P('data')))
  found = collectives(text)
  assert list(found.values()) == [['all-reduce']]
  # It is in a branch of the conditional, so not in the loop over the parts.
  (branches,) = re.findall(r'conditional\(.*branch_computations={(.*?)}', text)
  assert set(found) < set(branches.split(', '))
