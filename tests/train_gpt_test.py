"""The language model example: model, settings, steps, runs, cost."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gpt

import gpt
import gpt_configs
import gpt_program
import train_gpt

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.fixture(autouse=True)
def _optax_may_promote(monkeypatch):
  tiny_gpt.let_optax_promote(monkeypatch)


def test_decay_is_for_matrices_only():
  init, _ = tiny_gpt.setup(tiny_gpt.config())
  mask = gpt.decay_mask(jax.eval_shape(init).params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, x in jax.tree_util.tree_leaves_with_path(mask)
    if x
  }
  assert decayed == {'tokens/embedding'} | {
    f'layers/Dense_{i}/kernel' for i in range(4)
  }


def test_model_is_causal():
  model = gpt_program.make_model(tiny_gpt.config(num_layers=1))
  params = tiny_gpt.random_params(model)
  tokens = jnp.zeros((2, 8), jnp.int32).at[1, 5].set(1)
  first, second = jax.jit(model.apply)({'params': params}, tokens)
  np.testing.assert_array_equal(first[:5], second[:5])
  assert (first[5:] != second[5:]).all(axis=1).all()


@pytest.mark.slow
def test_settings_that_save_memory_do_not_change_the_step():
  results = []
  for overrides in (
    {'micro_batch_size': 8, 'unroll': 2},
    {'micro_batch_size': 2, 'remat': True},
    {'head_chunks': 2},
  ):
    config = tiny_gpt.config(num_steps=10, **overrides)
    init, step = tiny_gpt.setup(config)
    batch = np.random.default_rng(0).integers(0, 64, (8, 9), np.int32)
    results.append(jax.jit(step)(jax.jit(init)(), batch)[0])
  for other in results[1:]:
    chex.assert_trees_all_close(other, results[0], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(('settings', 'size', 'parts'), [
    ({}, 8, 8),
    ({'curvature_fraction': 0.5}, 16, 8),
    ({'mesh': 'data:2,fsdp:4'}, 8, 1),
    ({'batch_size': 480, 'micro_batch_size': 8}, 120, 15),
    ({'batch_size': 480, 'micro_batch_size': 8, 'mesh': 'data:4'}, 120, 15),
    ({'batch_size': 30, 'micro_batch_size': 30}, 8, 8),
])  # fmt: skip
def test_a_part_of_the_curvature_fits(settings, size, parts):
  config = gpt_configs.Config(**settings)
  assert (config.curvature_batch_size, config.curvature_parts) == (size, parts)


@pytest.mark.parametrize(('overrides', 'message'), [
    ({'batch_size': 6}, r'multiple of micro_batch_size; got 6 and 4'),
    ({'curvature_fraction': 0}, r'above 0 and at most 1; got 0'),
    ({'head_chunks': 3}, r'head_chunks must divide block_size = 8; got 3'),
    ({'num_heads': 3}, r'multiple of num_heads; got 16 and 3'),
    ({'num_steps': 2}, r'below num_steps = 2; got 2'),
    ({'mesh': 'data'}, r'name:size for each axis.*; got .data.\.'),
    ({'mesh': 'data:0'}, r'name:size for each axis.*; got .data:0.'),
    ({'mesh': 'data:2,data:2'}, r'different names.*; got .data:2,data:2.'),
    ({'mesh': 'data:8'}, r'micro_batch_size must be .* the 8 devices.* got 4'),
    ({'mesh': 'data:4'}, r'batch_size \* curvature_fraction .* got 2'),
    (tiny_gpt.DIVISIBLE | {'mesh': 'fsdp:8', 'width': 12}, r'; got 12 and'),
    ({'eval_interval': 0}, r'eval_interval must be at least 1; got 0'),
    ({'optimizer': 'sgd'}, r'lion, nadamw, sophia_h, sophia_g; got .sgd.'),
    ({'optimizer': 'adamw', 'eigenbasis': True}, r'such as nadamw; got .adamw'),
])  # fmt: skip
def test_bad_settings_are_a_clear_error(overrides, message):
  with pytest.raises(ValueError, match=message):
    tiny_gpt.config(**overrides)


def test_nadamw_needs_no_curvature_batch():
  config = tiny_gpt.config(
    optimizer='nadamw', mesh='data:8', batch_size=8, micro_batch_size=8
  )
  gpt_program.make_optimizer(config)


@pytest.mark.slow
def test_dry_run_counts_as_the_textbook_does():
  config = tiny_gpt.config(width=32)
  described = train_gpt.describe(config)
  # 12 C² + 2 C for each layer, embeddings of tokens and positions, last norm.
  parameters = 2 * (12 * 32**2 + 2 * 32) + 64 * 32 + 8 * 32 + 32
  assert f'parameter count: {parameters:,}' in described
  assert 'layers/Dense_0/kernel                float32   (2, 32, 96)' in (
    described
  )
  # Forward and twice that backward: layers, attention, tied output matrix.
  matrices = 2 * 12 * 32**2 + 64 * 32
  flops = 3 * 2 * 64 * (matrices + 2 * 2 * 8 * 32)
  assert f'FLOPs a step (matrix products): {flops:.4e}' in described
  assert 'with a curvature refresh' in described
  assert 'temporaries' in described
  assert 'bytes on each of 1 devices' in described
  assert re.search(rf'parameters +{4 * parameters:,}\n', described)


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, data_dir):
  config = tiny_gpt.config(
    'gpt2_124m',
    data_dir=data_dir,
    num_steps=60,
    eval_interval=20,
    checkpoint_interval=1,
    out_dir=str(tmp_path / 'killed'),
  )
  command = [sys.executable, train_gpt.__file__] + [
    f'--{name}={value}' for name, value in dataclasses.asdict(config).items()
  ]
  process = subprocess.Popen(
    command,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=os.environ
    | {
      'PYTHONPATH': os.pathsep.join(sys.path),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '8',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
    },
  )
  try:
    deadline = time.monotonic() + 200
    while not (tmp_path / 'killed' / '4').exists():
      assert process.poll() is None, 'The run ended before it was killed.'
      assert time.monotonic() < deadline
      time.sleep(0.01)
  finally:
    process.kill()  # SIGKILL
  assert process.wait() == -signal.SIGKILL

  resumed = train_gpt.train(config)
  undisturbed = train_gpt.train(dataclasses.replace(config, out_dir=''))
  # Parameters, moments, curvature, counts, the key of the probes.
  chex.assert_trees_all_equal(resumed.state, undisturbed.state)
  assert [entry['val_loss'] for entry in resumed.history] == [
    entry['val_loss'] for entry in undisturbed.history
  ]
  assert resumed.finished
  assert [entry['step'] for entry in resumed.history] == [20, 40, 60]
  assert np.isfinite(resumed.history[-1]['val_loss'])
  assert 0 < resumed.history[-1]['win_rate'] <= 1
