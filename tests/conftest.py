"""What holds for every test and doctest: eight CPU devices, strict dtypes."""

import os

import jax
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
