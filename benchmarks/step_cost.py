"""What a step costs: FLOPs, memory, time and compilation, beside AdamW's.

  python benchmarks/step_cost.py --output=benchmarks/step_cost.json
  python benchmarks/step_cost.py --show=benchmarks/step_cost.json
  python benchmarks/step_cost.py --tables=optimizers \
    --output=benchmarks/convergence_times.json

The table `update` is of the update alone, parameters and optimizer state
donated, on 32 leaves of 1024 × 1024 float32. `step` is of the whole train step
of a GPT (4 layers, width 128, 16 × 128 tokens, 256 words). An accelerator needs
larger arrays to be busy: --sizes=accelerator has leaves of 3072 × 3072, width
1024 and 16 × 512 tokens, and needs some 45 GB of memory.

Memory is what the compiled program needs beside its arguments, by XLA's memory
analysis: temporaries + outputs - what is aliased to a donated argument. JAX
pairs donated arguments with outputs in order, so the update is
update(params, state, grads) -> (params, state), as docs/scaling.md advises.
"Two programs" is the ordinary step of two, update(..., refresh=False), in the
table `step` with its refresh in every tenth step.

FLOPs are those of the matrix products, counted in the jaxpr as
examples/dry_run.py says. The mean is ordinary + (refresh - ordinary) / k with
k = 10.

Times are paired: in each round the programs take turns call by call, and a
ratio is the median over rounds of the ratios within a round, because the time
of a step can differ by a fifth from round to round. Compile time is of the
processor, tracing included, so that other load does not count.

The table `optimizers` has the times of convergence.py's steps, whose runs go on
side by side for hours and can't be compared. Here every optimizer makes 30
steps in a round, of which three refresh, in one thread.
"""

from collections.abc import Callable
import functools
import itertools
import os
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import convergence
import convergence_protocol
import records
import sophia_optax

sys.path.append(records.EXAMPLES)
import dry_run
import gpt
import gpt_program

_K = 10  # steps from one refresh to the next
_NEVER = 2**30
_BATCH = 16


class Sizes(NamedTuple):
  """Sizes of the first two tables."""

  side: int  # of the square leaves of the update
  num_layers: int
  width: int
  num_heads: int
  length: int  # of a sequence


SIZES = {
  'cpu': Sizes(1024, 4, 128, 4, 128),
  'accelerator': Sizes(3072, 4, 1024, 16, 512),
  'quick': Sizes(64, 1, 128, 4, 128),
}

Table = dict[str, dict[str, float]]  # columns by row


class Row(NamedTuple):
  """An optimizer and how it is used."""

  name: str
  tx: optax.GradientTransformation
  over: str | None = None  # row of optax.contrib.sophia to compare with
  in_two: bool = False  # programs: of an ordinary step and of a refresh


def update_rows() -> list[Row]:
  """Rows of the update alone: few steps that are timed refresh."""
  free = optax.stateless(lambda grads, _: jax.tree.map(jnp.square, grads))

  def sophia(make=sophia_optax.sophia, **options):
    return make(1e-3, update_interval=_NEVER, **options)

  rows = [
    Row('optax.adamw', optax.adamw(1e-3)),
    Row('optax.lion', optax.lion(1e-3)),
  ]
  for name, options in (('g²', {'hessian_diagonal_fn': free}), ('H', {})):
    base, ours = f'optax.contrib.sophia, {name}', f'sophia, {name}'
    tx = sophia(**options)
    rows += [
      Row(base, sophia(optax.contrib.sophia, **options)),
      Row(ours, tx, over=base),
      Row(f'{ours}, two programs', tx, over=base, in_two=True),
    ]
  name, tx = 'sophiaw, g²', sophia_optax.sophiaw(1e-3, curvature=free)
  return [*rows, Row(name, tx), Row(f'{name}, two programs', tx, in_two=True)]


def step_rows() -> list[Row]:
  """Rows of the train step: H is Hutchinson, G Gauss-Newton-Bartlett."""
  g = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian()
  w, rotated = sophia_optax.sophiaw(1e-3), {'eigenbasis': True}
  return [
    Row('optax.adamw', optax.adamw(1e-3)),
    Row('optax.contrib.sophia', optax.contrib.sophia(1e-3)),
    Row('sophia, H', sophia_optax.sophia(1e-3)),
    Row('sophia, G', sophia_optax.sophia(1e-3, hessian_diagonal_fn=g)),
    Row('sophiaw', w),
    Row('sophiaw, two programs', w, in_two=True),
    Row('sophiaw, eigenbasis', sophia_optax.sophiaw(1e-3, **rotated)),
    Row('SOAP', sophia_optax.sophiaw(1e-3, curvature=None, **rotated)),
  ]


class Program(NamedTuple):
  """A program and what its compilation showed."""

  call: Callable[..., Any]
  megabytes: float = 0.0
  compile_seconds: float = 0.0


def compile_program(fn: Callable[..., Any], *args: Any) -> Program:
  """Compiles `fn(*args)`, the first two arguments donated."""
  jax.clear_caches()  # What another row traced would be free here.
  start = time.process_time()
  compiled = jax.jit(fn, donate_argnums=(0, 1)).lower(*args).compile()
  seconds = time.process_time() - start
  memory = compiled.memory_analysis()
  size = memory.temp_size_in_bytes + memory.output_size_in_bytes
  size -= memory.alias_size_in_bytes
  return Program(compiled, size / 1e6, seconds)


def in_turn(ordinary: Program, refresh: Program) -> Program:
  """Returns two programs as one: a refresh, then k - 1 ordinary steps."""
  calls = itertools.cycle([refresh.call] + [ordinary.call] * (_K - 1))
  return refresh._replace(
    call=lambda *args: next(calls)(*args),
    megabytes=max(ordinary.megabytes, refresh.megabytes),
    compile_seconds=ordinary.compile_seconds + refresh.compile_seconds,
  )


def measure_times(
  programs: dict[str, Program], carries: dict, arg: Any, rounds: int, calls: int
) -> dict[str, np.ndarray]:
  """Returns paired times of programs, in milliseconds of a call, by round.

  Their `call`s go from (params, state, arg) to the next (params, state), which
  `carries` has at first. A first round, which warms up, is left out.
  """
  names, spent = list(programs), {name: [] for name in programs}
  for _ in tqdm.trange(rounds + 1, desc='rounds'):
    for times in spent.values():
      times.append(0.0)
    for _ in range(calls):
      names.append(names.pop(0))  # So that none is always the first.
      for name in names:
        start = time.perf_counter()
        carries[name] = jax.block_until_ready(
          programs[name].call(*carries[name], arg)
        )
        spent[name][-1] += 1e3 * (time.perf_counter() - start) / calls
  return {name: np.array(times[1:]) for name, times in spent.items()}


def _median(times) -> float:
  return float(np.median(times))


def measure_update(size: int, rounds: int) -> Table:
  """Returns the columns of the update alone, by row."""
  rows = update_rows()
  grads = list(jax.random.normal(jax.random.key(0), (32, size, size)))
  inputs = jnp.ones((8, size))
  programs, carries = {}, {}
  for row in tqdm.tqdm(rows, desc='update'):
    tx = optax.with_extra_args_support(row.tx)

    decision = {'refresh': False} if row.in_two else {}

    def update(params, state, grads, tx=tx, decision=decision):
      def objective(params):
        return sum(jnp.mean((inputs @ w) ** 2) for w in params)

      updates, state = tx.update(
        grads, state, params, obj_fn=objective, **decision
      )
      return optax.apply_updates(params, updates), state

    def start(tx=tx):
      params = [x + 1 for x in grads]
      # Of these counts none is one at which curvature is refreshed.
      count = jnp.ones([], jnp.int32)
      return params, optax.tree.set(tx.init(params), count=count)

    carries[row.name] = start()
    programs[row.name] = compile_program(update, *carries[row.name], grads)

  times = measure_times(programs, carries, grads, rounds, 1)
  table = {}
  for name, _, over, _ in rows:
    table[name] = columns = {
      'ms': _median(times[name]),
      'time/adamw': _median(times[name] / times['optax.adamw']),
      'MB': programs[name].megabytes,
    }
    if over:
      columns['time/contrib'] = _median(times[name] / times[over])
  return table


def measure_step(sizes: Sizes, rounds: int) -> Table:
  """Returns the columns of the train step, by row."""
  _, num_layers, width, num_heads, length = sizes
  model = gpt.GPT(256, length, num_layers, num_heads, width, unroll=num_layers)
  shape = _BATCH, length + 1
  tokens = jax.random.randint(jax.random.key(0), shape, 0, 256)
  params = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])['params']
  predict_fn = gpt_program.make_predict(model)
  loss_fn = gpt_program.make_loss(predict_fn)

  gradient_flops, _ = dry_run.matmul_flops(jax.grad(loss_fn), params, tokens)
  rows, programs, carries, flops = step_rows(), {}, {}, {}
  for row in tqdm.tqdm(rows, desc='step'):
    tx = optax.with_extra_args_support(row.tx)

    def step(params, state, tokens, tx=tx, **decision):
      updates, state = tx.update(
        jax.grad(loss_fn)(params, tokens),
        state,
        params,
        batch=tokens,
        # optax.contrib.sophia passes only the parameters.
        obj_fn=lambda params, batch=tokens: loss_fn(params, batch),
        predict_fn=predict_fn,
        **decision,
      )
      return optax.apply_updates(params, updates), state

    # The eigenbasis changes in each of the first 20 steps, and then in every
    # tenth.
    state = optax.tree.set(tx.init(params), count=jnp.array(20))
    carry = jax.tree.map(jnp.copy, (params, state))
    carries[row.name] = carry
    flops[row.name] = dry_run.matmul_flops(step, *carry, tokens)
    decisions = [{'refresh': x} for x in (False, True)] if row.in_two else [{}]
    compiled = [
      compile_program(functools.partial(step, **decision), *carry, tokens)
      for decision in decisions
    ]
    programs[row.name] = in_turn(*compiled) if row.in_two else compiled[0]

  times = measure_times(programs, carries, tokens, rounds, _K)
  base = programs['optax.adamw']
  table = {}
  for row in rows:
    program = programs[row.name]
    ordinary, refresh = flops[row.name]
    mean = ordinary + (refresh - ordinary) / _K
    table[row.name] = {
      'GFLOPs': mean / 1e9,
      'FLOPs/adamw': mean / gradient_flops,
      'refresh/gradient': (refresh - ordinary) / gradient_flops,
      'MB': program.megabytes,
      'MB/adamw': program.megabytes / base.megabytes,
      'ms': _median(times[row.name]),
      'time/adamw': _median(times[row.name] / times['optax.adamw']),
      'compile s': program.compile_seconds,
      'compile/adamw': program.compile_seconds / base.compile_seconds,
    }
  return table


def measure_optimizers(problem: str, rounds: int) -> Table:
  """Returns the times of convergence.py's optimizers on one of its problems."""
  tasks = convergence_protocol.TASKS
  task = next(t for t, spec in tasks.items() if spec.problem == problem)
  programs, carries = {}, {}
  for name in tasks[task].peers:
    case = convergence_protocol.Case(task, name, 0)
    settings = convergence_protocol.settings(case)
    *carry, advance, _, _ = convergence.start(task, name, settings, 0)
    programs[name], carries[name] = Program(advance), carry
  calls = 30 // convergence.CHUNK
  times = measure_times(programs, carries, 0, rounds, calls)
  return {
    name: {
      'ms': round(_median(times[name]) / convergence.CHUNK, 3),
      'time/adamw': round(_median(times[name] / times['adamw']), 3),
    }
    for name in programs
  }


def render(results: records.Results) -> str:
  """Lays out the tables that were measured."""
  titles = {'update': 'update alone', 'step': 'train step, GPT'}
  tables = {
    title: results[name] for name, title in titles.items() if name in results
  }
  parts = [
    records.figures(title, table, lambda column: 3 if '/' in column else 1)
    for title, table in (tables | results.get('optimizers', {})).items()
  ]
  if tables:
    parts.append(
      'g²: squared gradient. H: Hutchinson. G: Gauss-Newton-Bartlett.'
    )
  return '\n\n'.join(parts)


def _measure(results, save):
  results.clear()
  quick = _SIZES.value == 'quick'
  rounds, sizes = 2 if quick else _ROUNDS.value, SIZES[_SIZES.value]
  if 'update' in _TABLES.value:
    results['update'] = measure_update(sizes.side, rounds)
    save()
  if 'step' in _TABLES.value:
    results['step'] = measure_step(sizes, max(rounds // 4, 1))
    save()
  if 'optimizers' in _TABLES.value:
    os.environ['NPROC'] = '1'  # Number of XLA threads.
    of_problem = results['optimizers'] = {}
    for problem in ('axes',) if quick else ('language', 'photographs'):
      of_problem[problem] = measure_optimizers(problem, rounds)
      save()


if __name__ == '__main__':
  _TABLES = flags.DEFINE_multi_enum(
    'tables', ['update', 'step'], ['update', 'step', 'optimizers'],
    'Tables to measure; may be repeated. Measure `optimizers` alone: it runs '
    'in one thread, which is decided before the first program.',
  )  # fmt: skip
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 20, 'Rounds. The table `step` has a quarter as many, each of k = '
    '10 steps.', lower_bound=1,
  )  # fmt: skip
  _SIZES = flags.DEFINE_enum(
    'sizes', 'cpu', list(SIZES),
    'Sizes of arrays, for a CPU or an accelerator. quick: small sizes and few '
    'rounds, only to see that it runs.',
  )  # fmt: skip
  records.main(_measure, render)
