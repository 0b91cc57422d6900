"""Eight CPU devices for all tests and doctests, strict dtypes, fixtures."""

import contextlib
import os

import jax
import numpy as np
import pytest

# Set JAX_PLATFORMS to run the tests on an accelerator.
jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)


def pytest_configure(config):
  """Shares compiled programs between workers, and with later runs."""
  if cache := getattr(config, 'cache', None):  # Under Bazel there is none.
    jax.config.update('jax_compilation_cache_dir', str(cache.mkdir('jax')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


# Networks of four libraries; derivations; devices; what the notebook runs too.
_SLOW_PAGES = (
  'integrations.md',
  'mathematics.md',
  'scaling.md',
  'getting-started.md',
)


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.name in _SLOW_PAGES:
      item.add_marker('slow')


@pytest.fixture(autouse=True, scope='module')
def _strict_promotion():
  """Tests are strict. Doctests run with JAX's default, as a reader does."""
  jax.config.update('jax_numpy_dtype_promotion', 'strict')
  yield
  jax.config.update('jax_numpy_dtype_promotion', 'standard')


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """Frees what was compiled for a module: for all it would be some GB."""
  yield
  jax.clear_caches()


@contextlib.contextmanager
def optimizations(disabled):
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, disabled)
  yield
  jax.config.update(name, before)


@pytest.fixture
def compile_fast():
  """For programs that run for milliseconds and take seconds to compile."""
  with optimizations(disabled=True):
    yield


@pytest.fixture(scope='module')
def compile_module_fast():
  """The same for a whole module, with fixtures of that scope."""
  with optimizations(disabled=True):
    yield


@pytest.fixture
def optimized():
  """For what is measured of a program, such as its memory."""
  with optimizations(disabled=False):
    yield


@pytest.fixture
def data_dir(tmp_path):
  """A folder with random tokens for training and validation."""
  rng = np.random.default_rng(0)
  for name in ('train.bin', 'val.bin'):
    rng.integers(0, 64, 5000).astype(np.uint16).tofile(tmp_path / name)
  return str(tmp_path)
