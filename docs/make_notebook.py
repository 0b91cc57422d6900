"""Writes examples/getting_started.ipynb from docs/getting-started.md.

python docs/make_notebook.py  # writes the cells and runs them
"""

import doctest
import pathlib
import re

PAGE = pathlib.Path(__file__).with_name('getting-started.md')
NOTEBOOK = PAGE.parents[1] / 'examples' / 'getting_started.ipynb'
_NOTE = (
  '*`make notebook` writes this from [the page](../docs/getting-started.md) of'
  ' the same name.*'
)


def _markdown(text: str) -> str:
  """Text of the page, with links that work from the notebook's folder."""
  text = re.sub(r'\]\((?!\w+:)', '](../docs/', text)
  return text.replace('../docs/../examples/', '').strip()


def _code(block: str) -> str:
  """The statements of a doctest block, without what they print."""
  examples = doctest.DocTestParser().get_examples(block)
  return ''.join(example.source for example in examples).strip()


def cells(page: str) -> list[tuple[str, str]]:
  """Returns the type and the source of each cell.

  Args:
    page: The page, with doctests in blocks of Python.
  """
  parts = re.split(r'```python\n(.*?)```\n', page, flags=re.DOTALL)
  found = [
    ('code', _code(part)) if i % 2 else ('markdown', _markdown(part))
    for i, part in enumerate(parts)
  ]
  found[0] = 'markdown', f'{found[0][1]}\n\n{_NOTE}'
  return [(kind, source) for kind, source in found if source]


def main():
  """Runs the notebook in a new kernel and writes it; an error in it is one."""
  import nbclient
  import nbformat

  make = {
    'code': nbformat.v4.new_code_cell,
    'markdown': nbformat.v4.new_markdown_cell,
  }
  notebook = nbformat.v4.new_notebook(
    cells=[
      make[kind](source, id=f'cell-{i}')  # Not random: runs can be compared.
      for i, (kind, source) in enumerate(cells(PAGE.read_text()))
    ],
    metadata={'kernelspec': {'display_name': 'Python 3', 'name': 'python3'}},
  )
  nbclient.NotebookClient(notebook, record_timing=False).execute()
  nbformat.write(notebook, NOTEBOOK)
  print(f'Wrote {NOTEBOOK}')


if __name__ == '__main__':
  main()
