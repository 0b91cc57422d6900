"""The programs of tpu.py, and how each is lowered.

A case is named by its table, its row there, and the program: `one` for all
steps, whose conditional decides, or `ordinary` and `refresh`, which is what
`update(..., refresh=...)` gives. Nothing here is compiled.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import os
import sys
from typing import Any, NamedTuple

# Before JAX: it is not to look for a TPU here.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import optax

import records
import sophia_optax

sys.path.append(records.EXAMPLES)
import gpt_configs
import gpt_program
import sharding

SIZE = 4096  # rows and columns of a matrix of the update alone
# A program: what it passes to the optimizer.
DECISIONS = {
  'one': {},
  'ordinary': {'refresh': False},
  'refresh': {'refresh': True},
}
# What the compiler calls the chips.
_TOPOLOGIES = {'v5e-8': 'v5e:2x4', 'v5e-64': 'v5e:8x8', 'v5e-256': 'v5e:16x16'}
_MODELS = {
  '124M': {},
  '124M, 8 head chunks': {'head_chunks': 8},
  '1.5B': {'num_layers': 48, 'width': 1600, 'num_heads': 25},
}
# Train steps: model, chips, and mesh, whose axes are one or more of the chips'.
_STEPS = (
  ('124M', 'v5e-8', 'data:8'),
  ('124M', 'v5e-8', 'fsdp:8'),
  ('124M, 8 head chunks', 'v5e-8', 'fsdp:8'),
  ('124M', 'v5e-64', 'fsdp:64'),
  ('124M', 'v5e-64', 'data:8,fsdp:8'),
  ('1.5B', 'v5e-64', 'fsdp:64'),
  ('124M', 'v5e-256', 'data:16,fsdp:16'),
  ('1.5B', 'v5e-256', 'data:16,fsdp:16'),
)
# Their programs. An ordinary step is the same with every estimator.
_PROGRAMS = (
  ('adamw', 'one'),
  ('sophia_h', 'ordinary'),
  ('sophia_h', 'refresh'),
  ('sophia_g', 'refresh'),
)
# Programs of the first mesh with FSDP beside these.
_MORE_PROGRAMS = (
  ('sophia_h', 'one'),
  ('sophia_h, rbg', 'refresh'),
  ('sophia_g', 'one'),
  ('sophia_g, Gumbel', 'refresh'),
  ('sophiaw', 'one'),
  ('sophiaw', 'ordinary'),
  ('sophiaw', 'refresh'),
  ('sophiaw, eigenbasis', 'ordinary'),
  ('sophiaw, eigenbasis', 'refresh'),
)
_BATCH_SIZE = 512
_H = sophia_optax.hutchinson_estimator_diag_hessian
_G = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
_GUMBEL = sophia_optax.likelihoods.Likelihood(
  jax.random.categorical, sophia_optax.likelihoods.categorical.score, 1
)
# Estimators that train_gpt.py does not have, and their number of sequences.
_ESTIMATORS = {
  'sophia_h': (_H, 64),
  'sophia_h, rbg': (lambda: _H(jax.random.key(0, impl='rbg')), 64),
  'sophia_g': (_G, 256),
  'sophia_g, Gumbel': (lambda: _G(likelihood=_GUMBEL), 256),
}


class Case(NamedTuple):
  """A program to compile: its names, and what lowers it."""

  table: str
  row: str
  program: str  # a key of DECISIONS
  lower: Callable[[], Any]

  @property
  def name(self) -> str:
    """All three names."""
    return f'{self.table}, {self.row}, {self.program}'


def devices(topology_name: str):
  """Returns the chips of a topology such as 'v5e:2x4'."""
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology_name
  ).devices


def placed(tree: Any, sharding: Any):
  """Returns shapes and dtypes with a sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def optimizers() -> dict[str, optax.GradientTransformation]:
  """The rows of the update alone."""
  return {
    'optax.adamw': optax.adamw(1e-3),
    'optax.contrib.sophia, H': optax.contrib.sophia(1e-3),
    'sophia, H': sophia_optax.sophia(1e-3),
    'sophia, H, refresh first': sophia_optax.sophia(
      1e-3, refresh_before_update=True
    ),
    'sophiaw, G': sophia_optax.sophiaw(1e-3),
  }


def lower_update(tx: optax.GradientTransformation, **decision: Any):
  """Lowers the update alone."""
  tx = optax.with_extra_args_support(tx)
  inputs = jnp.ones((8, SIZE))
  params = [jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)] * 4
  state = jax.eval_shape(tx.init, params)

  def predict(params):
    return sum(jnp.tanh(inputs @ w) for w in params)

  fns = {
    'obj_fn': lambda params: jnp.mean(jax.nn.logsumexp(predict(params), -1)),
    'predict_fn': predict,
  }

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params, **fns, **decision)
    return optax.apply_updates(params, updates), state

  chip = jax.sharding.SingleDeviceSharding(devices('v5e:2x2')[0])
  return jax.jit(step, donate_argnums=(0, 1)).lower(
    *placed((params, state, params), chip)
  )


def make_config(model: str, optimizer: str, mesh: str) -> gpt_configs.Config:
  """Returns GPT-2's settings, with batches that the chips divide."""
  count = math.prod(sharding.parse(mesh).values())
  return dataclasses.replace(
    gpt_configs.CONFIGS['gpt2_124m'],
    optimizer='sophia_g' if optimizer.startswith('sophiaw') else 'adamw',
    eigenbasis=optimizer.endswith('eigenbasis'),
    mesh=mesh,
    batch_size=_BATCH_SIZE,
    micro_batch_size=min(8 * count, _BATCH_SIZE),
    **_MODELS[model],
  )


def make_optimizer(optimizer: str, config: gpt_configs.Config):
  """Returns one that train_gpt.py does not have, or None."""
  if optimizer not in _ESTIMATORS:
    return None
  make, size = _ESTIMATORS[optimizer]
  part = max(64, math.prod(sharding.parse(config.mesh).values()))
  size = max(size, part)
  chunks = config.head_chunks > 1 and optimizer == 'sophia_g'
  inner = make(**{'num_chunks': config.head_chunks} if chunks else {})
  inner = sophia_optax.microbatched(inner, size // part)

  def estimate(updates, state, params=None, *, batch, **extra_args):
    tokens = sharding.divide(batch[:: len(batch) // size])
    return inner.update(updates, state, params, batch=tokens, **extra_args)

  estimator = optax.GradientTransformationExtraArgs(inner.init, estimate)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    sophia_optax.sophia(1e-3, hessian_diagonal_fn=estimator),
  )


def make_mesh(spec: str, topology: str) -> jax.sharding.Mesh:
  """Returns a mesh such as 'data:2,fsdp:4' of a topology's first chips."""
  axes = sharding.parse(spec)
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=devices(topology)[: math.prod(axes.values())],
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
  )


def lower_step(
  model: str, optimizer: str, mesh: str, topology: str, **decision: Any
):
  """Lowers the train step of a GPT on a mesh of a topology's chips."""
  config = make_config(model, optimizer, mesh)
  chips = make_mesh(mesh, topology)
  program = gpt_program.make_program(
    config, chips, make_optimizer(optimizer, config)
  )
  with jax.set_mesh(chips):
    return program.step.lower(program.state, program.batch, **decision)


def cases() -> list[Case]:
  """Returns all cases, the update alone first."""
  found = []

  def add(table, row, program, lower, *args):
    run = functools.partial(lower, *args, **DECISIONS[program])
    found.append(Case(table, row, program, run))

  for row, tx in optimizers().items():
    for program in DECISIONS if row.startswith('sophia') else ('one',):
      add('update', row, program, lower_update, tx)
  for model, chips, mesh in _STEPS:
    is_first = (model, mesh) == ('124M', 'fsdp:8')
    for optimizer, program in _PROGRAMS + _MORE_PROGRAMS * is_first:
      row = f'{mesh} {optimizer}'
      step = model, optimizer, mesh, _TOPOLOGIES[chips]
      add(f'{model}, {chips}', row, program, lower_step, *step)
  return found
