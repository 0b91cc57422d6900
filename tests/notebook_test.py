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


def test_the_notebook_ran_and_shows_the_losses(notebook):
  code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in code]
  assert counts == list(range(1, len(code) + 1))
  outputs = list(itertools.chain.from_iterable(c['outputs'] for c in code))
  # Neither errors nor warnings.
  assert {output['name'] for output in outputs} == {'stdout'}
  printed = ''.join(itertools.chain.from_iterable(o['text'] for o in outputs))
  assert printed.count('step 0: loss 1.5\n') == 3
  assert printed.count('step 150: loss 0.2\n') == 3
