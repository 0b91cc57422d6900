"""What holds for every test and doctest: eight CPU devices, strict dtypes."""

import os

import jax

# Set JAX_PLATFORMS to run the tests on an accelerator.
jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
