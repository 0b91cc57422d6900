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


@pytest.mark.parametrize(('name', 'words'), [
    ('sum of two', 3),
    ('branch, false', 0),
    ('branch, true', 2),
    ('row of a matrix', 0),
    ('three steps of a loop', 6),
])  # fmt: skip
def test_traffic_of_known_programs(figures, name, words):
  assert figures['known'][name] == pytest.approx(words, abs=0.05)


@pytest.mark.parametrize('optimizer', ['H', 'G'])
@pytest.mark.parametrize('way', ['jit', 'fsdp', 'explicit', 'shard_map'])
def test_a_step_compiles(figures, way, optimizer):
  steps = figures['steps'][f'{way}, {optimizer}']
  # XLA keeps one conditional, and with a bool none.
  assert steps['one']['conditionals'] == 1
  assert steps['ordinary']['conditionals'] == 0
  assert steps['refresh']['conditionals'] == 0
  assert steps['ordinary']['moved'] < steps['refresh']['moved']
  # An ordinary step sends only what AdamW sends.
  adamw = figures['steps'][f'{way}, adamw']['one']
  assert steps['ordinary']['sent'] == adamw['sent']


@pytest.mark.parametrize(('program', 'words'), [
    ('optax.adamw, one', 7),
    ('sophia, H, ordinary', 6),
    ('sophia, G, ordinary', 6),
    ('sophiaw, G, ordinary', 8),
    ('sophia, H, refresh first, one', 6),
    # If XLA stores the new h twice, it is 0.75 words more.
    ('sophia, H, refresh', 9.25),
])  # fmt: skip
def test_words_of_an_update(figures, program, words):
  assert figures['update'][program] == pytest.approx(words, abs=0.1)
