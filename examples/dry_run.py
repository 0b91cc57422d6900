"""FLOPs and memory of a training step, without running it."""

import math

import jax
from jax.extend import core


def _sub_jaxprs(equation):
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _count(jaxpr):
  fewest, most = 0, 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      lhs = equation.invars[0].aval.shape
      terms = math.prod(lhs[axis] for axis in contracted)
      flops = 2 * terms * equation.outvars[0].aval.size
      fewest, most = fewest + flops, most + flops
      continue
    counts = [_count(sub) for sub in _sub_jaxprs(equation)]
    if not counts:
      continue
    if equation.primitive.name == 'cond':
      fewest += min(low for low, _ in counts)
      most += max(high for _, high in counts)
    else:
      times = equation.params.get('length', 1)  # of a scan
      fewest += times * sum(low for low, _ in counts)
      most += times * sum(high for _, high in counts)
  return fewest, most


def matmul_flops(fn, *args) -> tuple[int, int]:
  """Counts the FLOPs of the matrix products of a function.

  XLA's cost analysis counts the body of a loop once, for any number of
  iterations, so it would count one layer and one micro-batch of a scan. This
  function walks through the jaxpr and multiplies a scan's body by its length.
  Element-wise operations, a few per cent, are not counted, as is usual for
  utilization.

  Args:
    fn: function to trace.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    (fewest, most) FLOPs, for the cheapest and the most expensive branch of each
    `jax.lax.cond`. With Sophia, the first is an ordinary step and the second
    one that refreshes the curvature.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _bytes_per_device(tree):
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def report(config, step, state, batch) -> str:
  """Describes a step: shapes, parameters, FLOPs and bytes per device.

  Args:
    config: a `gpt_configs.Config`.
    step: the jitted function (state, batch) -> (state, metrics).
    state: a `gpt_program.State` of `jax.ShapeDtypeStruct`s with shardings.
    batch: the batch, a `jax.ShapeDtypeStruct` with a sharding.

  Returns:
    Several lines of text.
  """
  lines = ['parameters:']
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    lines.append(f'  {name:36} {leaf.dtype.name:9} {leaf.shape}')
  lines.append(
    f'batch: {batch.dtype.name} {batch.shape}, '
    f'{config.tokens_per_step:,} predictions a step'
  )
  count = sum(x.size for x in jax.tree.leaves(state.params))
  lines.append(f'parameter count: {count:,}')

  ordinary, refresh = matmul_flops(step, state, batch)
  lines.append(f'FLOPs a step (matrix products): {ordinary:.4e}')
  if refresh != ordinary:
    mean = ordinary + (refresh - ordinary) / 10
    lines.append(
      f'  with a curvature refresh: {refresh:.4e}; on average over 10 steps: '
      f'{mean:.4e} ({mean / ordinary:.3f} x)'
    )

  memory = step.lower(state, batch).compile().memory_analysis()
  lines.append(
    f'bytes on each of {batch.sharding.num_devices} devices, '
    f'compiled for {jax.default_backend()}:'
  )
  for name, size in (
    ('parameters', _bytes_per_device(state.params)),
    ('optimizer state', _bytes_per_device(state.opt_state)),
    ('batch', _bytes_per_device(batch)),
    ('temporaries', memory.temp_size_in_bytes),
  ):
    lines.append(f'  {name:16} {size:16,}')
  return '\n'.join(lines)
