"""examples/getting_started.ipynb is the page, and it ran."""

import itertools
import json
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAKER = runpy.run_path(str(ROOT / 'docs' / 'make_notebook.py'))


@pytest.fixture
def notebook():
  return json.loads(MAKER['NOTEBOOK'].read_text())


def test_the_notebook_is_the_page(notebook):
  found = [
    (cell['cell_type'], ''.join(cell['source'])) for cell in notebook['cells']
  ]
  assert found == MAKER['cells'](MAKER['PAGE'].read_text()), 'make notebook'


def test_the_notebook_ran_and_shows_the_plot(notebook):
  code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in code]
  assert counts == list(range(1, len(code) + 1))
  outputs = list(itertools.chain.from_iterable(c['outputs'] for c in code))
  assert sum('image/png' in output.get('data', {}) for output in outputs) == 1
  # Neither errors nor warnings.
  assert {o.get('name', 'plot') for o in outputs} == {'stdout', 'plot'}
  assert {o['output_type'] for o in outputs} == {'stream', 'execute_result'}
