"""Counts what one run of a compiled program moves and sends.

Read is the optimized HLO, `compiled.as_text()`. The walk starts at the entry
computation, takes the body of a loop as often as XLA knows it to run, and of a
conditional the branch that costs least and the one that costs most.

HBM traffic is the sum over the instructions of what each reads and writes in
HBM. A fusion reads each of its operands once and writes its results. Arrays
that the layout puts into a faster memory (VMEM) are free, and a copy between
the two pays its end in HBM. Of an operand that is only sliced the slices are
read, and an update of a slice in place pays the slice. Tuples, bitcasts and the
ends of asynchronous pairs move nothing.

Bytes sent are those of a ring. With n devices in a group and S bytes of the
whole array, summed over the arrays of one collective, a device sends

  all-reduce                   2 (n - 1) / n · S
  all-gather, reduce-scatter     (n - 1) / n · S
  all-to-all                     (n - 1) / n · S   (S bytes on each device)
  collective-permute                           S   (if it is to send at all)

For a TPU a reduce-scatter may be a fusion of an all-reduce and the slice that
the device keeps; it counts as a reduce-scatter. An asynchronous collective is
in several fusions, which begin it, compute beside it and end it. It counts
where it begins. In the others only the computation counts.
"""

import collections
from collections.abc import Callable
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

# Of the instructions with operands, those that move nothing by themselves.
_FREE = {
  'add-dependency',
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'opt-barrier',
  'parameter',
  'partition-id',
  'replica-id',
  'tuple',
}
_CONTAINERS = {'async-start', 'call', 'conditional', 'while'}
_SLICES = {'dynamic-slice', 'gather', 'slice'}


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

  @property
  def whole(self) -> float:
    """The bytes of the results."""
    return sum(map(size_in_bytes, arrays(self.shape)))


Computation = dict[str, Instruction]
Computations = dict[str, Computation]
Cost = collections.Counter


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


def count_collectives(hlo: str) -> tuple[Cost, Cost]:
  """Counts how often each collective runs in one run of a program.

  The two counters are with the branches that send least, and with those that
  send most. It raises if a loop that sends runs an unknown number of times.
  """
  return _count(hlo, _collective_of, sent)


def sent(collectives: collections.Counter[Collective]) -> float:
  """Returns the bytes that a device sends."""
  return sum(n * collective.sent for collective, n in collectives.items())


def traffic(hlo: str) -> tuple[float, float]:
  """Counts the bytes that one run reads and writes in HBM.

  Returns those with the branches that move least, and that move most. It raises
  if a loop that moves runs an unknown number of times.
  """
  low, high = _count(hlo, _moved, Cost.total)
  return low.total(), high.total()


def _count(
  hlo: str,
  cost_of: Callable[[Computations, Computation, Instruction], Cost | None],
  total: Callable[[Cost], float],
) -> tuple[Cost, Cost]:
  """Sums costs over a run; of None, those of the computations it calls."""
  entry, computations = parse(hlo)

  @functools.cache
  def count(name: str) -> tuple[Cost, Cost]:
    fewest, most = Cost(), Cost()
    siblings = computations[name]
    for instruction in siblings.values():
      cost, times = cost_of(computations, siblings, instruction), 1
      if cost is not None:
        costs = [(cost, cost)]
      elif instruction.opcode == 'conditional':
        counts = [count(branch) for branch in _branches(instruction)]
        low = min((low for low, _ in counts), key=total)
        costs = [(low, max((high for _, high in counts), key=total))]
      else:
        roles = 'calls', 'to_apply', 'body', 'condition'
        called = (_called(instruction, role) for role in roles)
        costs = [count(name) for name in called if name]
        if instruction.opcode == 'while':
          times = _trips(computations, siblings, instruction)
      for low, high in costs:
        if total(high) and not times:
          raise ValueError(
            'XLA does not know how often this loop runs, whose body costs'
            f' something: {instruction}'
          )
        fewest.update({key: times * n for key, n in low.items()})
        most.update({key: times * n for key, n in high.items()})
    return fewest, most

  return count(entry)


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


def _collective_of(computations, siblings, instruction):
  """Returns the collective that an instruction is, or None."""
  is_sliced = False
  if found := _within(computations, instruction):
    instruction, siblings = found
    if _continues(instruction, siblings):
      return Cost()
    opcodes = [x.opcode for x in siblings.values()]
    is_sliced = 'dynamic-slice' in opcodes[opcodes.index(instruction.opcode) :]
  kind = instruction.opcode.removesuffix('-start')
  if kind not in KINDS:
    return None
  if kind == 'all-reduce' and is_sliced:
    kind = 'reduce-scatter'
  operands = ' '.join(siblings[x].shape for x in instruction.names)
  group = _group_size(instruction.attributes)
  return Cost([Collective(kind, arrays(operands), group)])


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


def _moved(computations, siblings, instruction):
  """Returns the bytes that an instruction moves in HBM, or None."""
  shape, opcode, _, attributes = instruction
  if opcode in _CONTAINERS:
    return None
  if (
    opcode in _FREE
    or opcode.endswith('-done')
    or re.search('"(ConcatBitcast|AllocateBuffer)"', attributes)
  ):
    return Cost()
  # A dict: an operand that is named twice is read once.
  operands = {name: siblings[name] for name in instruction.names}
  read = sum(_in_hbm(x.shape) for x in operands.values())
  written = _in_hbm(shape)
  if opcode == 'copy-start':  # (target, source, a flag)
    read, written = written, 0.0
  elif opcode == 'slice-start':  # (source, target, a flag)
    source, target = _layouts(shape)[:2]
    read = size_in_bytes(arrays(target)[0]) if _in_hbm(source) else 0.0
    written = _in_hbm(target)
  elif opcode.endswith('-start'):  # (source, target, ...) of a collective.
    written -= read if shape.startswith('(') and written > read else 0.0
  elif opcode == 'fusion':
    read, written = _moved_by_fusion(computations, operands, instruction)
  elif opcode in _SLICES:
    read = min(read, instruction.whole)
  elif opcode == 'dynamic-update-slice':
    update = operands[instruction.names[1]]
    read, written = _in_hbm(update.shape), update.whole
  return Cost({'HBM': read + written})


def _moved_by_fusion(computations, operands, fusion) -> tuple[float, float]:
  """Returns the bytes that a fusion reads and writes."""
  uses = _uses(computations, fusion)
  read = sum(min(_in_hbm(operands[x].shape), n) for x, n in uses.items())
  sizes = _written(computations, fusion)
  results = zip(_layouts(fusion.shape), sizes, strict=True)
  written = sum(min(_in_hbm(result), n) for result, n in results)
  found = _within(computations, fusion)
  if found and not _continues(*found):
    collective, siblings = found
    sources = (siblings[x] for x in collective.names)
    written += _in_hbm(collective.shape)
    read += sum(_in_hbm(x.shape) for x in sources if x.opcode == 'parameter')
  return read, written


def _layouts(shape: str) -> list[str]:
  """Returns the arrays of a shape with their layouts."""
  return re.findall(r'\w+\[[\d,]*\](?:\{[^}]*\})?', shape)


def _in_hbm(shape: str) -> float:
  """Returns the bytes of the arrays that no S(n) puts elsewhere."""
  in_hbm = (x for x in _layouts(shape) if not re.search(r'S\([1-9]', x))
  return sum(size_in_bytes(arrays(x)[0]) for x in in_hbm)


def _uses(computations, fusion) -> Cost:
  """Returns the bytes that a fusion reads of each operand, wherever it is."""
  called = computations[_called(fusion)]
  parameters = {
    int(inner.operands): name
    for name, inner in called.items()
    if inner.opcode == 'parameter'
  }
  uses = Cost()
  for i, operand in enumerate(fusion.names):
    uses[operand] += _read(computations, called, parameters[i])
  return uses


def _read(computations, called, name) -> float:
  """Returns the bytes that a fusion reads of what `name` in it stands for."""
  read = 0.0
  for own_name, inner in called.items():
    if name not in inner.names:
      continue
    if inner.opcode == 'bitcast':
      read += _read(computations, called, own_name)
    elif inner.opcode in _SLICES:
      read += inner.whole
    elif inner.opcode == 'dynamic-update-slice' and name == inner.names[0]:
      continue
    elif inner.opcode == 'tuple' or _is_sent(called, inner):
      continue  # Passed on, or counted with the collective.
    elif inner.opcode == 'fusion':
      read += _uses(computations, inner)[name]
    else:
      read += called[name].whole
  return min(read, called[name].whole)


def _is_sent(called, inner) -> bool:
  """Whether an instruction of a fusion is a collective or a part of one."""
  if inner.opcode in ('bitcast', 'dynamic-slice'):
    return _is_sent(called, called[inner.names[0]])
  return inner.opcode in KINDS or 'AsyncCollective' in inner.attributes


def _written(computations, fusion) -> list[float]:
  """Returns the bytes that a fusion writes of each of its results."""
  called = computations[_called(fusion)]

  def of(inner):
    if inner.opcode == 'parameter' or _is_sent(called, inner):
      return [0.0] * len(arrays(inner.shape))
    if inner.opcode in ('tuple', 'bitcast'):
      return [n for x in inner.names for n in of(called[x])]
    if inner.opcode == 'dynamic-update-slice':
      return [called[inner.names[1]].whole]
    if inner.opcode == 'fusion':
      return _written(computations, inner)
    return [size_in_bytes(array) for array in arrays(inner.shape)]

  return of(_root(called))
