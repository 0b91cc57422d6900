"""What a train step keeps and sends on each of many devices, beside AdamW's.

  python benchmarks/scaling.py --output=benchmarks/scaling.json
  python benchmarks/scaling.py --show=benchmarks/scaling.json

The train step of GPT-2 with 124M and with 1.5B parameters is compiled for
virtual CPU devices and never run; nothing is allocated. All figures are of one
device. MB are of the parameters, of the optimizer's state and of what the
compiled program needs beside its arguments and outputs (XLA's memory analysis).
Batches are of 512 sequences, micro-batches of 8 on each device; Sophia-H takes
its curvature from 64 sequences at once, Sophia-G from 256, in 4 parts or in 1.

Collectives, and the bytes that a device sends for them, are counted in the
optimized HLO, see hlo.py. Of a conditional the branch that sends least is an
ordinary step of Sophia, and the one that sends most one that refreshes the
curvature; the mean is ordinary + (refresh - ordinary) / k with k = 10.

Which collectives there are, and in which dtype they send, is up to the
compiler, here that for CPUs: GPUs' and TPUs' may choose otherwise.
"""

import collections
import math
import sys
import time
from typing import Any

from absl import app
from absl import flags
import jax
import tqdm

import hlo
import records

sys.path.append(records.EXAMPLES)
import gpt_configs
import sharding
import train_gpt

_QUICK = flags.DEFINE_bool(
  'quick', False, 'A tiny model on 8 devices: only to see that it runs.'
)

_MESHES = (
  'data:8',
  'fsdp:8',
  'data:2,fsdp:4',
  'data:64',
  'data:8,fsdp:8',
  'fsdp:64',
)
_MODELS = {
  'GPT-2 124M': {},
  'GPT-2 1.5B': {'num_layers': 48, 'width': 1600, 'num_heads': 25},
}
_TINY = {
  'vocab_size': 256,
  'block_size': 16,
  'num_layers': 3,
  'width': 64,
  'num_heads': 2,
}
# The paper's 480 sequences, of which 32 (H) or 240 (G) are for the curvature,
# can't be divided among 64 devices.
_BATCH_SIZE = 512
_ROWS = {
  'adamw': {'optimizer': 'adamw'},
  'sophia_h': {
    'optimizer': 'sophia_h',
    'curvature_batch_size': 64,
    'curvature_parts': 1,
  },
  'sophia_g': {
    'optimizer': 'sophia_g',
    'curvature_batch_size': 256,
    'curvature_parts': 4,
  },
  'sophia_g, 1 part': {
    'optimizer': 'sophia_g',
    'curvature_batch_size': 256,
    'curvature_parts': 1,
  },
}
_SEQUENCES = 8  # per device and micro-batch, as in gpt2_124m on one device


def largest_probe(text: str) -> int:
  """Returns the number of entries of the largest array of Rademacher draws."""
  _, computations = hlo.parse(text)
  return max(
    (
      hlo.size(shape)
      for instructions in computations.values()
      for instruction in instructions.values()
      if '(_rademacher)' in instruction.attributes
      for shape in hlo.arrays(instruction.shape)
    ),
    default=0,
  )


def make_config(row: str, mesh: str, **model: Any) -> gpt_configs.Config:
  """Returns GPT-2's settings, with batches that 8 and 64 devices divide."""
  return gpt_configs.get_config(
    'gpt2_124m',
    mesh=mesh,
    batch_size=_BATCH_SIZE,
    micro_batch_size=_SEQUENCES * math.prod(sharding.parse(mesh).values()),
    **_ROWS[row],
    **model,
  )


def compile_step(config: gpt_configs.Config):
  """Returns the compiled train step and the state that it is compiled for."""
  mesh = sharding.make_mesh(config.mesh)
  program = train_gpt.make_program(config, mesh)
  with jax.set_mesh(mesh):
    lowered = program.step.lower(program.state, program.batch)
  # The level is of the machine code, which never runs, and not of the HLO.
  return lowered.compile({'xla_backend_optimization_level': 0}), program.state


def _bytes_per_device(tree: Any) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def measure(config: gpt_configs.Config):
  """Returns the figures of a train step, and its collectives.

  Args:
    config: The settings, with a mesh.

  Returns:
    A dictionary for JSON, and what `hlo.count_collectives` returns.
  """
  jax.clear_caches()  # What another optimizer traced would be free here.
  start = time.perf_counter()
  compiled, state = compile_step(config)
  seconds = time.perf_counter() - start
  text = compiled.as_text()
  counts = hlo.count_collectives(text)
  figures = {
    'micro_batch_size': config.micro_batch_size,
    'update_interval': config.update_interval,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'bytes': {
      'parameters': _bytes_per_device(state.params),
      'optimizer state': _bytes_per_device(state.opt_state),
      'temporaries': compiled.memory_analysis().temp_size_in_bytes,
    },
    'entries': {
      'largest parameter': max(
        math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(state.params)
      ),
      'largest probe': largest_probe(text),
    },
    'compile seconds': round(seconds, 1),
  }
  for name, collectives in zip(('ordinary', 'refresh'), counts, strict=True):
    by_kind = {}
    for kind in hlo.KINDS:
      of_kind = collections.Counter(
        {c: n for c, n in collectives.items() if c.kind == kind}
      )
      if of_kind:
        by_kind[kind] = {
          'calls': of_kind.total(),
          'sent bytes': hlo.sent(of_kind),
        }
    figures[name] = {'sent bytes': hlo.sent(collectives), 'by kind': by_kind}
  return figures, counts


def describe(collectives: collections.Counter[hlo.Collective]) -> list[str]:
  """Returns lines such as '12 all-reduce of f32[8,4] over 8 devices'."""
  return [
    f'{n} {c.kind} of {" ".join(c.operands)} over {c.devices} devices'
    for c, n in collectives.items()
  ]


def render(cases: list[dict[str, Any]]) -> str:
  """Lays out a table for each model; a / b is ordinary / with a refresh."""

  def line(case, kinds, base):
    def pair(cell):
      cells = [cell(case[name]) for name in ('ordinary', 'refresh')]
      return ' / '.join(dict.fromkeys(cells))

    ordinary, refresh = (
      case[name]['sent bytes'] for name in ('ordinary', 'refresh')
    )
    mean = ordinary + (refresh - ordinary) / case['update_interval']
    return [
      f'{case["mesh"]} {case["row"]}',
      *(f'{size / 1e6:,.1f}' for size in case['bytes'].values()),
      *(
        pair(
          lambda step, kind=kind: str(
            step['by kind'].get(kind, {'calls': 0})['calls']
          )
        )
        for kind in kinds
      ),
      pair(lambda step: f'{step["sent bytes"] / 1e6:,.1f}'),
      f'{mean / base:.3f}',
    ]

  tables = []
  for model in dict.fromkeys(case['model'] for case in cases):
    of_model = [case for case in cases if case['model'] == model]
    base = {
      case['mesh']: case['ordinary']['sent bytes']
      for case in of_model
      if case['row'] == 'adamw'
    }
    kinds = [
      kind
      for kind in hlo.KINDS
      if any(kind in case['refresh']['by kind'] for case in of_model)
    ]
    lines = [
      [
        f'{model}: {of_model[0]["parameters"]:,}',
        'parameters MB',
        'state MB',
        'temporaries MB',
        *kinds,
        'sent MB',
        'mean/adamw',
      ],
      *(line(case, kinds, base[case['mesh']]) for case in of_model),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    layout = '  '.join(
      [f'{{:{widths[0]}}}', *(f'{{:>{w}}}' for w in widths[1:])]
    )
    tables.append('\n'.join(layout.format(*cells) for cells in lines))
  beyond = [
    f'{case["model"]} {case["mesh"]} {case["row"]}: {message}'
    for case in cases
    for message in case['ordinary']['beyond AdamW']
  ]
  tables.append(
    '\n'.join(
      ['Sent on an ordinary step and not by AdamW:', *(beyond or ['nothing'])]
    )
  )
  return '\n\n'.join(tables)


def main(argv):
  """Compiles, prints and writes."""
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --quick; got {argv[1:]}.')
  if records.SHOW.value:
    print(render(records.read(records.SHOW.value)['cases']))
    return
  meshes, models = _MESHES, _MODELS
  if _QUICK.value:
    meshes, models = ('data:2,fsdp:4',), {'tiny': _TINY}
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update(
    'jax_num_cpu_devices',
    max(math.prod(sharding.parse(mesh).values()) for mesh in meshes),
  )

  steps = [
    (model, mesh, row) for model in models for mesh in meshes for row in _ROWS
  ]
  cases = []
  for model, mesh, row in (bar := tqdm.tqdm(steps)):
    bar.set_description(f'{model} {mesh} {row}')
    figures, (ordinary, _) = measure(make_config(row, mesh, **models[model]))
    if row == 'adamw':  # The first on every mesh.
      base = ordinary
    figures['ordinary']['beyond AdamW'] = describe(ordinary - base)
    figures['ordinary']['AdamW only'] = describe(base - ordinary)
    cases.append({'model': model, 'mesh': mesh, 'row': row, **figures})
    if records.OUTPUT.value:
      records.write(
        records.OUTPUT.value, batch_size=_BATCH_SIZE, rows=_ROWS, cases=cases
      )
  print(render(cases))


if __name__ == '__main__':
  app.run(main)
