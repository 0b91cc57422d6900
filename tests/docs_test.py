"""Checks of the documentation site that `make docs` does not make."""

import inspect
import pathlib
import re

import sophia_optax

DOCS = pathlib.Path(__file__).parents[1] / 'docs'


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


def documented_names(page):
  """Returns, for each module, the names that a page documents."""
  found, module = {}, None
  for directive, name in re.findall(r'^\.\. (\w+):: (\S+)$', page, re.M):
    if directive == 'currentmodule':
      module = name
    else:
      found.setdefault(module, []).append(name)
  return found


def test_every_public_name_is_in_the_reference_once():
  documented = documented_names((DOCS / 'api.md').read_text())
  modules = sophia_optax, sophia_optax.likelihoods
  assert {name: sorted(names) for name, names in documented.items()} == {
    module.__name__: sorted(public_names(module)) for module in modules
  }


def test_every_page_is_in_the_table_of_contents_once():
  pages = {path.stem for path in DOCS.glob('*.md')} - {'index'}
  linked = re.findall(
    r'^[^|\n]*<([\w-]+)>$', (DOCS / 'index.md').read_text(), re.M
  )
  assert sorted(linked) == sorted(pages)
