"""Compares the picture of the modules in CONTRIBUTING.md with the sources."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def drawn_imports():
  """Returns the arrows of the picture: module -> modules that it imports."""
  text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
  picture = re.search(r'```mermaid\n(.*?)```', text, re.DOTALL)[1]
  imports = {name: set() for name in re.findall(r'^  (\w+)\[', picture, re.M)}
  for module, names in re.findall(r'^  (\w+) --> (.+)$', picture, re.M):
    imports[module] |= set(names.split(' & '))
  return imports


def real_imports():
  imports = {}
  for path in (ROOT / 'sophia_optax').glob('*.py'):
    imports[path.stem] = names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.ImportFrom) and node.module == 'sophia_optax':
        names |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module.startswith(
        'sophia_optax.'
      ):
        names.add(node.module.split('.')[1])
  return imports


def test_picture_is_true():
  real, drawn = real_imports(), drawn_imports()
  assert real.pop('__init__') > {'_alias', '_sophia'}
  # In the text below the picture.
  assert real.pop('flax') == set()
  assert drawn == real


def test_imports_have_no_cycles():
  real = real_imports()
  real.pop('__init__')
  while real:
    free = {name for name, names in real.items() if not names & set(real)}
    assert free, f'A circle among {sorted(real)}.'
    real = {name: real[name] for name in set(real) - free}
