"""The language model example on a mesh of devices."""

import dataclasses
import math
import re

import chex
import jax
import optax
import pytest
import tiny_gpt

import gpt_program
import hlo
import sharding
import train_gpt

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.fixture(autouse=True)
def _optax_may_promote(monkeypatch):
  tiny_gpt.let_optax_promote(monkeypatch)


@pytest.mark.slow
def test_ordinary_step_communicates_parameters_as_adamw_does():
  counters = {}
  for optimizer in 'adamw', 'sophia_h', 'sophia_g':
    config = tiny_gpt.config(
      optimizer=optimizer,
      mesh='data:2,fsdp:4',
      unroll=1,
      num_layers=3,
      block_size=5,
      batch_size=64,
      micro_batch_size=32,
    )
    mesh = sharding.make_mesh(config.mesh)
    program = gpt_program.make_program(config, mesh)
    with jax.set_mesh(mesh):
      step = program.step.lower(program.state, program.batch).compile()
    counters[optimizer] = hlo.count_collectives(step.as_text())

  ordinary, refresh = counters['adamw']
  assert refresh == ordinary
  for optimizer in ('sophia_h', 'sophia_g'):
    assert counters[optimizer][0] == ordinary
    assert counters[optimizer][1].total() > ordinary.total()

  # No tokens or activations, and parameters of one layer at a time.
  sizes = {1}
  for path, x in jax.tree_util.tree_leaves_with_path(program.state.params):
    size = x.size // 3 if path[0].key == 'layers' else x.size
    sizes |= {size, size // 4}
  sent = {
    (dtype, math.prod(map(int, filter(None, shape.split(',')))))
    for collective in ordinary
    for operand in collective.operands
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', operand)
  }
  assert ('f32', 3 * 16 * 16 // 4) in sent
  assert sent <= {('f32', size) for size in sizes}


@pytest.mark.slow
def test_mesh_changes_the_results_by_round_off_only(data_dir):
  config = tiny_gpt.config(
    optimizer='sophia_g',
    data_dir=data_dir,
    num_steps=4,
    eval_interval=4,
    unroll=1,
    learning_rate=1e-3,
    head_chunks=2,
    **tiny_gpt.DIVISIBLE,
  )
  one = train_gpt.train(config)
  config = dataclasses.replace(config, mesh='data:2,fsdp:4')
  several = train_gpt.train(config)
  chex.assert_trees_all_close(
    several.state.opt_state, one.state.opt_state, rtol=1e-4, atol=1e-6
  )
  # The ratio of m to a small h magnifies round-off; steps are of up to 1e-3.
  chex.assert_trees_all_close(
    several.state.params, one.state.params, rtol=1e-4, atol=1e-5
  )

  begin = gpt_program.make_program(
    config, sharding.make_mesh(config.mesh)
  ).init()
  jax.tree.map(
    lambda x, y: chex.assert_equal(x.sharding, y.sharding), begin, several.state
  )
  nu = optax.tree.get(several.state.opt_state, 'nu')
  for tree in several.state.params, nu:
    kernel = tree['layers']['Dense_0']['kernel']  # (L, C, 3·C)
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 12)


def test_mesh_of_too_many_devices_is_a_clear_error():
  config = tiny_gpt.config(mesh='data:16', **tiny_gpt.DIVISIBLE)
  for fn in train_gpt.train, train_gpt.describe:
    with pytest.raises(ValueError, match=r'needs 16 devices; there are 8'):
      fn(config)


@pytest.mark.slow
def test_dry_run_counts_what_each_device_of_a_mesh_holds():
  described = train_gpt.describe(
    tiny_gpt.config(mesh='data:2,fsdp:4', unroll=1, **tiny_gpt.DIVISIBLE)
  )
  divided = 2 * (12 * 16**2 + 2 * 16) + 64 * 16 + 8 * 16
  whole = 16  # the last norm
  assert 'bytes on each of 8 devices' in described
  assert re.search(rf'parameters +{divided + 4 * whole:,}\n', described)
  assert re.search(rf'batch +{4 * 16 * 9}\n', described)
