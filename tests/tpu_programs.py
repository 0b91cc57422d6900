"""Compiles for TPUs, and prints what tests/tpu_test.py checks, as JSON.

It runs in a process of its own: environment variables have to be set before
JAX starts.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import hlo
import sophia_optax
import tpu_cases

DECISIONS = tpu_cases.DECISIONS
ESTIMATORS = {
  'H': sophia_optax.hutchinson_estimator_diag_hessian,
  'G': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}
chips = functools.cache(lambda: tpu_cases.devices('v5e:2x2'))


def predict(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def loss_fn(params, x):
  logits = predict(params, x)
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])


def make_step(tx, axis_name=None):
  tx = optax.with_extra_args_support(tx)

  def step(params, state, x, **decision):
    own, average = params, lambda g: g
    if axis_name:
      own = jax.lax.pcast(params, axis_name, to='varying')
      average = lambda g: jax.lax.pmean(g, axis_name)
    updates, state = tx.update(
      average(jax.grad(loss_fn)(own, x)),
      state,
      params,
      obj_fn=lambda p: loss_fn(p, x),
      predict_fn=lambda p: predict(p, x),
      **decision,
    )
    return optax.apply_updates(params, updates), state

  return step


def steps():
  """Returns what small train steps send and compute, by use of four chips."""
  shapes = {
    'a': jax.ShapeDtypeStruct((128, 256), jnp.float32),
    'b': jax.ShapeDtypeStruct((256, 128), jnp.float32),
  }
  batch = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  found = {}
  for way in 'jit', 'fsdp', 'explicit', 'shard_map':
    axis_type = AxisType.Explicit if way == 'explicit' else AxisType.Auto
    mesh = jax.make_mesh((4,), ('x',), devices=chips(), axis_types=(axis_type,))
    axis_name = 'x' if way == 'shard_map' else None
    options = {'axis_name': axis_name}
    optimizers = {'adamw': optax.adamw(1e-3)} | {
      name: sophia_optax.sophia(1e-3, hessian_diagonal_fn=estimator(**options))
      for name, estimator in ESTIMATORS.items()
    }
    for name, tx in optimizers.items():
      step = make_step(tx, axis_name)
      state = jax.eval_shape(tx.init, shapes)

      def placed(x, spec):
        return jax.ShapeDtypeStruct(
          x.shape,
          x.dtype,
          sharding=NamedSharding(mesh, spec),  # noqa: B023
        )

      def kept(x):
        is_matrix = way == 'fsdp' and x.ndim == 2  # noqa: B023
        return placed(x, P(None, 'x') if is_matrix else P())

      args = *jax.tree.map(kept, (shapes, state)), placed(batch, P('x'))
      found[f'{way}, {name}'] = programs = {}
      for program, decision in DECISIONS.items():
        if name == 'adamw' and program != 'one':
          continue
        fn = functools.partial(step, **decision)
        if way == 'shard_map':
          fn = jax.shard_map(
            fn, mesh=mesh, in_specs=(P(), P(), P('x')), out_specs=P()
          )
        with jax.set_mesh(mesh):
          lowered = jax.jit(fn, donate_argnums=(0, 1)).lower(*args)
        compiled = lowered.compile()
        text = compiled.as_text()
        sent = hlo.count_collectives(text)[0]
        programs[program] = {
          'conditionals': text.count(' conditional('),
          'flops': compiled.cost_analysis()['flops'],
          'sent': sorted(map(str, sent.elements())),
        }
  return found


def update():
  """Returns the temporary words of the update alone for each parameter."""
  found = {}
  for name, program in (
    ('optax.contrib.sophia, H', 'one'),
    ('sophia, H', 'ordinary'),
    ('sophia, H', 'refresh'),
    ('sophia, H, refresh first', 'one'),
    ('sophiaw, G', 'ordinary'),
  ):
    tx = tpu_cases.optimizers()[name]
    lowered = tpu_cases.lower_update(tx, **DECISIONS[program])
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    found[f'{name}, {program}'] = memory / (4 * 4 * tpu_cases.SIZE**2)
  return found


if __name__ == '__main__':
  print(json.dumps({'steps': steps(), 'update': update()}))
