"""What the benchmarks share: flags, and JSON files of results and versions.

records.write(path, cases=cases)
cases = records.read(path)['cases']
"""

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

OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write.')
SHOW = flags.DEFINE_string(
  'show', None, 'JSON file whose tables to print; nothing is measured.'
)


def check_only_flags(argv: list[str]) -> None:
  """Raises if the command line has arguments that are not flags.

  Args:
    argv: The program, and the arguments that absl did not take as flags.

  Raises:
    app.UsageError: If there are such arguments.
  """
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --output=f; got {argv[1:]}.'
    )


def write(path: str | os.PathLike[str], **results: Any) -> None:
  """Writes the command, the machine, the versions and the results.

  An existing file is replaced atomically.

  Args:
    path: The file.
    **results: Values that JSON can represent. Each entry of a list gets a line.
  """
  record = {
    'command': ' '.join(
      [f'python benchmarks/{pathlib.Path(sys.argv[0]).name}', *sys.argv[1:]]
    ),
    'machine': {
      'cores': os.cpu_count(),
      'architecture': platform.machine(),
      'backend': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
    },
    'versions': {
      'python': platform.python_version(),
      **{
        module.__name__: module.__version__
        for module in (jax, jaxlib, flax, optax, sophia_optax)
      },
    },
    **results,
  }
  lines = ',\n'.join(f'"{key}": {_lay_out(x)}' for key, x in record.items())
  part = pathlib.Path(f'{path}.part')
  part.write_text(f'{{\n{lines}\n}}\n')
  part.replace(path)


def _lay_out(value: Any) -> str:
  if isinstance(value, list):
    entries = ',\n'.join(json.dumps(x, ensure_ascii=False) for x in value)
    return f'[\n{entries}\n]'
  return json.dumps(value, indent=1, ensure_ascii=False)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the record in a file, results included."""
  return json.loads(pathlib.Path(path).read_text())
