"""Counts the bytes that each device sends in one run of a compiled program.

Read is the optimized HLO, `compiled.as_text()`. The walk starts at the entry
computation, takes the body of a loop as often as XLA knows it to run, and of a
conditional the branch that sends least and the one that sends most.

Bytes sent are those of a ring. With n devices in a group and S bytes of the
whole array, summed over the arrays of one collective, a device sends

  all-reduce                   2 (n - 1) / n · S
  all-gather, reduce-scatter     (n - 1) / n · S
  all-to-all                     (n - 1) / n · S   (S bytes on each device)
  collective-permute                           S   (if it is to send at all)

For a TPU a reduce-scatter may be a fusion of an all-reduce and the slice that
the device keeps; it counts as a reduce-scatter. An asynchronous collective is
in several fusions, which begin it, compute beside it and end it. It counts
where it begins, and not in the others.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


class Collective(NamedTuple):
  """One kind of message: operands such as ('f32[8,4]',), n devices a group."""

  kind: str
  operands: tuple[str, ...]
  devices: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends, by the model in the module's docstring."""
    size, n = sum(map(size_in_bytes, self.operands)), self.devices
    if self.kind == 'all-reduce':
      return 2 * (n - 1) / n * size
    if self.kind == 'all-gather':
      return (n - 1) * size  # The operand is 1 / n of the whole.
    if self.kind == 'collective-permute':
      return size
    return (n - 1) / n * size


class Instruction(NamedTuple):
  """`%name = shape opcode(operands), attributes` of HLO."""

  shape: str
  opcode: str
  operands: str
  attributes: str

  @property
  def names(self) -> list[str]:
    """The names of the operands."""
    return re.findall(r'%([\w.-]+)', self.operands)


Computation = dict[str, Instruction]
Computations = dict[str, Computation]


def arrays(shape: str) -> tuple[str, ...]:
  """Returns ('f32[8,4]', 's32[]') of '(f32[8,4]{1,0}, s32[])'."""
  return tuple(re.findall(r'\w+\[[\d,]*\]', shape))


def size_in_bytes(array: str) -> float:
  """Returns the bytes of 'f32[8,4]'."""
  dtype, shape = array.split('[')
  bits = 8 if dtype == 'pred' else int((re.search(r'\d+', dtype) or [0])[0])
  return bits / 8 * math.prod(map(int, re.findall(r'\d+', shape)))


def parse(hlo: str) -> tuple[str, Computations]:
  """Returns the entry's name and the instructions by computation and name.

  The root of a computation is its last instruction.
  """
  entry, computations, instructions = '', {}, {}
  for line in hlo.splitlines():
    if head := re.match(r'(ENTRY )?%([\w.-]+) \(.*\{$', line):
      instructions = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif match := re.match(
      r'\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)', line
    ):
      instructions[match[1]] = Instruction(*match.groups()[1:])
  return entry, computations


def count_collectives(
  hlo: str,
) -> tuple[collections.Counter[Collective], collections.Counter[Collective]]:
  """Counts how often each collective runs in one run of a program.

  The two counters are with the branches that send least, and with those that
  send most. It raises if a loop that sends runs an unknown number of times.
  """
  entry, computations = parse(hlo)

  @functools.cache
  def count(name):
    fewest, most = collections.Counter(), collections.Counter()
    siblings = computations[name]
    for instruction in siblings.values():
      times = 1
      own = _collectives_of(computations, siblings, instruction)
      if own is not None:
        found = [(own, own)]
      elif instruction.opcode == 'conditional':
        counts = [count(branch) for branch in _branches(instruction)]
        low = min((low for low, _ in counts), key=sent)
        found = [(low, max((high for _, high in counts), key=sent))]
      else:
        roles = 'calls', 'to_apply', 'body', 'condition'
        called = (_called(instruction, role) for role in roles)
        found = [count(name) for name in called if name]
        if instruction.opcode == 'while':
          times = _trips(computations, siblings, instruction)
      for low, high in found:
        if high and not times:
          raise ValueError(
            'XLA does not know how often this loop runs, whose body sends'
            f' something: {instruction}'
          )
        fewest.update({key: times * n for key, n in low.items()})
        most.update({key: times * n for key, n in high.items()})
    return fewest, most

  return count(entry)


def sent(collectives: collections.Counter[Collective]) -> float:
  """Returns the bytes that a device sends."""
  return sum(n * collective.sent for collective, n in collectives.items())


def _called(instruction: Instruction, role: str = 'calls') -> str | None:
  """Returns the name of the computation that an instruction calls."""
  found = re.search(rf'\b{role}=%([\w.-]+)', instruction.attributes)
  return found and found[1]


def _branches(conditional: Instruction) -> list[str]:
  names = re.search(r'branch_computations=\{([^}]*)\}', conditional.attributes)
  if names:
    return re.findall(r'%([\w.-]+)', names[1])
  return [_called(conditional, f'{x}_computation') for x in ('true', 'false')]


def _constant(instructions: Computation, name: str) -> int | None:
  """Returns the integer that an instruction is, if it is one."""
  inner = instructions.get(name)
  if inner and inner.opcode in ('bitcast', 'copy', 'copy-done', 'copy-start'):
    return _constant(instructions, inner.names[0])
  is_number = inner and re.fullmatch(r'-?\d+', inner.operands)
  return int(inner.operands) if is_number else None


def _trips(computations, siblings, loop) -> int:
  """Returns how often a loop runs, or 0 if that is not known.

  The HLO of a TPU says no trip count. The loops that are left there have a
  counter that goes up to a constant.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = computations[_called(loop, 'condition')]
  body = computations[_called(loop, 'body')]
  compare, start = _root(condition), siblings[loop.names[0]]
  if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
    return 0
  counter, limit = compare.names
  index = re.search(r'index=(\d+)', condition[counter].attributes)
  if not index or start.opcode != 'tuple':
    return 0
  index = int(index[1])
  following = body[_root(body).names[index]]
  step = next(filter(None, (_constant(body, x) for x in following.names)), 0)
  first = _constant(siblings, start.names[index])
  last = _constant(condition, limit)
  if following.opcode != 'add' or None in (first, last) or not step:
    return 0
  return -(-(last - first) // step)


def _root(computation: Computation) -> Instruction:
  return computation[next(reversed(computation))]


def _within(computations, instruction):
  """Returns the collective in a fusion and the instructions beside it."""
  if instruction.opcode != 'fusion':
    return None
  called = computations[_called(instruction)]
  for inner in called.values():
    if inner.opcode.removesuffix('-start') in KINDS:
      return inner, called
    if found := _within(computations, inner):
      return found
  return None


def _continues(collective, siblings) -> bool:
  """Whether a collective in a fusion began in another one."""
  return 'async_collective_fusion' in collective.attributes and not any(
    'AsyncCollectiveStart' in x.attributes for x in siblings.values()
  )


def _collectives_of(computations, siblings, instruction):
  """Returns a counter of the collective that an instruction is, or None."""
  is_sliced = False
  if found := _within(computations, instruction):
    instruction, siblings = found
    if _continues(instruction, siblings):
      return collections.Counter()
    opcodes = [x.opcode for x in siblings.values()]
    is_sliced = 'dynamic-slice' in opcodes[opcodes.index(instruction.opcode) :]
  kind = instruction.opcode.removesuffix('-start')
  if kind not in KINDS:
    return None
  if kind == 'all-reduce' and is_sliced:
    kind = 'reduce-scatter'
  operands = ' '.join(siblings[x].shape for x in instruction.names)
  group = _group_size(instruction.attributes)
  return collections.Counter([Collective(kind, arrays(operands), group)])


def _group_size(attributes: str) -> int:
  """Returns the number of devices in a group, in any of HLO's notations."""
  if groups := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return groups[1].count(',') + 1
  if groups := re.search(r'replica_groups=\[\d+,(\d+)\]', attributes):
    return int(groups[1])
  if groups := re.search(
    r'replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}', attributes
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    # An axis, or the part of one: 'a' or 'a':(stride)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  if 'source_target_pairs' in attributes:
    return 2
  raise ValueError(f'No replica groups that can be read in: {attributes}')
