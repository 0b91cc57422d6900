"""The language model example: data, steps, meshes, interruption, the demo."""

import collections
import dataclasses
import doctest
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import demo
import dry_run
import gpt
import gpt_configs
import gpt_program
import sharding
import text
import train_gpt

pytestmark = pytest.mark.usefixtures('compile_fast')

_TINY = {
  'num_layers': 2,
  'num_heads': 2,
  'width': 16,
  'block_size': 8,
  'vocab_size': 64,
  'batch_size': 8,
  'micro_batch_size': 4,
  'curvature_batch_size': 4,
  'curvature_parts': 2,
  'eval_batches': 1,
  'warmup_steps': 2,
}
# With sequences for eight devices.
_DIVISIBLE = {
  'batch_size': 16,
  'micro_batch_size': 8,
  'curvature_batch_size': 16,
}
_SCRIPT = pathlib.Path(train_gpt.__file__)


@pytest.fixture(autouse=True)
def _optax_may_promote(monkeypatch):
  # optax's schedules and adamw raise float32 to the power of an int32 count,
  # which strict promotion forbids. The model and the step stay strict.
  make_optimizer = gpt_program.make_optimizer

  def lenient(config):
    optimizer = make_optimizer(config)

    def update(*args, **kwargs):
      with jax.numpy_dtype_promotion('standard'):
        return optimizer.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)

  monkeypatch.setattr(gpt_program, 'make_optimizer', lenient)


def _config(name='demo', optimizer='sophia_h', **overrides):
  return gpt_configs.get_config(name, optimizer, **(_TINY | overrides))


def _setup(config):
  model = gpt_program.make_model(config)
  optimizer = gpt_program.make_optimizer(config)
  return (
    gpt_program.make_init(config, model, optimizer),
    gpt_program.make_step(gpt_program.make_fns(config, model), optimizer),
  )


# Data.


def test_standard_library_is_the_same_at_every_call():
  tokens = text.standard_library()
  assert len(tokens) > 5_000_000
  assert text.fingerprint(tokens) == text.fingerprint(text.standard_library())
  train, val = text.load()
  assert 0.04 < len(val) / len(train) < 0.06


def test_bin_files_are_mapped_and_read_as_uint16(data_dir):
  train, _ = text.load(data_dir)
  assert isinstance(train, np.memmap)
  batch = text.sample(train, 0, 3, 4, 8, 64)
  assert batch.shape == (4, 9)
  assert batch.dtype == np.int32
  # Each row is a run of consecutive tokens of the file.
  windows = np.lib.stride_tricks.sliding_window_view(train, 9)
  assert all((windows == row).all(axis=1).any() for row in batch)


def test_batch_depends_on_seed_and_step_only(data_dir):
  train, _ = text.load(data_dir)
  draw = lambda seed, step: text.sample(train, seed, step, 4, 8, 64)
  np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
  assert (draw(1, 2) != draw(1, 3)).any()
  assert (draw(1, 2) != draw(2, 2)).any()


def test_last_window_can_be_drawn():
  batch = text.sample(np.arange(9), 0, 0, 4, 8, 64)
  np.testing.assert_array_equal(batch, np.tile(np.arange(9), (4, 1)))


def test_bad_data_is_a_clear_error(tmp_path, data_dir):
  with pytest.raises(FileNotFoundError, match=r'no .*train\.bin'):
    text.load(str(tmp_path / 'nowhere'))
  train, _ = text.load(data_dir)
  with pytest.raises(ValueError, match=r'below vocab_size, 8;'):
    text.sample(train, 0, 0, 4, 8, 8)
  with pytest.raises(ValueError, match=r'10001 tokens are needed.* has 5000'):
    text.validation(train, 1, 1, 10000, 64)
  (tmp_path / 'train.bin').write_bytes(b'odd')
  with pytest.raises(ValueError, match='it has 3 bytes'):
    text.load(data_dir)


# Model and step.


def test_decay_is_for_matrices_only():
  init, _ = _setup(_config())
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
  config = _config()
  init, _ = _setup(config)
  model = jax.jit(gpt_program.make_model(config).apply)
  params = jax.jit(init)().params
  tokens = jnp.zeros((1, 8), jnp.int32)
  logits = model({'params': params}, tokens)
  changed = model({'params': params}, tokens.at[0, 5].set(1))
  np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
  assert (logits[:, 5:] != changed[:, 5:]).any()


@pytest.mark.slow
def test_micro_batches_and_layer_scan_do_not_change_the_step():
  results = []
  for overrides in (
    {'micro_batch_size': 8, 'unroll': 2, 'num_steps': 10},
    {'micro_batch_size': 2, 'remat': True, 'num_steps': 10},
  ):
    config = _config(**overrides)
    init, step = _setup(config)
    batch = np.random.default_rng(0).integers(0, 64, (8, 9), np.int32)
    batch = batch.reshape(-1, config.micro_batch_size, 9)
    results.append(jax.jit(step)(jax.jit(init)(), batch))
  chex.assert_trees_all_close(*results, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_head_chunks_do_not_change_the_loss_and_its_derivatives():
  tokens = np.random.default_rng(0).integers(0, 64, (4, 9), np.int32)
  results = []
  for head_chunks in (1, 4):
    config = _config(head_chunks=head_chunks)
    init, _ = _setup(config)
    params = jax.jit(init)().params
    fns = gpt_program.make_fns(config, gpt_program.make_model(config))
    loss_fn = lambda params, fns=fns: fns['obj_fn'](params, tokens)
    results.append(jax.jit(jax.value_and_grad(loss_fn))(params))
    _, (tangent,) = jax.jit(
      lambda p, loss_fn=loss_fn: jax.jvp(
        lambda p: (jax.grad(loss_fn)(p),), (p,), (p,)
      )
    )(params)
    results[-1] += (tangent,)
  chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sophia_h', 'sophia_g'])
def test_head_chunks_train(optimizer):
  states = []
  for head_chunks in (1, 2):
    config = _config(optimizer=optimizer, head_chunks=head_chunks, num_steps=10)
    init, step = _setup(config)
    batch = np.random.default_rng(0).integers(0, 64, (2, 4, 9), np.int32)
    states.append(jax.jit(step)(jax.jit(init)(), batch)[0])
  whole, chunked = states
  if optimizer == 'sophia_h':
    chex.assert_trees_all_close(chunked, whole, rtol=2e-3, atol=1e-6)
  else:  # The labels differ.
    nu = [optax.tree.get(state.opt_state, 'nu') for state in states]
    np.testing.assert_allclose(*map(optax.tree.norm, nu), rtol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sophia_h', 'sophia_g'])
def test_steps_with_a_bool_refresh_have_the_same_bits(optimizer):
  config = _config(optimizer=optimizer, update_interval=3, num_steps=10)
  init, step = _setup(config)
  step = jax.jit(step, static_argnames='refresh')
  one = two = jax.jit(init)()
  batches = np.random.default_rng(0).integers(0, 64, (7, 2, 4, 9), np.int32)
  for i, batch in enumerate(batches):
    one, two = step(one, batch), step(two, batch, refresh=i % 3 == 0)
    chex.assert_trees_all_equal(one, two)
    one, two = one[0], two[0]


@pytest.mark.slow
def test_gpt2_124m_trains_on_bin_files(data_dir):
  result = train_gpt.train(
    _config(
      'gpt2_124m',
      data_dir=data_dir,
      num_steps=6,
      eval_interval=3,
      learning_rate=1e-2,
      update_interval=2,
    )
  )
  assert result.finished
  assert [entry['step'] for entry in result.history] == [3, 6]
  assert all(np.isfinite(entry['val_loss']) for entry in result.history)
  assert 0 < result.history[-1]['win_rate'] <= 1
  seconds = [entry['seconds'] for entry in result.history]
  assert 0 < seconds[0] < seconds[1]


def test_gpt2_124m_has_the_settings_of_the_paper():
  config = gpt_configs.get_config('gpt2_124m', 'sophia_h')
  assert config.tokens_per_step == 480 * 1024
  assert config.update_interval == 10
  assert config.curvature_batch_size == 32
  assert (config.b1, config.b2, config.gamma) == (0.96, 0.99, 0.01)
  assert (config.warmup_steps, config.clip_norm) == (2000, 1.0)
  assert config.final_learning_rate == 0.05


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'batch_size': 6}, r'multiple of micro_batch_size; got 6 and 4'),
    ({'curvature_batch_size': 9}, r'1 to batch_size = 8; got 9'),
    ({'curvature_parts': 3}, r'curvature_batch_size = 4; got 3'),
    ({'head_chunks': 3}, r'head_chunks must divide block_size = 8; got 3'),
    ({'head_chunks': 0}, r'head_chunks must divide block_size = 8; got 0'),
    ({'num_heads': 3}, r'multiple of num_heads; got 16 and 3'),
    ({'num_steps': 2}, r'below num_steps = 2; got 2'),
    ({'mesh': 'data'}, r'name:size for each axis.*; got .data.\.'),
    ({'mesh': 'data:0'}, r'name:size for each axis.*; got .data:0.'),
    ({'mesh': 'data:2,data:2'}, r'different names.*; got .data:2,data:2.'),
    ({'mesh': 'data:8'}, r'micro_batch_size must be .* the 8 devices.* got 4'),
    ({'mesh': 'data:4'}, r'curvature_batch_size / curvature_parts .* got 2'),
    (_DIVISIBLE | {'mesh': 'fsdp:8', 'width': 12}, r'fsdp.*; got 12 and'),
    ({'eval_interval': 0}, r'eval_interval must be at least 1; got 0'),
    ({'name': 'gpt5'}, r'one of demo, gpt2_124m; got .gpt5.'),
    ({'optimizer': 'sgd'}, r'adamw, nadamw, sophia_h, sophia_g; got .sgd.'),
  ],
)
def test_bad_settings_are_a_clear_error(overrides, message):
  with pytest.raises(ValueError, match=message):
    _config(**overrides)


# Several devices.


_COLLECTIVE = re.compile(
  r' = (.*) (?:all-gather|all-reduce|all-to-all|reduce-scatter'
  r'|collective-permute)(?:-start)?\('
)


def _collectives(hlo):
  """Counts collectives of an ordinary step, and those only in a refresh."""
  bodies = dict(
    re.findall(
      r'^(?:ENTRY )?(%\S+) .*?\{$(.*?)^\}', hlo, re.MULTILINE | re.DOTALL
    )
  )
  callees = {
    name: set(re.findall(r'%[\w.-]+', body)) & set(bodies)
    for name, body in bodies.items()
  }
  branches = {
    name
    for body in bodies.values()
    for line in body.splitlines()
    if ' conditional(' in line
    for name in re.findall(r'%[\w.-]+', line)
    if name in bodies
  }
  while not (called := set().union(*map(callees.get, branches))) <= branches:
    branches |= called
  ordinary, refresh = collections.Counter(), collections.Counter()
  for name, body in bodies.items():
    counter = refresh if name in branches else ordinary
    counter.update(match[0] for match in _COLLECTIVE.finditer(body))
  return ordinary, refresh


@pytest.mark.slow
def test_ordinary_step_communicates_parameters_as_adamw_does():
  counters = {}
  for optimizer in gpt_configs.CONFIGS['demo']:
    config = _config(
      optimizer=optimizer,
      mesh='data:2,fsdp:4',
      unroll=1,
      num_layers=3,
      block_size=5,
      batch_size=32,
      micro_batch_size=16,
      curvature_batch_size=16,
      # They send numbers for each array.
      max_update_rms=0.0,
      adam_b2=0.0,
    )
    mesh = sharding.make_mesh(config.mesh)
    program = gpt_program.make_program(config, mesh)
    assert program.batch.shape == (2, 16, 6)
    with jax.set_mesh(mesh):
      step = program.step.lower(program.state, program.batch).compile()
    counters[optimizer] = _collectives(step.as_text())

  ordinary, refresh = counters['adamw']
  assert not refresh
  for optimizer in ('sophia_h', 'sophia_g'):
    assert counters[optimizer][0] == ordinary
    assert counters[optimizer][1]

  # No tokens or activations, and parameters of one layer at a time.
  sizes = {1}
  for path, x in jax.tree_util.tree_leaves_with_path(program.state.params):
    size = x.size // 3 if path[0].key == 'layers' else x.size
    sizes |= {size, size // 4}
  sent = {
    (dtype, math.prod(map(int, filter(None, shape.split(',')))))
    for collective in ordinary
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', collective)
  }
  assert ('f32', 3 * 16 * 16) in sent
  assert sent <= {('f32', size) for size in sizes}


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sophia_h', 'sophia_g'])
def test_mesh_changes_the_results_by_round_off_only(data_dir, optimizer):
  config = _config(
    optimizer=optimizer,
    data_dir=data_dir,
    num_steps=4,
    update_interval=2,
    eval_interval=4,
    unroll=1,
    learning_rate=1e-3,
    head_chunks=2 if optimizer == 'sophia_g' else 1,
    **_DIVISIBLE,
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


@pytest.mark.slow
def test_run_is_resumed_on_another_mesh(tmp_path, data_dir):
  config = _config(
    optimizer='adamw',
    data_dir=data_dir,
    out_dir=str(tmp_path / 'run'),
    num_steps=4,
    eval_interval=4,
    checkpoint_interval=2,
    unroll=1,
    mesh='data:2,fsdp:4',
    learning_rate=1e-3,
    **_DIVISIBLE,
  )
  whole = train_gpt.train(config)
  shutil.rmtree(tmp_path / 'run' / '4')
  resumed = train_gpt.train(dataclasses.replace(config, mesh='fsdp:2'))
  assert {
    len(x.sharding.device_set) for x in jax.tree.leaves(resumed.state)
  } == {2}
  chex.assert_trees_all_close(
    jax.device_get(resumed.state),
    jax.device_get(whole.state),
    rtol=1e-4,
    atol=1e-6,
  )


def test_mesh_of_too_many_devices_is_a_clear_error():
  config = _config(
    mesh='data:16', batch_size=32, micro_batch_size=16, curvature_batch_size=32
  )
  for fn in train_gpt.train, train_gpt.describe:
    with pytest.raises(ValueError, match=r'needs 16 devices; there are 8'):
      fn(config)


# Cost.


def test_flops_count_every_iteration_and_both_branches():
  def fn(x, w):
    def layer(x, w):
      return jnp.sin(x @ w), None

    x, _ = jax.lax.scan(layer, x, w)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0], lambda x: x, x)

  x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
  w = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)
  product = 2 * 3 * 4 * 4
  assert dry_run.matmul_flops(fn, x, w) == (5 * product, 6 * product)


@pytest.mark.slow
def test_dry_run_counts_as_the_textbook_does():
  config = _config(width=32)
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
def test_dry_run_counts_what_each_device_of_a_mesh_holds():
  described = train_gpt.describe(
    _config(mesh='data:2,fsdp:4', unroll=1, **_DIVISIBLE)
  )
  divided = 2 * (12 * 16**2 + 2 * 16) + 64 * 16 + 8 * 16
  whole = 16  # the last norm
  assert 'bytes on each of 8 devices' in described
  assert re.search(rf'parameters +{divided + 4 * whole:,}\n', described)
  assert re.search(rf'batch +{4 * 2 * 9}\n', described)


# Interruption and resume.


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, data_dir):
  config = _config(
    data_dir=data_dir,
    num_steps=60,
    eval_interval=20,
    update_interval=3,
    checkpoint_interval=1,
    out_dir=str(tmp_path / 'killed'),
  )
  command = [sys.executable, str(_SCRIPT)] + [
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

  with pytest.raises(ValueError, match=r'width: 16 saved, 32 now'):
    train_gpt.train(dataclasses.replace(config, width=32))


def curves(ax):
  lines, labels = ax.get_legend_handles_labels()
  return {
    label: (list(line.get_xdata()), list(line.get_ydata()))
    for line, label in zip(lines, labels, strict=True)
  }


@pytest.mark.slow
def test_interrupt_leaves_checkpoint_table_and_plot(tmp_path, monkeypatch):
  sample = text.sample
  settings = _TINY | {'vocab_size': 256, 'num_steps': 8, 'eval_interval': 2}

  def interrupting(tokens, seed, step, *sizes):
    if step == 4:
      signal.raise_signal(signal.SIGINT)
    return sample(tokens, seed, step, *sizes)

  monkeypatch.setattr(text, 'sample', interrupting)
  handler = signal.getsignal(signal.SIGINT)
  results = demo.train_all(str(tmp_path), **settings)
  assert signal.getsignal(signal.SIGINT) is handler
  assert list(results) == ['adamw']
  assert not results['adamw'].finished
  assert (tmp_path / 'adamw' / '5').is_dir()
  assert 'AdamW           4' in demo.table(results)
  losses = [entry['val_loss'] for entry in results['adamw'].history]
  assert curves(demo.plot(results).axes[0]) == {'AdamW': ([2, 4], losses)}

  monkeypatch.setattr(text, 'sample', sample)
  results = demo.train_all(str(tmp_path), **settings)
  assert list(results) == ['adamw', 'nadamw', 'sophia_h', 'sophia_g']
  assert all(result.finished for result in results.values())
  steps = [entry['step'] for entry in results['adamw'].history]
  assert steps == [2, 4, 6, 8]
  assert all(name in demo.table(results) for name in ('Sophia-H', 'Sophia-G'))
  win_rates = curves(demo.plot(results).axes[3])
  assert win_rates['Sophia-G'][0] == [2, 4, 6, 8]


@pytest.mark.slow
def test_demo_has_the_settings_of_the_documentation():
  page = pathlib.Path(__file__).parents[1] / 'docs' / 'choosing.md'
  names = {}
  for example in doctest.DocTestParser().get_examples(page.read_text()):
    if example.source.startswith(('import', 'def sophia_like_adamw')):
      exec(example.source, names)
  config = gpt_configs.sophia_like(
    _config(optimizer='adamw', batch_size=32, num_steps=8), 'sophia_g'
  )
  ours = gpt_program.make_optimizer(config)
  schedule = gpt_program.make_schedule(config)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0),
    names['sophia_like_adamw'](
      schedule, adam_b2=config.adam_b2, weight_decay_mask=gpt.decay_mask
    ),
  )
  fns = gpt_program.make_fns(config, gpt_program.make_model(config))
  init, _ = _setup(config)
  params = jax.jit(init)().params
  batches = np.random.default_rng(0).integers(0, 64, (8, 32, 9), np.int32)

  def train(optimizer, batch_of):
    @jax.jit
    def step(carry, batch):
      params, state = carry
      updates, state = optimizer.update(
        jax.grad(fns['obj_fn'])(params, batch),
        state,
        params,
        batch=batch_of(batch),
        **fns,
      )
      return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, batches)[0][0]

  with jax.numpy_dtype_promotion('standard'):  # optax's clipping needs it.
    chex.assert_trees_all_close(
      train(ours, lambda batch: batch[None]),
      train(theirs, lambda batch: batch[:8]),
      rtol=1e-5,
    )


def test_plot_of_the_demo():
  def result(losses, *inside):
    history = [
      {'step': 10 * i, 'seconds': 0.5 * i, 'val_loss': loss}
      for i, loss in enumerate(losses, start=1)
    ]
    for entry, more in zip(history, inside, strict=False):
      entry |= more
    return train_gpt.Result(None, history, 1.0, True)

  fig = demo.plot(
    {
      'adamw': result([5.0, 4.0]),
      'sophia_h': result([4.5, 3.5], {'win_rate': 0.2}, {'win_rate': 0.4}),
      'sophia_g': result([5.5, 3.0], {'win_rate': 0.1}, {'win_rate': 0.3}),
    }
  )
  fig.draw_without_rendering()
  losses, times, differences, win_rates = map(curves, fig.axes)
  assert losses == {
    'AdamW': ([10, 20], [5.0, 4.0]),
    'Sophia-H': ([10, 20], [4.5, 3.5]),
    'Sophia-G': ([10, 20], [5.5, 3.0]),
  }
  assert times == {name: ([0.5, 1.0], y) for name, (_, y) in losses.items()}
  # The target is AdamW's last loss.
  assert list(fig.axes[0].lines[-1].get_ydata()) == [4.0, 4.0]
  assert differences == {
    'AdamW': ([10, 20], [0.0, 0.0]),
    'Sophia-H': ([10, 20], [-0.5, -0.5]),
    'Sophia-G': ([10, 20], [0.5, -1.0]),
  }
  assert win_rates['AdamW'] == ([], [])
  assert win_rates['Sophia-H'] == ([10, 20], [0.2, 0.4])
  assert win_rates['Sophia-G'] == ([10, 20], [0.1, 0.3])


def test_demo_reports_a_run_that_was_stopped_before_its_first_validation():
  results = {'adamw': train_gpt.Result(None, [], 1.0, False)}
  assert 'AdamW           -' in demo.table(results)
  fig = demo.plot(results)
  fig.draw_without_rendering()
  assert curves(fig.axes[0]) == {'AdamW': ([], [])}
