"""Checks of the documentation site that `make docs` does not make."""

import inspect
import pathlib
import re
import types

import pytest

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


def linked_pages(index):
  return re.findall(r'^[^|\n]*<([\w-]+)>$', index, re.M)


@pytest.mark.parametrize(
  'module', [sophia_optax, sophia_optax.likelihoods], ids=lambda m: m.__name__
)
def test_every_public_name_is_in_the_reference_once(module):
  documented = documented_names((DOCS / 'api.md').read_text())
  assert sorted(documented[module.__name__]) == sorted(public_names(module))


def test_the_reference_has_no_other_modules():
  documented = documented_names((DOCS / 'api.md').read_text())
  assert documented.keys() == {'sophia_optax', 'sophia_optax.likelihoods'}


def test_every_page_is_in_the_table_of_contents_once():
  pages = {path.stem for path in DOCS.glob('*.md')} - {'index'}
  assert sorted(linked_pages((DOCS / 'index.md').read_text())) == sorted(pages)


def test_a_name_without_a_page_is_found():
  module = types.ModuleType('sophia_optax.later')
  exec('def new(): pass\ndef _helper(): pass\nNUMBERS = {}', vars(module))
  assert public_names(module) == {'new', 'NUMBERS'}
