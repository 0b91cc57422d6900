"""Eight CPU devices and strict dtypes for all tests and doctests; fixtures."""

import os

import jax
import numpy as np
import pytest

# Set JAX_PLATFORMS to run the tests on an accelerator.
jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture
def compile_fast():
  """For programs that run for milliseconds and take seconds to compile."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def data_dir(tmp_path):
  """A folder with random tokens for training and validation."""
  rng = np.random.default_rng(0)
  for name in ('train.bin', 'val.bin'):
    rng.integers(0, 64, 5000).astype(np.uint16).tofile(tmp_path / name)
  return str(tmp_path)
