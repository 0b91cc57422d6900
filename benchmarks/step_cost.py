"""What a step costs: FLOPs, memory, time and compilation, beside AdamW's.

  python benchmarks/step_cost.py --output=benchmarks/step_cost.json
  python benchmarks/step_cost.py --show=benchmarks/step_cost.json

Two tables. The first is of the update alone, parameters and optimizer state
donated, on 32 leaves of 1024 × 1024 float32. The second is of the whole train
step of a GPT (4 layers, width 128, 16 × 128 tokens, 256 words). An accelerator
needs larger arrays to be busy: --sizes=accelerator has leaves of 3072 × 3072,
width 1024 and 16 × 512 tokens, and needs some 45 GB of memory.

Memory is what the compiled program needs beside its arguments, by XLA's memory
analysis: temporaries + outputs - what is aliased to a donated argument. JAX
pairs donated arguments with outputs in order, so the update is
update(params, state, grads) -> (params, state), as docs/cost.md advises. "Two
programs" is the ordinary step of two, update(..., refresh=False). Time, kept is
of the same update with nothing donated, so that every optimizer has to write
new arrays.

FLOPs are XLA's cost analysis of the compiled step. Of a `jax.lax.cond` XLA
counts the most expensive branch, so what it says of a step of Sophia is a step
that refreshes curvature. An ordinary step is the same function compiled with a
constant step count, whose condition XLA folds and whose refresh it drops. The
mean is ordinary + (refresh - ordinary) / k with k = 10. XLA counts the body of
a loop once; the layers are unrolled, so the only loops are those that draw
random bits, which multiply nothing.

Times are paired: in each round the optimizers take turns call by call, and a
ratio is the median over rounds of the ratios within a round. Compile time is
of the processor, tracing included, so that other load does not count.
"""

from collections.abc import Callable
import statistics
import sys
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax
import tqdm

import records
import sophia_optax

sys.path.append(records.EXAMPLES)
import gpt

_ROUNDS = flags.DEFINE_integer(
  'rounds',
  20,
  'Rounds of the update alone. The train step has a quarter as '
  'many, each of k = 10 steps.',
  lower_bound=1,
)
_SIZES = flags.DEFINE_enum(
  'sizes',
  'cpu',
  ['cpu', 'accelerator', 'quick'],
  'Sizes of arrays, for a CPU or an accelerator. quick: small sizes and few '
  'rounds, only to see that it runs.',
)

_K = 10  # steps from one refresh to the next
_NEVER = 2**30
_BATCH = 16


class Sizes(NamedTuple):
  """Sizes of both tables."""

  side: int  # of the square leaves of the update
  num_layers: int
  width: int
  num_heads: int
  length: int  # of a sequence


_SIZES_OF = {
  'cpu': Sizes(1024, 4, 128, 4, 128),
  'accelerator': Sizes(3072, 4, 1024, 16, 512),
  'quick': Sizes(64, 1, 128, 4, 128),
}


class Row(NamedTuple):
  """An optimizer and what is asked of it."""

  name: str
  tx: optax.GradientTransformation
  fraction: int = 1  # curvature is estimated on 1 / fraction of the batch
  over: str | None = None  # row of optax.contrib.sophia to compare with
  goals: dict[str, float] = {}  # noqa: RUF012  # largest values, by column
  decision: dict[str, bool] = {}  # noqa: RUF012  # of two programs


def update_rows() -> list[Row]:
  """Rows of the update alone: no refresh in the steps that are timed."""
  free = {
    'hessian_diagonal_fn': optax.stateless(
      lambda grads, _: jax.tree.map(jnp.square, grads)
    )
  }
  contrib, ours = optax.contrib.sophia, sophia_optax.sophia
  every = {'update_interval': _NEVER}
  one_program = {'MB/contrib': 1.01}
  two_programs = {
    'time/adamw': 1.0,
    'time/contrib': 0.95,
    'time/adamw, kept': 1.0,
    'time/contrib, kept': 0.95,
    'MB': 1.0,
  }
  rows = [
    Row('optax.adamw', optax.adamw(1e-3)),
    Row('optax.lion', optax.lion(1e-3)),
  ]
  for name, estimator in (('g²', free), ('H', {})):
    base = f'optax.contrib.sophia, {name}'
    tx = ours(1e-3, **estimator, **every)
    rows += [
      Row(base, contrib(1e-3, **estimator, **every)),
      Row(f'sophia, {name}', tx, over=base, goals=one_program),
      Row(
        f'sophia, {name}, two programs',
        tx,
        over=base,
        goals=two_programs,
        decision={'refresh': False},
      ),
    ]
  with_limit = ours(1e-3, adam_b2=0.95, **free, **every)
  return [
    *rows,
    Row('sophia, g², adam_b2', with_limit),
    Row(
      'sophia, g², adam_b2, two programs',
      with_limit,
      decision={'refresh': False},
    ),
  ]


def step_rows() -> list[Row]:
  """Rows of the train step: H is Hutchinson, G Gauss-Newton-Bartlett."""
  contrib = optax.contrib.sophia(1e-3, update_interval=_K)
  h = sophia_optax.sophia(1e-3, update_interval=_K)
  g = sophia_optax.sophia(
    1e-3,
    update_interval=_K,
    hessian_diagonal_fn=(
      sophia_optax.gauss_newton_bartlett_estimator_diag_hessian()
    ),
  )
  return [
    Row('optax.adamw', optax.adamw(1e-3)),
    Row('optax.lion', optax.lion(1e-3)),
    Row('optax.contrib.sophia', contrib),
    Row('sophia, H', h),
    Row('sophia, H, 1/8', h, 8),
    Row(
      'sophia, H, 1/16', h, 16, goals={'FLOPs/adamw': 1.02, 'MB/adamw': 1.01}
    ),
    Row('sophia, G', g, goals={'refresh/gradient': 1.01}),
    Row('sophia, G, 1/2', g, 2, goals={'FLOPs/adamw': 1.055, 'MB/adamw': 1.01}),
    Row('sophia, G, 1/8', g, 8, goals={'FLOPs/adamw': 1.015, 'MB/adamw': 1.01}),
  ]


class Program(NamedTuple):
  """A compiled program and what its compilation showed."""

  call: Callable[..., Any]
  flops: float
  megabytes: float
  compile_seconds: float


def compile_program(
  fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (0, 1)
) -> Program:
  """Compiles `fn(*args)`, the arguments at the indices `donate` donated."""
  jax.clear_caches()  # What another row traced would be free here.
  start = time.process_time()
  compiled = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
  seconds = time.process_time() - start
  memory = compiled.memory_analysis()
  size = (
    memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  return Program(
    compiled, compiled.cost_analysis()['flops'], size / 1e6, seconds
  )


def take_turns(
  programs: dict[str, Program],
  carries: dict[str, Any],
  arg: Any,
  rounds: int,
  calls: int,
  bar: tqdm.tqdm,
) -> list[dict[str, float]]:
  """Returns the mean milliseconds of a call, by name, for each round.

  Args:
    programs: From (params, state, arg) to the next (params, state), by name.
    carries: The first (params, state), by name.
    arg: What every call is given.
    rounds: Number of rounds, after one that warms up.
    calls: Calls of each program in a round.
    bar: Is moved by one each round.
  """
  names, times = list(programs), []
  for _ in range(rounds + 1):
    spent = dict.fromkeys(names, 0.0)
    for _ in range(calls):
      names.append(names.pop(0))  # So that none is always the first.
      for name in names:
        start = time.perf_counter()
        carries[name] = jax.block_until_ready(
          programs[name].call(*carries[name], arg)
        )
        spent[name] += time.perf_counter() - start
    times.append({name: 1e3 * s / calls for name, s in spent.items()})
    bar.update()
  return times[1:]


def median_ratio(times: list[dict[str, float]], name: str, base: str) -> float:
  """Returns the median over rounds of the ratio of two programs."""
  return statistics.median(t[name] / t[base] for t in times)


def measure_update(
  size: int, rounds: int, bar: tqdm.tqdm
) -> dict[str, dict[str, float]]:
  """Returns the columns of the update alone, by row."""
  rows = update_rows()
  grads = list(jax.random.normal(jax.random.key(0), (32, size, size)))
  inputs = jnp.ones((8, size))
  programs, kept, first = {}, {}, {}
  for row in rows:
    tx = optax.with_extra_args_support(row.tx)

    def update(params, state, grads, tx=tx, decision=row.decision):
      def objective(params):
        return sum(jnp.mean((inputs @ w) ** 2) for w in params)

      updates, state = tx.update(
        grads, state, params, obj_fn=objective, **decision
      )
      return optax.apply_updates(params, updates), state

    def start(tx=tx):
      params = [x + 1 for x in grads]
      # Of these counts none is one at which curvature is refreshed.
      return params, optax.tree.set(
        tx.init(params), count=jnp.ones([], jnp.int32)
      )

    args = *jax.eval_shape(start), grads
    programs[row.name] = compile_program(update, *args)
    kept[row.name] = compile_program(update, *args, donate=())
    first[row.name] = start
    bar.update()

  def time_all(programs):
    carries = {name: start() for name, start in first.items()}
    return take_turns(programs, carries, grads, rounds, 1, bar)

  times, times_kept = time_all(programs), time_all(kept)
  table = {}
  for row in rows:
    table[row.name] = columns = {
      'ms': statistics.median(t[row.name] for t in times),
      'time/adamw': median_ratio(times, row.name, 'optax.adamw'),
      'time/adamw, kept': median_ratio(times_kept, row.name, 'optax.adamw'),
      'MB': programs[row.name].megabytes,
    }
    if row.over:
      columns['time/contrib'] = median_ratio(times, row.name, row.over)
      columns['time/contrib, kept'] = median_ratio(
        times_kept, row.name, row.over
      )
      # Less than a megabyte is scalars.
      ours, base = (
        max(programs[name].megabytes, 1.0) for name in (row.name, row.over)
      )
      columns['MB/contrib'] = ours / base
  return table


def measure_step(
  sizes: Sizes, rounds: int, bar: tqdm.tqdm
) -> dict[str, dict[str, float]]:
  """Returns the columns of the train step, by row."""
  rows = step_rows()
  model = gpt.GPT(
    256,
    sizes.length,
    sizes.num_layers,
    sizes.num_heads,
    sizes.width,
    unroll=sizes.num_layers,
  )
  tokens = jax.random.randint(
    jax.random.key(0), (_BATCH, sizes.length + 1), 0, 256
  )
  params = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])['params']

  def loss_fn(params, tokens):
    logits = model.apply({'params': params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  def gradient(params, _, tokens):
    return jax.grad(loss_fn)(params, tokens)

  gradient_flops = compile_program(gradient, params, (), tokens).flops
  programs, carries, ordinary = {}, {}, {}
  for row in rows:
    tx = optax.with_extra_args_support(row.tx)

    def step(params, state, tokens, tx=tx, size=_BATCH // row.fraction):
      grads = jax.grad(loss_fn)(params, tokens)
      updates, state = tx.update(
        grads,
        state,
        params,
        obj_fn=lambda p: loss_fn(p, tokens[:size]),
        predict_fn=lambda p: model.apply({'params': p}, tokens[:size, :-1]),
      )
      return optax.apply_updates(params, updates), state

    def ordinary_step(params, state, tokens, step=step):
      state = optax.tree.set(state, count=jnp.ones([], jnp.int32))
      return step(params, state, tokens)

    carries[row.name] = carry = jax.tree.map(
      jnp.copy, (params, tx.init(params))
    )
    program = compile_program(step, *carry, tokens)
    if row.tx not in ordinary:  # It is the same whatever curvature is of.
      ordinary[row.tx] = compile_program(ordinary_step, *carry, tokens).flops
    programs[row.name] = program
    bar.update()

  times = take_turns(programs, carries, tokens, rounds, _K, bar)
  base = programs['optax.adamw']
  table = {}
  for row in rows:
    program = programs[row.name]
    refresh = program.flops - ordinary[row.tx]
    mean = ordinary[row.tx] + refresh / _K
    table[row.name] = {
      'GFLOPs': mean / 1e9,
      'FLOPs/adamw': mean / base.flops,
      'refresh/gradient': refresh / gradient_flops,
      'MB': program.megabytes,
      'MB/adamw': program.megabytes / base.megabytes,
      'ms': statistics.median(t[row.name] for t in times),
      'time/adamw': median_ratio(times, row.name, 'optax.adamw'),
      'compile s': program.compile_seconds,
      'compile/adamw': program.compile_seconds / base.compile_seconds,
    }
  return table


def _lay_out(
  title: str,
  rows: list[Row],
  table: dict[str, dict[str, float]],
  names: list[str],
) -> str:
  """Puts goals beside the figures; `!` marks a missed one.

  A record that is older than a row is shown without it.
  """
  lines = [[title, *names]]
  for row in (row for row in rows if row.name in table):
    cells = [row.name]
    for name in names:
      value = table[row.name].get(name)
      digits = 3 if '/' in name else 1
      cell = '' if value is None else f'{value:.{digits}f}'
      if name in row.goals:
        cell += f' (≤ {row.goals[name]:g})' + '!' * (value > row.goals[name])
      cells.append(cell)
    lines.append(cells)
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  layout = '  '.join([f'{{:{widths[0]}}}', *(f'{{:>{w}}}' for w in widths[1:])])
  return '\n'.join(layout.format(*line).rstrip() for line in lines)


def render(
  update: dict[str, dict[str, float]], step: dict[str, dict[str, float]]
) -> str:
  """Lays out both tables, or the first if `step` is empty."""
  lines = [
    _lay_out(
      'update alone',
      update_rows(),
      update,
      [
        'ms',
        'time/adamw',
        'time/contrib',
        'time/adamw, kept',
        'time/contrib, kept',
        'MB',
        'MB/contrib',
      ],
    ),
    '',
  ]
  if step:
    columns = list(step['sophia, H'])
    lines += [_lay_out('train step, GPT', step_rows(), step, columns), '']
  lines += [
    'In brackets the goals; ! marks a missed one. Names: g² squared gradient,'
    ' H Hutchinson,',
    'G Gauss-Newton-Bartlett, then the part of the batch for curvature.'
    f' k = {_K}.',
  ]
  return '\n'.join(lines)


def main(argv):
  """Measures, prints and writes."""
  records.check_only_flags(argv)
  if records.SHOW.value:
    record = records.read(records.SHOW.value)
    print(render(record['update'], record['step']))
    return
  sizes = _SIZES_OF[_SIZES.value]
  rounds = 2 if _SIZES.value == 'quick' else _ROUNDS.value
  step_rounds = max(rounds // 4, 1)
  calls = len(update_rows()) + len(step_rows()) + 2 * rounds + step_rounds + 3
  with tqdm.tqdm(total=calls, desc='compile and time') as bar:
    update = measure_update(sizes.side, rounds, bar)
    if records.OUTPUT.value:  # In case the second table is stopped.
      records.write(records.OUTPUT.value, update=update, step={})
    step = measure_step(sizes, step_rounds, bar)
  print(render(update, step))
  if records.OUTPUT.value:
    records.write(records.OUTPUT.value, update=update, step=step)


if __name__ == '__main__':
  app.run(main)
