"""A GPT of a few thousand parameters, for the tests of the examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpt_configs
import gpt_program

SETTINGS = {
  'num_layers': 2,
  'num_heads': 2,
  'width': 16,
  'block_size': 8,
  'vocab_size': 64,
  'batch_size': 8,
  'micro_batch_size': 4,
  'eval_batches': 1,
  'warmup_steps': 2,
}
# With sequences for eight parts on eight devices.
DIVISIBLE = {
  'batch_size': 128,
  'micro_batch_size': 64,
  'curvature_fraction': 0.5,
}


def config(name='demo', **overrides):
  return dataclasses.replace(
    gpt_configs.CONFIGS[name], **(SETTINGS | overrides)
  )


def setup(config):
  """Returns functions that create the state and make a step."""
  model = gpt_program.make_model(config)
  optimizer = gpt_program.make_optimizer(config)
  return (
    gpt_program.make_init(config, model, optimizer),
    gpt_program.make_step(
      config, gpt_program.make_fns(config, model), optimizer
    ),
  )


def random_params(model):
  """Returns large parameters, so that every token and its position matters."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  rng = np.random.default_rng(5)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)


def let_optax_promote(monkeypatch):
  """Allows the example's optimizers, and nothing else, to promote dtypes.

  optax's schedules and adamw raise float32 to the power of an int32 count,
  which strict promotion forbids.
  """
  make_optimizer = gpt_program.make_optimizer

  def lenient(config):
    optimizer = make_optimizer(config)

    def update(*args, **kwargs):
      with jax.numpy_dtype_promotion('standard'):
        return optimizer.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)

  monkeypatch.setattr(gpt_program, 'make_optimizer', lenient)
