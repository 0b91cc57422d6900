"""BUILD lists all sources, tests and programs, with their imports."""

import ast
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import pathlib

import pytest
import starlark

ROOT = pathlib.Path(__file__).parents[1]
# The files that Bazel evaluates.
FILES = {
  file: (ROOT / file).read_text() for file in ('BUILD', 'tests/pytest.bzl')
}
# Folders of sources, and the entries of sys.path that they are imported from.
FOLDERS = {
  'benchmarks': 'benchmarks',
  'examples': 'examples',
  'sophia_optax': '.',
  'tests': 'tests',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A rule in BUILD. Other attributes are errors."""

  rule: str
  name: str
  srcs: Sequence[str] = ()
  data: Sequence[str] = ()
  deps: Sequence[str] = ()
  imports: Sequence[str] = ()
  args: Sequence[str] = ()
  main: str | None = None
  testonly: bool = False
  visibility: Sequence[str] = ()


def evaluate(files: dict[str, str]) -> dict[str, Target]:
  """Returns the targets of BUILD by name, from the texts of `FILES`."""
  targets = {}

  def make(rule):
    def add(**attributes):
      target = Target(rule=rule, **attributes)
      assert target.name not in targets, f'two targets {target.name}'
      targets[target.name] = target

    return add

  def load(label):
    if label != '@rules_python//python:defs.bzl':
      return run(label.removeprefix('//:'))
    rules = starlark.Module()
    for rule in ('py_binary', 'py_library', 'py_test'):
      rules.add_callable(rule, make(rule))
    return rules.freeze()

  def glob(include, exclude=()):
    def match(patterns):
      paths = itertools.chain.from_iterable(map(ROOT.glob, patterns))
      return {p.relative_to(ROOT).as_posix() for p in paths if p.is_file()}

    return sorted(match(include) - match(exclude))

  def run(file, **builtins):
    module = starlark.Module()
    for name, function in builtins.items():
      module.add_callable(name, function)
    starlark.eval(
      module,
      starlark.parse(file, files[file]),
      starlark.Globals.standard(),
      starlark.FileLoader(load),
    )
    return module.freeze()

  def ignore(*args, **kwargs):
    del args, kwargs

  run('BUILD', glob=glob, exports_files=ignore, licenses=ignore, package=ignore)
  return targets


@functools.cache
def imported(source: str) -> set[str]:
  """Returns the names of imported modules, and the names taken from them."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'imports are absolute here'
      names |= {node.module}
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      names |= {f'{node.value.id}.{node.attr}'}
  return names


def is_program(source: str) -> bool:
  return any(
    isinstance(node, ast.If) and '__name__' in ast.unparse(node.test)
    for node in ast.parse(source).body
  )


def read_sources() -> dict[str, str]:
  return {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in ROOT.glob(f'{folder}/**/*.py')
  }


def import_path(file: str) -> str:
  return FOLDERS[file.split('/')[0]]


def module_name(file: str) -> str:
  path = pathlib.PurePath(file).relative_to(import_path(file))
  return '.'.join(path.with_suffix('').parts).removesuffix('.__init__')


def closure(target: Target, targets: dict[str, Target]) -> list[Target]:
  """Returns the target and all its dependencies that exist."""
  found, left = {}, [target.name]
  while left:
    if (name := left.pop().removeprefix(':')) in targets.keys() - found.keys():
      found[name] = targets[name]
      left += targets[name].deps
  return list(found.values())


def missing_targets(targets, sources) -> Iterator[str]:
  """Returns the sources, tests and programs that are not in BUILD."""
  known = {file for target in targets.values() for file in target.srcs}
  for file, source in sources.items():
    if file not in known:
      yield f'{file} is in no srcs'
    if file.endswith('_test.py'):
      rule, main, args = 'py_test', 'tests/main.py', [file]
    elif not file.startswith('tests/') and is_program(source):
      rule, main, args = 'py_binary', file, []
    else:
      continue
    name = pathlib.PurePath(file).stem
    target = targets.get(name)
    if target is None or target.rule != rule:
      yield f'{file} has no {rule}'
    elif (target.main, list(target.args)) != (main, args):
      yield f'{name} does not run {file}'
    elif not {main, file} <= set(target.srcs):
      yield f'{name} does not have {main} and {file} in srcs'


def missing_entries(target, targets, sources) -> Iterator[str]:
  """Returns files of a target that do not exist, and dependencies it lacks."""
  for file in (*target.srcs, *target.data):
    if not (ROOT / file).is_file():
      yield f'{target.name}: there is no file {file}'
  for dep in target.deps:
    if dep.removeprefix(':') not in targets:
      yield f'{target.name}: there is no target {dep}'

  provided = closure(target, targets)
  srcs = {file for t in provided for file in t.srcs}
  paths = {path for t in provided for path in t.imports}
  if target.rule == 'py_test':
    # They give tests eight devices, and turn warnings into errors.
    files = srcs.union(*(t.data for t in provided))
    for file in {'pyproject.toml', 'tests/conftest.py'} - files:
      yield f'{target.name} lacks {file}'
  modules = {module_name(file): file for file in sources}
  for src in sources.keys() & set(target.srcs):
    needed = imported(sources[src]) & modules.keys()
    for name in needed:
      file = modules[name]
      if file not in srcs or import_path(file) not in paths:
        yield f'{target.name}: {src} imports {name}, which is not in deps'


def mistakes(files: dict[str, str]) -> list[str]:
  """Returns what is missing in BUILD and what is not needed."""
  targets, sources = evaluate(files), read_sources()
  return sorted(
    itertools.chain(
      missing_targets(targets, sources),
      *(missing_entries(t, targets, sources) for t in targets.values()),
    )
  )


def test_nothing_is_missing():
  assert not mistakes(FILES)


@pytest.mark.parametrize(('old', 'new', 'expected'), [
    ('"examples/text.py",', '', 'examples/text.py is in no srcs'),
    ('glob(["sophia_optax/*.py"])', 'glob(["sophia_optax/_*.py"])',
     'sophia_optax/flax.py is in no srcs'),
    ('"errors_test"', '"error_test"', 'tests/errors_test.py has no py_test'),
    ('args = [file]', 'args = ["tests/sophia_test.py"]',
     'errors_test does not run tests/errors_test.py'),
    ('srcs = [file, "tests/main.py"]', 'srcs = [file]',
     'errors_test does not have tests/main.py and tests/errors_test.py in'
     ' srcs'),
    ('[":conftest"] + deps', 'deps', 'errors_test lacks tests/conftest.py'),
    ('data = ["pyproject.toml"],', '', 'errors_test lacks pyproject.toml'),
    ('name = "step_cost"', 'name = "steps"',
     'benchmarks/step_cost.py has no py_binary'),
    ('main = "benchmarks/step_cost.py"', 'main = "examples/demo.py"',
     'step_cost does not run benchmarks/step_cost.py'),
    ('"docs/migrating.md"', '"docs/migration.md"',
     'migrating_test: there is no file docs/migration.md'),
    ('":digits"', '":digit"', 'digits_test: there is no target :digit'),
    ('":conformance",', '',
     'conformance_test: tests/conformance_test.py imports conformance, which'
     ' is not in deps'),
    ('imports = ["tests"],', '',
     'conformance_test: tests/conformance_test.py imports conformance, which'
     ' is not in deps'),
    ('deps = [":sophia_optax"],', '',
     'errors_test: tests/errors_test.py imports sophia_optax, which is not in'
     ' deps'),
    ('sophia_optax/*.py"]', 'sophia_optax/*.py"], ["sophia_optax/_checks.py"]',
     'sophia_optax: sophia_optax/_sophia.py imports sophia_optax._checks,'
     ' which is not in deps'),
])  # fmt: skip
def test_mistakes_are_found(old, new, expected):
  changed = {file: text.replace(old, new) for file, text in FILES.items()}
  assert changed != FILES
  assert expected in mistakes(changed)


@pytest.mark.parametrize(
  ('build', 'match'),
  [
    ('py_test(name = "a_test")', 'py_test. not found'),
    ('load("@rules_python//python:defs.bzl", "py_tests")', 'no symbol'),
    (
      'load("@rules_python//python:defs.bzl", "py_test")\n'
      'py_test(name = "a_test", dep = [])',
      "unexpected keyword .*'dep'",
    ),
  ],
)
def test_what_bazel_would_not_evaluate(build, match):
  with pytest.raises(starlark.StarlarkError, match=match):
    evaluate({'BUILD': build})


def test_all_kinds_of_imports():
  assert imported("""
import digits as d
if True:
  from sophia_optax import _gamma
def later():
  import gpt, sophia_optax.likelihoods
""") == {
    'digits',
    'gpt',
    'sophia_optax',
    'sophia_optax._gamma',
    'sophia_optax.likelihoods',
  }
