"""Checks of the documentation site that `make docs` does not make."""

import difflib
import inspect
import pathlib
import re
import runpy

import jax
import pytest

import sophia_optax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
LOOPS = [ROOT / f'examples/{name}_loop.py' for name in ('adamw', 'sophia')]


def public_names(module):
  """Returns the names that a module defines or re-exports, without modules."""
  names = set()
  for name in dir(module):
    value = getattr(module, name)
    origin = getattr(value, '__module__', module.__name__)
    if not (
      name.startswith('_')
      or name == 'TYPE_CHECKING'
      or inspect.ismodule(value)
      or not origin.startswith('sophia_optax')
    ):
      names.add(name)
  return names


def documented_names(pages):
  """Returns, for each module, the names that pages document."""
  found, module = {}, None
  text = '\n'.join(page.read_text() for page in pages)
  for directive, name in re.findall(r'^\.\. (\w+):: (\S+)$', text, re.M):
    if directive == 'currentmodule':
      module = name
    else:
      found.setdefault(module, []).append(name)
  return found


def test_every_public_name_is_in_the_reference_once():
  documented = documented_names((DOCS / 'api').glob('*.md'))
  modules = sophia_optax, sophia_optax.likelihoods
  assert {name: sorted(names) for name, names in documented.items()} == {
    module.__name__: sorted(public_names(module)) for module in modules
  }


def test_pages_of_the_reference_begin_with_a_summary():
  for page in (DOCS / 'api').glob('*.md'):
    text = page.read_text()
    listed = re.findall(r'^   ([A-Za-z]\w+)$', text, re.M)
    documented = set().union(*documented_names([page]).values())
    # Sphinx would summarize BY_NAME by the docstring of dict.
    assert sorted(listed) == sorted(documented - {'BY_NAME'})
    assert f'<api/{page.stem}>' in (DOCS / 'api.md').read_text()


def test_every_page_is_in_the_table_of_contents_once():
  pages = {path.stem for path in DOCS.glob('*.md')} - {'index'}
  linked = re.findall(
    r'^[^|\n]*<([\w-]+)>$', (DOCS / 'index.md').read_text(), re.M
  )
  assert sorted(linked) == sorted(pages)


@pytest.mark.parametrize('page', ['README.md', 'docs/getting-started.md'])
def test_page_has_the_three_changes_from_adamw(page):
  adamw, sophia = (path.read_text().splitlines() for path in LOOPS)
  matcher = difflib.SequenceMatcher(None, adamw, sophia)
  changes = [op for op, *_ in matcher.get_opcodes() if op != 'equal']
  assert changes == ['insert', 'replace', 'replace']
  lines = [
    line
    for line in difflib.ndiff(adamw, sophia)
    if line[0] in '+-' and line[2:].strip()
  ]
  block = re.search(r'```diff\n(.*?)```', (ROOT / page).read_text(), re.S)
  assert block[1].splitlines() == [line[0] + line[2:] for line in lines]


@pytest.mark.parametrize('path', LOOPS, ids=lambda path: path.stem)
def test_both_loops_reduce_the_loss(path):
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    losses = runpy.run_path(str(path))['losses']
  assert losses[-1] < losses[0] / 5
