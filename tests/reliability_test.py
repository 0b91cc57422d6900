"""Tests each row of docs/reliability.md: a fault in step n of a training.

A row's test is named after its first cell.
"""

import functools
import os
import pathlib
import re
import resource
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import checkpoints
import gpt_configs
import sharding
import sophia_optax

# For the whole module, as three_steps below is compared bit for bit.
pytestmark = pytest.mark.usefixtures('compile_module_fast')

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parent / 'docs' / 'reliability.md'
# Rows that demo_test, train_gpt_test and processes_test have.
ELSEWHERE = {
  'ctrl_c_in_train_gpt_py',
  'the_process_is_killed',
  'one_of_several_processes_is_killed',
}

NUM_STEPS, INTERVAL = 40, 5
FAULT = 20  # The step with the fault: one that refreshes the curvature.
LEARNING_RATE = 0.02
INPUTS = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
LABELS = np.argmax(INPUTS[:, :4] + INPUTS[:, 4:8] ** 2, axis=1)


def test_page_and_tests_have_the_same_rows():
  cells = re.findall(r'^\| (?!fault)(.*?) \|', PAGE.read_text(), re.MULTILINE)
  rows = {re.sub(r'\W+', '_', cell.lower()).strip('_') for cell in cells}
  here = {name[5:] for name in globals() if name.startswith('test_')}
  assert rows | {'page_and_tests_have_the_same_rows'} == here | ELSEWHERE


# Training.


def faults(steps=FAULT, **values):
  """Returns faults of each step: arrays of shape (NUM_STEPS,)."""
  none = np.zeros(NUM_STEPS, np.float32)
  found = {
    'entry': none,  # added to one entry of the estimate
    'curvature': none + 1,  # factor of what the estimator differentiates
    'gradient': none,  # added to one entry of the gradient
  }
  for name, value in values.items():
    found[name] = found[name].copy()
    found[name][steps] = value
  return found


def init_params():
  keys = jax.random.split(jax.random.PRNGKey(0))
  return {
    'hidden': jax.random.normal(keys[0], (16, 32)) / 4,
    'output': jax.random.normal(keys[1], (32, 4)) / 6,
  }


def predict(params, inputs):
  return jnp.tanh(inputs @ params['hidden']) @ params['output']


def loss_fn(params, inputs, labels):
  return optax.softmax_cross_entropy_with_integer_labels(
    predict(params, inputs), labels
  ).mean()


def poisoned(estimator):
  """Adds `entry_fault`, an extra argument, to one entry of the estimate."""

  def update_fn(updates, state, params=None, *, entry_fault=0.0, **extra_args):
    estimate, state = estimator.update(updates, state, params, **extra_args)
    hidden = estimate['hidden'].at[0, 0].add(entry_fault)
    return estimate | {'hidden': hidden}, state

  return optax.GradientTransformationExtraArgs(estimator.init, update_fn)


def make_optimizer(axis_name=None, **settings):
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    axis_name=axis_name
  )
  return sophia_optax.sophia_g(
    LEARNING_RATE,
    rho=0.1,
    weight_decay=0.0,
    update_interval=INTERVAL,
    hessian_diagonal_fn=poisoned(estimator),
    **settings,
  )


class Steps(NamedTuple):
  """Results of a training after each step: (NUM_STEPS, ...)."""

  params: chex.ArrayTree
  state: optax.OptState
  loss: chex.Array  # before the step


def training(tx, axis_name=None):
  """Returns the function (faults, inputs, labels) -> Steps."""

  def run(faults, inputs, labels):
    def step(carry, fault):
      params, state = carry
      loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels)
      grads['hidden'] = grads['hidden'].at[0, 0].add(fault['gradient'])
      if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
      updates, state = tx.update(
        grads,
        state,
        params,
        entry_fault=fault['entry'],
        predict_fn=lambda p: fault['curvature'] * predict(p, inputs),
      )
      params = optax.apply_updates(params, updates)
      return (params, state), Steps(params, state, loss)

    params = init_params()
    return jax.lax.scan(step, (params, tx.init(params)), faults)[1]

  return run


@functools.cache
def compiled(guarded):
  tx = make_optimizer()
  if guarded:
    tx = optax.apply_if_finite(tx, max_consecutive_errors=3)
  return jax.jit(training(tx))


def train(faults, guarded=False):
  return jax.device_get(compiled(guarded)(faults, INPUTS, LABELS))


@functools.cache
def undisturbed(guarded=False):
  return train(faults(), guarded)


def get(steps, name):
  return optax.tree.get(steps.state, name)


def at(steps, index):
  return jax.tree.map(lambda x: x[index], steps)


def assert_trains_on(steps):
  chex.assert_tree_all_finite(steps)
  usual = undisturbed().loss
  assert usual[-1] < usual[0] / 10
  assert steps.loss[-1] < usual[-1] + usual[0] / 100


def assert_estimate_is_ignored(steps):
  nu = get(steps, 'nu')
  chex.assert_trees_all_equal(at(nu, FAULT), at(nu, FAULT - 1))
  assert (nu['hidden'][FAULT + INTERVAL] != nu['hidden'][FAULT]).all()
  np.testing.assert_array_equal(
    get(steps, 'nonfinite_count'), np.arange(NUM_STEPS) >= FAULT
  )
  assert_trains_on(steps)


def assert_step_is_skipped(steps, usual):
  # The step changes nothing: count, mu, nu, the key of the probes.
  kept = lambda steps: (steps.params, steps.state.inner_state)
  before, after = slice(FAULT), slice(FAULT, None)
  chex.assert_trees_all_equal(at(kept(steps), before), at(kept(usual), before))
  chex.assert_trees_all_equal(
    at(kept(steps), after), at(kept(usual), slice(FAULT - 1, -1))
  )
  np.testing.assert_array_equal(
    steps.state.total_notfinite, np.arange(NUM_STEPS) >= FAULT
  )
  assert_trains_on(steps)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_an_entry_of_an_estimate_is_nan_or_infinite(value):
  steps, usual = train(faults(entry=value)), undisturbed()
  chex.assert_trees_all_equal(at(steps, slice(FAULT)), at(usual, slice(FAULT)))
  # This entry keeps its value, and the others are updated.
  nu, usual_nu = get(steps, 'nu')['hidden'], get(usual, 'nu')['hidden']
  kept = nu[FAULT] == nu[FAULT - 1]
  assert kept[0, 0]
  assert kept.sum() == 1
  np.testing.assert_array_equal(nu[FAULT][~kept], usual_nu[FAULT][~kept])
  assert nu[FAULT + INTERVAL, 0, 0] != nu[FAULT, 0, 0]
  np.testing.assert_array_equal(
    get(steps, 'nonfinite_count'), np.arange(NUM_STEPS) >= FAULT
  )
  assert_trains_on(steps)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_whole_estimate_is_nan_or_infinite(value):
  assert_estimate_is_ignored(train(faults(curvature=value)))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_gradient_is_nan_or_infinite_in_apply_if_finite(value):
  steps = train(faults(gradient=value), guarded=True)
  assert_step_is_skipped(steps, undisturbed(guarded=True))


def test_more_such_gradients_in_a_row_than_apply_if_finite_skips():
  bad = slice(FAULT, FAULT + 4)  # It skips three.
  steps = train(faults(bad, gradient=np.nan), guarded=True)
  chex.assert_tree_all_finite(at(steps.params, bad.stop - 2))
  assert np.isnan(get(steps, 'mu')['hidden'][bad.stop - 1, 0, 0])


def test_a_gradient_is_nan_and_nothing_is_done_about_it():
  steps = train(faults(gradient=np.nan))
  for tree in steps.params, get(steps, 'mu'):
    assert np.isfinite(tree['hidden'][FAULT - 1]).all()
    assert np.isnan(tree['hidden'][FAULT:, 0, 0]).all()
  assert np.isnan(steps.loss[FAULT + 1 :]).all()
  chex.assert_tree_all_finite(get(steps, 'nu'))


@pytest.mark.parametrize('sign', [-1, 1])
def test_a_gradient_is_infinite_and_nothing_is_done_about_it(sign):
  steps = train(faults(gradient=sign * np.inf))
  chex.assert_tree_all_finite((steps.params, steps.loss, get(steps, 'nu')))
  assert (get(steps, 'mu')['hidden'][FAULT:, 0, 0] == sign * np.inf).all()
  moves = np.diff(steps.params['hidden'][FAULT - 1 :, 0, 0])
  np.testing.assert_allclose(moves, -sign * LEARNING_RATE, rtol=1e-3)


def test_a_gradient_is_infinite_with_adam_b2():
  run = jax.jit(training(make_optimizer(adam_b2=0.95)))
  steps = run(faults(gradient=np.inf), INPUTS, LABELS)
  params = at(steps.params, slice(FAULT + 1))
  assert np.isfinite(params['hidden'][:FAULT]).all()
  assert np.isnan(params['hidden'][FAULT]).sum() == 1
  assert np.isnan(steps.params['output'][FAULT + 1 :]).all()
  chex.assert_tree_all_finite(get(steps, 'nu'))


@functools.cache
def mapped():
  tx = optax.apply_if_finite(make_optimizer('data'), 3)
  return jax.pmap(training(tx, 'data'), 'data')


def train_replicas(**values):
  """Trains on all devices, with the fault on the last one only."""
  num_devices = jax.device_count()
  each = [faults()] * (num_devices - 1) + [faults(**values)]
  shard = lambda x: x.reshape(num_devices, -1, *x.shape[1:])
  replicas = jax.device_get(
    mapped()(
      jax.tree.map(lambda *x: np.stack(x), *each), shard(INPUTS), shard(LABELS)
    )
  )
  for i in range(num_devices):
    chex.assert_trees_all_equal(at(replicas, i), at(replicas, 0))
  return at(replicas, 0)


def test_the_estimate_of_one_replica_is_nan():
  assert_estimate_is_ignored(train_replicas(curvature=np.nan))


def test_the_gradient_of_one_replica_is_nan_in_apply_if_finite():
  assert_step_is_skipped(train_replicas(gradient=np.nan), train_replicas())


# Interruptions of a Python loop.


class UsersError(Exception):
  """The exception that obj_fn raises."""


@functools.cache
def python_step(donate):
  """Returns the jitted step (carry, batch, fails) -> carry."""
  tx = sophia_optax.sophia(LEARNING_RATE, update_interval=INTERVAL)

  def check(fails):
    if fails:
      raise UsersError('raised in a callback')
    return np.float32(1)

  def step(carry, batch, fails):
    params, state = carry

    def obj_fn(params):
      if len(batch[0]) != len(INPUTS):
        raise UsersError(f'a batch of {len(batch[0])}')
      one = jax.pure_callback(
        check, jax.ShapeDtypeStruct((), np.float32), fails
      )
      return one * loss_fn(params, *batch)

    grads = jax.grad(loss_fn)(params, *batch)
    updates, state = tx.update(grads, state, params, obj_fn=obj_fn)
    return optax.apply_updates(params, updates), state

  def begin():
    params = init_params()
    return params, tx.init(params)

  return jax.jit(begin), jax.jit(step, donate_argnums=0 if donate else ())


def loop(donate, fault=lambda step, carry: None):
  """Trains; calls fault before step FAULT, and continues with its carry."""
  begin, step = python_step(donate)
  carry = begin()
  for i in range(FAULT + INTERVAL):
    if i == FAULT:
      fault(step, carry)
    previous = carry
    carry = jax.block_until_ready(step(carry, (INPUTS, LABELS), False))
    assert all(x.is_deleted() == donate for x in jax.tree.leaves(previous))
  return jax.device_get(carry)


def assert_lost_only_if_donated(donate, fault):
  if donate:
    with pytest.raises((RuntimeError, ValueError), match='deleted'):
      loop(donate, fault)
  else:
    chex.assert_trees_all_equal(loop(donate, fault), loop(donate))


donating = pytest.mark.parametrize('donate', [False, True])


@donating
def test_obj_fn_raises_while_it_is_traced(donate):
  def fault(step, carry):
    with pytest.raises(UsersError, match='a batch of 3'):
      step(carry, (INPUTS[:3], LABELS[:3]), False)

  chex.assert_trees_all_equal(loop(donate, fault), loop(donate))


@donating
def test_obj_fn_raises_while_it_runs_in_a_callback(donate):
  def fault(step, carry):
    # JAX's error contains the user's text.
    with pytest.raises(
      (RuntimeError, ValueError), match='UsersError: raised in a callback'
    ):
      jax.block_until_ready(step(carry, (INPUTS, LABELS), True))

  assert_lost_only_if_donated(donate, fault)


@donating
def test_an_interrupt_during_a_step(donate):
  def interrupted(step, carry):
    step(carry, (INPUTS, LABELS), False)
    raise KeyboardInterrupt

  def fault(step, carry):
    with pytest.raises(KeyboardInterrupt):
      interrupted(step, carry)

  assert_lost_only_if_donated(donate, fault)


# Checkpoints.


def abstract(sharding_of=lambda tree: None, **changed):
  """Returns the shapes of what is saved, by default of arrays on one device."""
  tree = jax.eval_shape(python_step(donate=True)[0])
  tree = tree[0] | changed, tree[1]
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = sharding_of(tree) or jax.tree.map(lambda _: one, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def make_saver(out_dir, **settings):
  config = gpt_configs.Config(out_dir=str(out_dir), **settings)
  return checkpoints.Checkpoints(config)


def train_with_checkpoints(out_dir, num_steps, fault=lambda step, state: state):
  """Trains or resumes; calls fault before it saves. Returns state, record."""
  saver = make_saver(out_dir)
  begin, step_fn = python_step(donate=True)
  step, state, record = saver.restore(abstract()) or (
    0,
    begin(),
    {'first': [], 'run': 0},
  )
  record['run'] += 1
  while step < num_steps:
    state = step_fn(state, (INPUTS, LABELS), False)
    step += 1
    record['first'].append(float(state[0]['hidden'][0, 0]))
    saver.save(step, fault(step, state), record)
  saver.close()
  return jax.device_get(state), record


@functools.cache
def trained_at_once():
  return train_with_checkpoints('', 4)


def assert_continues(out_dir, runs=2):
  """Trains to step 4, and compares with an uninterrupted training."""
  state, record = train_with_checkpoints(out_dir, 4)
  chex.assert_trees_all_equal(state, trained_at_once()[0])
  assert record == trained_at_once()[1] | {'run': runs}
  assert sorted(os.listdir(out_dir)) == ['3', '4']


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory):
  """A run with the checkpoints of steps 2 and 3."""
  out_dir = tmp_path_factory.mktemp('run') / 'out'
  train_with_checkpoints(out_dir, 3)
  return out_dir


def check_each_file(three_steps, out_dir, damage):
  """Damages each file in turn: restoring gives the whole state or an error."""
  _, whole, _ = make_saver(three_steps).restore(abstract())
  errors = []
  for original in filter(pathlib.Path.is_file, three_steps.rglob('3/**/*')):
    shutil.copytree(three_steps, out_dir, dirs_exist_ok=True)
    damage(out_dir / original.relative_to(three_steps))
    try:
      step, state, _ = make_saver(out_dir).restore(abstract())
    except RuntimeError as error:
      errors.append(str(error))
    else:
      assert step == 3
      chex.assert_trees_all_equal(state, whole)
  assert set(errors) == {
    f'{out_dir / "3"} could not be restored, see the error above. If its '
    'files are damaged, delete that folder. Then the same command resumes '
    'from step 2.'
  }
  shutil.rmtree(out_dir / '3')
  assert_continues(out_dir)


@pytest.mark.slow
def test_the_newest_checkpoint_is_truncated(three_steps, tmp_path):
  def truncate(path):
    os.truncate(path, path.stat().st_size // 2)

  check_each_file(three_steps, tmp_path / 'out', truncate)


@pytest.mark.slow
def test_a_file_of_the_newest_checkpoint_is_missing(three_steps, tmp_path):
  check_each_file(three_steps, tmp_path / 'out', pathlib.Path.unlink)


def test_a_killed_save_left_its_temporary_folder(three_steps, tmp_path):
  out_dir = shutil.copytree(three_steps, tmp_path / 'out')
  shutil.copytree(out_dir / '3', out_dir / '7.orbax-checkpoint-tmp')
  shutil.rmtree(out_dir / '7.orbax-checkpoint-tmp' / 'state')
  assert_continues(out_dir)


@pytest.mark.parametrize('num_bytes', [0, 1500])
def test_the_disk_is_full_while_saving(tmp_path, num_bytes):
  # A limit on the size of files simulates a full disk without privileges. With
  # 0 no record can be written, with 1500 no parameters.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fault(step, state):
    if step == 3:
      resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    return state

  try:
    with pytest.raises(RuntimeError, match='step 3 could not be') as info:
      train_with_checkpoints(tmp_path, 4, fault)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert f'written to {tmp_path}, ' in str(info.value)
  assert 'the same command resumes from step 2.' in str(info.value)
  assert 'File too large' in str(info.value.__cause__)
  left = set(os.listdir(tmp_path))
  assert left >= {'1', '2'}
  assert '3' not in left
  assert_continues(tmp_path)


def test_the_state_is_not_finite_when_it_is_saved(tmp_path):
  def fault(step, state):
    if step < 3:
      return state
    return optax.tree.set(
      state, mu=jax.tree.map(lambda x: x * jnp.inf, state[0])
    )

  with pytest.raises(
    FloatingPointError, match=r'3 steps must be .* resumes from step 2;'
  ):
    train_with_checkpoints(tmp_path, 4, fault)
  assert sorted(os.listdir(tmp_path)) == ['1', '2']
  assert_continues(tmp_path)


def test_restored_with_other_settings(three_steps):
  with pytest.raises(ValueError, match=r'\(width: 64 saved, 32 now\)'):
    make_saver(three_steps, width=32).restore(abstract())


def test_restored_into_other_shapes(three_steps):
  tree = abstract(hidden=jax.ShapeDtypeStruct((16, 8), np.float32))
  message = r'\(16, 8\) is not compatible with the stored shape: \(16, 32\)'
  with pytest.raises(RuntimeError, match='could not be restored') as info:
    make_saver(three_steps).restore(tree)
  assert re.search(message, str(info.value.__cause__))
  with (
    ocp.StandardCheckpointer() as checkpointer,
    pytest.raises(ValueError, match=message),
  ):
    checkpointer.restore(three_steps / '3' / 'state', tree)


@pytest.mark.parametrize('num_devices', [2, 8])
def test_restored_on_another_number_of_devices(three_steps, num_devices):
  spec = f'fsdp:{num_devices}'
  sharding_of = functools.partial(
    sharding.state_sharding, sharding.make_mesh(spec)
  )
  _, expected, _ = make_saver(three_steps).restore(abstract())
  step, state, _ = make_saver(three_steps, mesh=spec).restore(
    abstract(sharding_of)
  )
  assert step == 3
  chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
  hidden = state[0]['hidden'].sharding
  assert hidden.shard_shape((16, 32)) == (16, 32 // num_devices)
