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

The others are of the whole train step of examples/train_gpt.py. All figures are
of one chip. Batches have 512 sequences, micro-batches at most 8 on each chip.
Sophia-H takes its curvature from 64 sequences, or one on each chip, Sophia-G
from 256, in parts of 64, or of one on each chip. `sophiaw` takes it from 128 in
8 parts. A program is `one` for all steps, or one of two, `ordinary` and
`refresh`. `sophia_h, rbg` draws its probes with such a key, `sophia_g, Gumbel`
its labels with jax.random.categorical.
Collectives and the bytes that they send are counted as hlo.py says. FLOPs are
XLA's, which counts a loop's body once, so compare them within a column only.
Seconds of compilation are of the processor, one sample each.
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

_COUNT = 4 * tpu_cases.SIZE**2  # parameters of the update alone
_K = 10  # steps from one refresh to the next
# Programs of an ordinary step and of a refresh.
_WAYS = {'one program': ('one', 'one'), 'two programs': ('ordinary', 'refresh')}


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
    'HBM bytes': pair(*map(round, hlo.traffic(text))),
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


def render_update(cases: list[dict]) -> str:
  """Lays out the table of the update alone; a / b is ordinary / refresh."""
  words = lambda n: n / (4 * _COUNT)
  programs = {(case['row'], case['program']): case for case in cases}
  header = ['words', 'refresh adds', 'alone', 'mean', 'temporaries']
  lines = [[f'update alone, {_COUNT:,} parameters', *header, 'compile s']]
  for row in dict.fromkeys(case['row'] for case in cases):
    estimator = row.split(', ')[1] if ', ' in row else ''
    alone = programs.get((f'{estimator} alone', 'one'))
    for way, names in _WAYS.items():
      if any((row, name) not in programs for name in names):
        continue
      first, second = (programs[row, name] for name in names)
      ordinary = words(first['HBM bytes'][0])
      added = words(second['HBM bytes'][-1]) - ordinary
      pair = [first] if first is second else [first, second]
      lines.append([
        f'{row}, {way}' if row.startswith('sophia') else row,
        f'{ordinary:.2f}',
        f'{added:.2f}' if added else '',
        f'{words(alone["HBM bytes"][0]):.2f}' if alone else '',
        f'{ordinary + added / _K:.2f}',
        _pair(f'{words(x["temporary bytes"]):.2f}' for x in pair),
        ' + '.join(f'{x["compile seconds"]:.0f}' for x in pair),
      ])  # fmt: skip
  return records.table(lines)


def render_step(table: str, cases: list[dict]) -> str:
  """Lays out a table of the train step; a / b is ordinary / refresh."""
  columns = ['temporaries MB', 'HBM MB', 'GFLOPs', 'sent MB']
  lines = [[table, *columns, *hlo.KINDS, 'compile s']]
  for case in cases:
    cells = [case.get('error', '')] + [''] * (len(lines[0]) - 2)
    if 'error' not in case:
      cells = [
        f'{case["temporary bytes"] / 1e6:,.0f}',
        _pair(f'{n / 1e6:,.0f}' for n in case['HBM bytes']),
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
  parts = []
  for table in dict.fromkeys(case['table'] for case in cases):
    of_table = [case for case in cases if case['table'] == table]
    is_update = table == 'update'
    parts.append(
      render_update(of_table) if is_update else render_step(table, of_table)
    )
  return '\n\n'.join(parts)


if __name__ == '__main__':
  _ONLY = flags.DEFINE_string('only', '', 'Part of the names of the cases.')
  records.main(measure_all, lambda results: render(results['cases']))
