"""Programs compiled for TPUs by the TPU compiler, without a TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_HAS_COMPILER = importlib.util.find_spec('libtpu') is not None

pytestmark = pytest.mark.skipif(
  not _HAS_COMPILER, reason="needs libtpu: pip install 'sophia-optax[tpu]'"
)


@pytest.fixture(name='figures', scope='module')
def _figures():
  """Compiles all programs in a process that does not look for a TPU."""
  run = subprocess.run(
    [sys.executable, 'tests/tpu_programs.py'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    check=True,
    timeout=1200,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'benchmarks')]),
    },
  )
  return json.loads(run.stdout)


@pytest.mark.parametrize('optimizer', ['H', 'G'])
@pytest.mark.parametrize('way', ['jit', 'fsdp', 'explicit', 'shard_map'])
def test_a_step_compiles(figures, way, optimizer):
  steps = figures['steps'][f'{way}, {optimizer}']
  # XLA keeps one conditional, and with a bool none.
  assert steps['one']['conditionals'] == 1
  assert steps['ordinary']['conditionals'] == 0
  assert steps['refresh']['conditionals'] == 0
  assert steps['ordinary']['flops'] < steps['refresh']['flops']
  # An ordinary step sends only what AdamW sends.
  adamw = figures['steps'][f'{way}, adamw']['one']
  assert steps['ordinary']['sent'] == adamw['sent']


@pytest.mark.parametrize(('program', 'copies'), [
    ('optax.contrib.sophia, H, one', 1),
    ('sophia, H, ordinary', 0),
    ('sophia, H, refresh', 0),
    ('sophia, H, refresh first, one', 0),
    ('sophiaw, G, ordinary', 0),
])  # fmt: skip
def test_copies_of_an_update(figures, program, copies):
  # In copies of the parameters. optax's in one program is for comparison.
  assert figures['update'][program] == pytest.approx(copies, abs=0.02)
