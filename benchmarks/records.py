"""What the benchmarks share: their main function, JSON files, and tables.

A benchmark is `records.main(measure, render)`. It measures and writes with
--output=FILE; with --show=FILE it prints the tables of that file.
"""

from collections.abc import Callable, Iterable
import json
import os
import pathlib
import platform
import sys
from typing import Any

from absl import app
from absl import flags
import flax
import jax
import jaxlib
import optax

import sophia_optax

# The benchmarks append this to sys.path, to import the examples.
EXAMPLES = str(pathlib.Path(__file__).parents[1] / 'examples')
_HEADER = 'command', 'machine', 'versions'

_OUTPUT = flags.DEFINE_string(
  'output', None, 'JSON file to write. What it contains is not measured again.'
)
_SHOW = flags.DEFINE_string(
  'show', None, 'JSON file whose tables to print; nothing is measured.'
)

Results = dict[str, Any]


def main(
  measure: Callable[[Results, Callable[[], None]], None],
  render: Callable[[Results], str],
) -> None:
  """Runs a benchmark from the command line.

  Args:
    measure: Takes the results in the output file (or {}), to which it adds, and
      a function that writes them.
    render: Lays out results in tables.
  """

  def run(argv):
    if len(argv) > 1:
      raise app.UsageError(
        f'Only flags are accepted, such as --output=f; got {argv[1:]}.'
      )
    path = _SHOW.value or _OUTPUT.value
    exists = _SHOW.value or (path and pathlib.Path(path).exists())
    results = read(path) if exists else {}
    if not _SHOW.value:
      measure(results, lambda: path and write(path, results))
    print(render(results))

  app.run(run)


def read(path: str | os.PathLike[str]) -> Results:
  """Returns the results in a file."""
  record = json.loads(pathlib.Path(path).read_text())
  return {key: x for key, x in record.items() if key not in _HEADER}


def write(path: str | os.PathLike[str], results: Results) -> None:
  """Writes the command, the machine, the versions and the results.

  An existing file is replaced atomically. Each entry of a list gets a line.
  """
  modules = jax, jaxlib, flax, optax, sophia_optax
  header = {
    'command': ' '.join(
      [f'python benchmarks/{pathlib.Path(sys.argv[0]).name}', *sys.argv[1:]]
    ),
    'machine': {
      'cores': os.cpu_count(),
      'architecture': platform.machine(),
      'backend': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
    },
    'versions': {'python': platform.python_version()}
    | {module.__name__: module.__version__ for module in modules},
  }
  record = (header | results).items()
  part = pathlib.Path(f'{path}.part')
  lines = ',\n'.join(f'"{key}": {_lay_out(x)}' for key, x in record)
  part.write_text(f'{{\n{lines}\n}}\n')
  part.replace(path)


def _lay_out(value: Any) -> str:
  if isinstance(value, list):
    entries = ',\n'.join(json.dumps(x, ensure_ascii=False) for x in value)
    return f'[\n{entries}\n]'
  return json.dumps(value, indent=1, ensure_ascii=False)


def table(lines: Iterable[Iterable[str]]) -> str:
  """Aligns cells: the first column left, the others right."""
  lines = [list(line) for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  layout = '  '.join([f'{{:{widths[0]}}}', *(f'{{:>{w}}}' for w in widths[1:])])
  return '\n'.join(layout.format(*line).rstrip() for line in lines)


def figures(
  title: str,
  rows: dict[str, dict[str, float]],
  digits: Callable[[str], int] = lambda column: 3,
) -> str:
  """Lays out figures by row and column, with so many digits in a column."""
  columns = list(max(rows.values(), key=len))
  lines = [[title, *columns]]
  for name, row in rows.items():
    cells = (f'{row[c]:.{digits(c)}f}' if c in row else '' for c in columns)
    lines.append([name, *cells])
  return table(lines)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Lays out a table of Markdown."""
  header = list(header)
  lines = [
    '|' + ''.join(f' {cell} |' if cell else ' |' for cell in cells)
    for cells in (header, *rows)
  ]
  return '\n'.join([lines[0], '|---' * len(header) + '|', *lines[1:]])
