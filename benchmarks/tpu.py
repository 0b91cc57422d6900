"""What a step costs for the compiler of TPUs, without a TPU.

  pip install '.[examples,tpu]'  # libtpu is for Linux on x86, 0.7 GB
  python benchmarks/tpu.py --output=benchmarks/tpu.json
  python benchmarks/tpu.py --output=benchmarks/tpu.json --only='124M, v5e-8'
  python benchmarks/tpu.py --show=benchmarks/tpu.json

Programs are compiled ahead of time for chips that are not there, and never run:
there are no times here but those of compilation. The programs are in
tpu_cases.py. The first command compiles all programs that the file does not
have, in minutes each; --only chooses those whose names contain a text.

The first table is of the update alone, on one chip of v5e: 67 million
parameters in 4 matrices of float32, parameters and state donated and returned
in the order in which they are taken.

The others are of the whole train step of examples/train_gpt.py. All figures are
of one chip. Batches have 512 sequences, micro-batches at most 8 on each chip.
Sophia-H takes its curvature from 64 sequences, or one on each chip, Sophia-G
from 256, in parts of 64, or of one on each chip. `sophiaw` takes it from 128 in
8 parts. A program is `one` for all steps, or one of two, `ordinary` and
`refresh`. `sophia_h, rbg` draws its probes with such a key, `sophia_g, Gumbel`
its labels with jax.random.categorical.
Collectives and the bytes that they send are counted as hlo.py says, a / b with
the branches that send least and most. Temporaries and FLOPs are XLA's, which
counts a loop's body once, so compare FLOPs within a column only. Seconds of
compilation are of the processor, one sample each.
"""

import collections
from collections.abc import Iterable
import importlib.metadata
import time
from typing import Any

from absl import app
from absl import flags
import jax
import tqdm

import hlo
import records
import tpu_cases


def measure(case: tpu_cases.Case) -> dict[str, Any]:
  """Compiles a case; returns its figures, or why there is no program.

  A list has the figure with the branches that cost least, and, if it is
  another one, with those that cost most.
  """
  names = {'table': case.table, 'row': case.row, 'program': case.program}
  jax.clear_caches()  # What another case traced would be free here.
  start = time.process_time()
  lowered = case.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return names | {'error': str(error).splitlines()[0]}
  seconds = time.process_time() - start
  text = compiled.as_text()
  collectives, sent = [], []
  for counts in hlo.count_collectives(text):
    kinds = collections.Counter()
    for collective, n in counts.items():
      kinds[collective.kind] += n
    collectives.append(kinds)
    sent.append(hlo.sent(counts))

  def pair(low, high):
    return [low] if low == high else [low, high]

  return names | {
    'compile seconds': round(seconds, 1),
    'temporary bytes': compiled.memory_analysis().temp_size_in_bytes,
    'FLOPs': compiled.cost_analysis()['flops'],
    'sent bytes': pair(*map(round, sent)),
    'collectives': pair(*collectives),
  }


def measure_all(results: records.Results, save) -> None:
  """Compiles the cases that are missing."""
  version = importlib.metadata.version('libtpu')
  if results.setdefault('libtpu', version) != version:
    raise app.UsageError(
      f'The output is of libtpu {results["libtpu"]}, and this is {version}.'
      ' Remove it, or write to another file.'
    )
  found = results['cases'] = results.pop('cases', [])
  cases = {case.name: case for case in tpu_cases.cases()}
  order = list(cases)
  name_of = lambda x: f'{x["table"]}, {x["row"]}, {x["program"]}'
  done = set(map(name_of, found))
  todo = [name for name in order if _ONLY.value in name and name not in done]
  for name in (bar := tqdm.tqdm(todo)):
    bar.set_description(name)
    found.append(measure(cases[name]))
    found.sort(key=lambda x: order.index(name_of(x)))
    save()


def _pair(cells: Iterable[str]) -> str:
  return ' / '.join(dict.fromkeys(cells))


def render_table(table: str, cases: list[dict]) -> str:
  """Lays out a table."""
  columns = ['temporaries MB', 'GFLOPs', 'sent MB']
  lines = [[table, *columns, *hlo.KINDS, 'compile s']]
  for case in cases:
    cells = [case.get('error', '')] + [''] * (len(lines[0]) - 2)
    if 'error' not in case:
      cells = [
        f'{case["temporary bytes"] / 1e6:,.0f}',
        f'{case["FLOPs"] / 1e9:,.0f}',
        _pair(f'{n / 1e6:,.0f}' for n in case['sent bytes']),
        *(
          _pair(str(x.get(kind, 0)) for x in case['collectives'])
          for kind in hlo.KINDS
        ),
        f'{case["compile seconds"]:.0f}',
      ]
    lines.append([f'{case["row"]}, {case["program"]}', *cells])
  return records.table(lines)


def render(cases: list[dict]) -> str:
  """Lays out all tables."""
  tables = {}
  for case in cases:
    tables.setdefault(case['table'], []).append(case)
  return '\n\n'.join(render_table(*item) for item in tables.items())


if __name__ == '__main__':
  _ONLY = flags.DEFINE_string('only', '', 'Part of the names of the cases.')
  records.main(measure_all, lambda results: render(results['cases']))
