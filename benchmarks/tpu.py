"""What a step costs for the compiler of TPUs, without a TPU.

  pip install '.[examples,tpu]'  # libtpu is for Linux on x86, 0.7 GB
  python benchmarks/tpu.py --output=benchmarks/tpu.json
  python benchmarks/tpu.py --show=benchmarks/tpu.json

Programs are compiled ahead of time for chips that are not there, and never run:
there are no times here but those of compilation. A case that --output has is
not compiled again; --only chooses cases by a part of their names.

The first table is of the update alone, on one chip of v5e: 67 million
parameters in 4 matrices of float32, parameters and state donated and returned
in the order in which they are taken. Words are what HBM is read and written
for each parameter, 4 bytes each, counted in the optimized HLO as hlo.py says.
In one program, whose conditional decides, an ordinary step takes the branch
that moves least and a refresh the one that moves most. In two programs each is
compiled for itself. "refresh adds" is what a refresh moves more than an
ordinary step, the estimator included; "alone" is the estimator compiled for
itself, from parameters to estimate. Its batch is 8 rows, so that what it moves
is little beside the parameters. Temporaries are those of XLA's memory
analysis, in copies of the parameters. The mean is ordinary + (refresh -
ordinary) / k with k = 10.

The second table is of the whole train step of examples/train_gpt.py, the
ordinary step and the refresh compiled as two programs, and as one. All figures
are of one chip. Batches have 512 sequences, micro-batches at most 8 on each
chip; Sophia-H takes its curvature from 64 sequences, Sophia-G from 256, each in
parts of one sequence or more on a chip. Collectives and the bytes that they
send are counted as hlo.py says. FLOPs are XLA's, which counts a loop's body
once, so compare them within a column only.
"""

import collections
from collections.abc import Callable
import importlib.metadata
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

# Before JAX: it is not to look for a TPU here.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'

from absl import app
from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import optax
import tqdm

import hlo
import records
import sophia_optax

sys.path.append(records.EXAMPLES)
import gpt_configs
import sharding
import train_gpt

_ONLY = flags.DEFINE_string('only', '', 'Part of the names of the cases.')
_SIZE = flags.DEFINE_integer('size', 4096, 'Rows and columns of a matrix.')

_K = 10  # steps from one refresh to the next
# What the compiler calls the chips, and how many there are.
TOPOLOGIES = {
  'v5e-8': ('v5e:2x4', 8),
  'v5e-64': ('v5e:8x8', 64),
  'v5e-256': ('v5e:16x16', 256),
  'v5p-64': ('v5:4x4x4', 64),
  'v6e-256': ('v6e:16x16', 256),
}
_MODELS = {
  '124M': {},
  '124M, 8 head chunks': {'head_chunks': 8},
  '1.5B': {'num_layers': 48, 'width': 1600, 'num_heads': 25},
}
_BATCH_SIZE = 512
# Curvature's sequences and what a part of them has at least.
_CURVATURE = {'sophia_h': (64, 64), 'sophia_g': (256, 64)}


class Case(NamedTuple):
  """A program to compile: its names, and what lowers it."""

  table: str
  row: str
  program: str  # one, ordinary, refresh, alone
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
  h = sophia_optax.hutchinson_estimator_diag_hessian()
  g = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian()
  squares = sophia_optax.squared_gradient_estimator_diag_hessian(1)
  sophia = sophia_optax.sophia
  return {
    'optax.adamw': optax.adamw(1e-3),
    'optax.contrib.sophia, H': optax.contrib.sophia(1e-3),
    'sophia, g²': sophia(1e-3, hessian_diagonal_fn=squares),
    'sophia, H': sophia(1e-3, hessian_diagonal_fn=h),
    'sophia, G': sophia(1e-3, hessian_diagonal_fn=g),
    'sophia, H, refresh first': sophia(
      1e-3, hessian_diagonal_fn=h, refresh_before_update=True
    ),
    'H alone': h,
    'G alone': g,
  }


def lower_update(tx: optax.GradientTransformation, size: int, **decision: Any):
  """Lowers an update, or, if it has no moments, an estimate."""
  tx = optax.with_extra_args_support(tx)
  inputs = jnp.ones((8, size))
  params = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 4
  state = jax.eval_shape(tx.init, params)

  def predict(params):
    return sum(jnp.tanh(inputs @ w) for w in params)

  def extra_args():
    return {
      'obj_fn': lambda params: jnp.mean(jax.nn.logsumexp(predict(params), -1)),
      'predict_fn': predict,
    }

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params, **extra_args(), **decision)
    return optax.apply_updates(params, updates), state

  def estimate(params, state):
    return tx.update(None, state, params, **extra_args())

  chip = jax.sharding.SingleDeviceSharding(devices('v5e:2x2')[0])
  if isinstance(state, sophia_optax.HutchinsonState):
    return jax.jit(estimate).lower(*placed((params, state), chip))
  return jax.jit(step, donate_argnums=(0, 1)).lower(
    *placed((params, state, params), chip)
  )


def make_config(model: str, optimizer: str, mesh: str) -> gpt_configs.Config:
  """Returns GPT-2's settings, with batches that the chips divide."""
  count = math.prod(sharding.parse(mesh).values())
  curvature = {}
  if optimizer in _CURVATURE:
    total, part = _CURVATURE[optimizer]
    total, part = max(total, count), max(part, count)
    curvature = {
      'curvature_batch_size': total,
      'curvature_parts': total // part,
    }
  return gpt_configs.get_config(
    'gpt2_124m',
    optimizer,
    mesh=mesh,
    batch_size=_BATCH_SIZE,
    micro_batch_size=min(8 * count, _BATCH_SIZE),
    **curvature,
    **_MODELS[model],
  )


def lower_step(config: gpt_configs.Config, topology: str, **decision: Any):
  """Lowers the train step of a GPT on a mesh of a topology's chips."""
  axes = sharding.parse(config.mesh)
  mesh = jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=devices(topology),
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
  )
  program = train_gpt.make_program(config, mesh)
  with jax.set_mesh(mesh):
    return program.step.lower(program.state, program.batch, **decision)


def cases(size: int) -> list[Case]:
  """Returns all cases, the update alone first."""
  decisions = {
    'one': {},
    'ordinary': {'refresh': False},
    'refresh': {'refresh': True},
  }
  found = []
  for row, tx in optimizers().items():
    for program, decision in decisions.items():
      if row.startswith('sophia') or program == 'one':
        found.append(
          Case(
            'update',
            row,
            program,
            lambda tx=tx, d=decision: lower_update(tx, size, **d),
          )
        )
  for chips, (topology, count) in TOPOLOGIES.items():
    meshes = [f'data:{count}', f'fsdp:{count}', f'data:{count // 4},fsdp:4']
    for model in _MODELS:
      for mesh in meshes:
        for optimizer in ('adamw', 'sophia_h', 'sophia_g'):
          for program, decision in decisions.items():
            if optimizer == 'adamw' and program != 'one':
              continue

            def lower(
              model=model,
              optimizer=optimizer,
              mesh=mesh,
              topology=topology,
              decision=decision,
            ):
              config = make_config(model, optimizer, mesh)
              return lower_step(config, topology, **decision)

            table = f'{model}, {chips}'
            found.append(Case(table, f'{mesh} {optimizer}', program, lower))
  return found


def measure(case: Case) -> dict[str, Any]:
  """Compiles a case; returns its figures, or why there is no program."""
  jax.clear_caches()  # What another case traced would be free here.
  start = time.process_time()
  lowered = case.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {'error': str(error).splitlines()[0]}
  seconds = time.process_time() - start
  text = compiled.as_text()
  figures = {
    'compile seconds': round(seconds, 1),
    'temporary bytes': compiled.memory_analysis().temp_size_in_bytes,
    'FLOPs': compiled.cost_analysis()['flops'],
    'HBM bytes': hlo.traffic(text),
    'conditionals': text.count(' conditional('),
  }
  for name, counts in zip(
    ('ordinary', 'refresh'), hlo.count_collectives(text), strict=True
  ):
    kinds = collections.Counter()
    for collective, n in counts.items():
      kinds[collective.kind] += n
    figures[name] = {'collectives': kinds, 'sent bytes': hlo.sent(counts)}
  return figures


def _programs(cases: list[dict]) -> dict[str, dict[str, dict]]:
  """Returns figures by row and program."""
  found: dict[str, dict[str, dict]] = {}
  for case in cases:
    found.setdefault(case['row'], {})[case['program']] = case
  return found


def _ways(programs: dict[str, dict]):
  """Yields (name, ordinary, refresh) for one program and for two.

  A pair is of figures, with `words` of the bytes that a step moves.
  """
  for name, pair in (
    ('one program', ('one', 'one')),
    ('two programs', ('ordinary', 'refresh')),
  ):
    if all(program in programs for program in pair):
      yield (
        name,
        *(
          programs[program]
          | {
            'moved': programs[program].get('HBM bytes', (0, 0))[i],
            'sent': programs[program].get(step, {}),
          }
          for i, (program, step) in enumerate(
            zip(pair, ('ordinary', 'refresh'), strict=True)
          )
        ),
      )


def _table(lines: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  layout = '  '.join([f'{{:{widths[0]}}}', *(f'{{:>{w}}}' for w in widths[1:])])
  return '\n'.join(layout.format(*line).rstrip() for line in lines)


def _pair(low: str, high: str) -> str:
  return ' / '.join(dict.fromkeys((low, high)))


def render_update(cases: list[dict], size: int) -> str:
  """Lays out the table of the update alone; a / b is ordinary / refresh."""
  count = 4 * size**2
  words = lambda n: f'{n / (4 * count):.2f}'
  found = _programs(cases)
  lines = [
    [
      f'update alone, {count:,} parameters',
      'words',
      'refresh adds',
      'alone',
      'mean',
      'temporaries',
      'compile s',
    ]
  ]
  for row, programs in found.items():
    alone = found.get(f'{row.split(", ")[1]} alone') if ', ' in row else None
    for way, ordinary, refresh in _ways(programs):
      added = refresh['moved'] - ordinary['moved']
      seconds = [f'{x["compile seconds"]:.0f}' for x in (ordinary, refresh)]
      lines.append(
        [
          f'{row}, {way}' if row.startswith('sophia') else row,
          words(ordinary['moved']),
          words(added) if added else '',
          words(alone['one']['HBM bytes'][0]) if alone else '',
          words(ordinary['moved'] + added / _K),
          _pair(*(words(x['temporary bytes']) for x in (ordinary, refresh))),
          ' + '.join(seconds if 'two' in way else seconds[:1]),
        ]
      )
  return _table(lines)


def render_step(table: str, cases: list[dict]) -> str:
  """Lays out a table of the train step; a / b is ordinary / refresh."""
  lines = [
    [
      table,
      'temporaries MB',
      'HBM MB',
      'GFLOPs',
      'sent MB',
      *hlo.KINDS,
      'compile s',
    ]
  ]
  for row, programs in _programs(cases).items():
    for way, *pair in _ways(programs):
      name = row if 'adamw' in row else f'{row}, {way}'
      if errors := [x['error'] for x in pair if 'error' in x]:
        lines.append([name, errors[0], *[''] * (len(lines[0]) - 2)])
        continue
      seconds = [f'{x["compile seconds"]:.0f}' for x in pair]
      lines.append(
        [
          name,
          _pair(*(f'{x["temporary bytes"] / 1e6:,.0f}' for x in pair)),
          _pair(*(f'{x["moved"] / 1e6:,.0f}' for x in pair)),
          _pair(*(f'{x["FLOPs"] / 1e9:,.0f}' for x in pair)),
          _pair(*(f'{x["sent"]["sent bytes"] / 1e6:,.0f}' for x in pair)),
          *(
            _pair(*(str(x['sent']['collectives'].get(kind, 0)) for x in pair))
            for kind in hlo.KINDS
          ),
          ' + '.join(seconds if 'two' in way else seconds[:1]),
        ]
      )
  return _table(lines)


def render(record: dict[str, Any]) -> str:
  """Lays out all tables."""
  tables: dict[str, list[dict]] = {}
  for case in record['cases']:
    tables.setdefault(case['table'], []).append(case)
  return '\n\n'.join(
    [
      render_update(of_table, record['size'])
      if table == 'update'
      else render_step(table, of_table)
      for table, of_table in tables.items()
    ]
  )


def main(argv):
  """Compiles, prints and writes."""
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --only=update; got {argv[1:]}.')
  if records.SHOW.value:
    print(render(records.read(records.SHOW.value)))
    return
  output = records.OUTPUT.value
  record = {
    'libtpu': importlib.metadata.version('libtpu'),
    'size': _SIZE.value,
    'cases': [],
  }
  if output and pathlib.Path(output).exists():
    before = records.read(output)
    if {key: before[key] for key in ('libtpu', 'size')} != {
      key: record[key] for key in ('libtpu', 'size')
    }:
      raise app.UsageError(
        f'{output} is of libtpu {before["libtpu"]} and size {before["size"]}.'
        ' Remove it, or write to another file.'
      )
    record['cases'] = before['cases']
  order = cases(_SIZE.value)
  names = [case.name for case in order]
  key = lambda found: names.index(
    f'{found["table"]}, {found["row"]}, {found["program"]}'
  )
  done = {key(found) for found in record['cases']}
  todo = [
    case
    for i, case in enumerate(order)
    if i not in done and _ONLY.value in case.name
  ]
  for case in (bar := tqdm.tqdm(todo)):
    bar.set_description(case.name)
    names_of_case = {
      'table': case.table,
      'row': case.row,
      'program': case.program,
    }
    record['cases'].append(names_of_case | measure(case))
    record['cases'].sort(key=key)
    if output:
      records.write(output, **record)
  print(render(record))


if __name__ == '__main__':
  app.run(main)
