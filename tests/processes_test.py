"""The language model example in two processes.

Run as a script, this file is one of these processes: train_gpt.py, which in the
end also writes what its devices hold.
"""

import collections
import dataclasses
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time

from absl import app
import jax
import numpy as np
import pytest
import tiny_gpt

import gpt_configs
import text
import train_gpt

_SETTINGS = (
  tiny_gpt.SETTINGS
  | tiny_gpt.DIVISIBLE
  | {
    'optimizer': 'sophia_g',
    'mesh': 'data:2,fsdp:4',
    'num_steps': 6,
    'eval_interval': 3,
    'unroll': 1,
    'checkpoint_interval': 2,
    'learning_rate': 1e-3,
  }
)
_TIMEOUT = 240  # seconds; processes need only a few


def _process():
  """Trains, then writes shards, history and the number of steps."""
  out = os.environ['TEST_OUT']
  killed_at = int(os.environ.get('TEST_KILLED_AT', -1))
  train, sample = train_gpt.train, text.sample
  steps = []

  def sample_or_die(tokens, seed, step, *sizes):
    if step == killed_at:
      os.kill(os.getpid(), signal.SIGKILL)
    steps.append(step)
    return sample(tokens, seed, step, *sizes)

  def train_and_write(config):
    result = train(config)
    leaves = {
      jax.tree_util.keystr(path): [
        (shard.index, np.asarray(shard.data)) for shard in x.addressable_shards
      ]
      for path, x in jax.tree_util.tree_leaves_with_path(result.state)
    }
    losses = [entry['val_loss'] for entry in result.history]
    pathlib.Path(out).write_bytes(pickle.dumps((leaves, losses, steps)))
    return result

  text.sample, train_gpt.train = sample_or_die, train_and_write
  train_gpt.define_flags()
  app.run(train_gpt.main)


class _Processes:
  """Two processes with four devices each. They are killed at the end."""

  def __init__(self, tmp_path, config, killed_at=-1):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    self.outs = [tmp_path / f'shards{i}' for i in range(2)]
    self._logs = [tmp_path / f'log{i}' for i in range(2)]
    self._all = []
    for i in range(2):
      environment = os.environ | {
        'PYTHONPATH': os.pathsep.join(sys.path),
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '4',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
        'TEST_OUT': str(self.outs[i]),
        'TEST_KILLED_AT': str(killed_at if i == 1 else -1),
      }
      environment.pop('XLA_FLAGS', None)
      settings = config | {
        'coordinator_address': address,
        'num_processes': 2,
        'process_id': i,
      }
      with self._logs[i].open('w') as log:
        self._all.append(
          subprocess.Popen(
            [sys.executable, __file__]
            + [f'--{name}={value}' for name, value in settings.items()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self._all:
      process.kill()
      process.wait()

  def wait(self, which):
    """Returns the exit statuses when all processes have ended or one failed."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
      statuses = [self._all[i].poll() for i in which]
      if None not in statuses or any(statuses):
        return statuses
      if time.monotonic() > deadline:
        pytest.fail(
          f'No end after {_TIMEOUT} s.\n{self.output(0)}\n{self.output(1)}'
        )
      time.sleep(0.02)

  def output(self, i):
    return f'Process {i}:\n{self._logs[i].read_text()[-4000:]}'


def _run(tmp_path, config):
  """Returns (leaf -> shards) of both processes, the losses and the steps."""
  for _ in range(3):
    with _Processes(tmp_path, config) as processes:
      statuses = processes.wait([0, 1])
    output = f'{processes.output(0)}\n{processes.output(1)}'
    # Another program may have taken the port in the meantime.
    if not any(statuses) or 'address already in use' not in output.lower():
      break
  assert statuses == [0, 0], output
  assert 'val_loss' in processes.output(0)
  assert 'val_loss' not in processes.output(1)
  first, second = (pickle.loads(out.read_bytes()) for out in processes.outs)
  assert first[1:] == second[1:]
  assert first[0].keys() == second[0].keys()
  return (
    {name: first[0][name] + second[0][name] for name in first[0]},
    *first[1:],
  )


def _whole(shards):
  """Joins shards, and checks that replicas of a shard have the same bits."""
  parts = collections.defaultdict(list)
  for index, part in shards:
    parts[str(index)].append((index, part))
  shape = tuple(
    max(index[axis].stop or part.shape[axis] for index, part in shards)
    for axis in range(shards[0][1].ndim)
  )
  whole = np.empty(shape, shards[0][1].dtype)
  for copies in parts.values():
    for index, part in copies:
      np.testing.assert_array_equal(part, copies[0][1])
      whole[index] = part
  return whole


@pytest.mark.slow
@pytest.mark.usefixtures('compile_fast')
def test_two_processes_train_as_one_does(tmp_path, data_dir):
  config = _SETTINGS | {'data_dir': data_dir}
  leaves, losses, _ = _run(tmp_path, config | {'out_dir': tmp_path / 'run'})
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules promote.
    result = train_gpt.train(
      dataclasses.replace(gpt_configs.CONFIGS['demo'], **config)
    )
  np.testing.assert_allclose(
    losses, [entry['val_loss'] for entry in result.history], rtol=1e-5
  )
  for path, x in jax.tree_util.tree_leaves_with_path(result.state):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      _whole(leaves[name]), x, rtol=1e-5, atol=1e-6, err_msg=name
    )

  # One process dies between the checkpoints of steps 4 and 6.
  config |= {'out_dir': tmp_path / 'killed'}
  with _Processes(tmp_path, config, killed_at=5) as processes:
    assert processes.wait([1]) == [-signal.SIGKILL], processes.output(1)
  assert (tmp_path / 'killed' / '4').is_dir()
  resumed, resumed_losses, steps = _run(tmp_path, config)
  assert steps == [0, 4, 5]  # 0 is for compilation
  assert resumed_losses == losses
  for name, shards in leaves.items():
    np.testing.assert_array_equal(_whole(resumed[name]), _whole(shards))


if __name__ == '__main__':
  _process()
