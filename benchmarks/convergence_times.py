"""How long a step of each optimizer takes in benchmarks/convergence.py.

  python benchmarks/convergence_times.py \
    --output=benchmarks/convergence_times.json

The runs of convergence.py go on side by side for hours, so their times can't
be compared. Here the optimizers take turns. In each round every optimizer makes
the first 30 steps of a run, of which three refresh, in one thread. A ratio is
the median over rounds of the ratios to AdamW's time in the same round, because
the time of a step can differ by a fifth from round to round. Nothing else
should run on the machine.

With a larger batch or model the update is a smaller part of a step. The part of
the refresh stays the same.
"""

import os
import statistics
import time

from absl import app
import jax
import tqdm

import convergence
import convergence_protocol as protocol
import records

_PROBLEMS = 'language', 'photographs'
_ROUNDS = 30
_CHUNKS = 2


def _measure_once(task, name):
  settings = protocol.settings(protocol.Case(task, name, 0))
  params, opt_state, advance, _, _ = convergence.start(task, name, settings, 0)
  jax.block_until_ready((params, opt_state))
  clock = time.process_time()
  for i in range(_CHUNKS):
    params, opt_state = jax.block_until_ready(
      advance(params, opt_state, i * convergence.CHUNK)
    )
  return 1e3 * (time.process_time() - clock) / (_CHUNKS * convergence.CHUNK)


def measure(
  problem: str, bar: tqdm.tqdm, rounds: int = _ROUNDS
) -> list[dict[str, float]]:
  """Returns the milliseconds of a step, by optimizer, for each round.

  Args:
    problem: A name for `convergence_problems.get`.
    bar: Is moved by one each round.
    rounds: Number of rounds, after one that compiles.
  """
  task = next(
    t for t, spec in protocol.TASKS.items() if spec.problem == problem
  )
  peers = protocol.TASKS[task].peers
  names, times = list(peers), []
  for _ in range(rounds + 1):
    names.append(names.pop(0))  # So that none is always the first.
    of_round = {name: _measure_once(task, name) for name in names}
    times.append({name: of_round[name] for name in peers})
    bar.update()
  return times[1:]


def main(argv):
  """Measures, prints and writes."""
  records.check_only_flags(argv)
  if records.SHOW.value:
    raise app.UsageError('convergence_plots.py shows the times.')
  os.environ['NPROC'] = '1'  # Number of XLA threads.
  ms, ratio = {}, {}
  with tqdm.tqdm(total=len(_PROBLEMS) * (_ROUNDS + 1)) as bar:
    for problem in _PROBLEMS:
      bar.set_description(problem)
      times = measure(problem, bar)
      ms[problem] = {
        name: round(statistics.median(t[name] for t in times), 3)
        for name in times[0]
      }
      ratio[problem] = {
        name: round(statistics.median(t[name] / t['adamw'] for t in times), 3)
        for name in times[0]
      }
      bar.write(f'{problem}, relative to AdamW: {ratio[problem]}')
      if records.OUTPUT.value:
        records.write(records.OUTPUT.value, ms=ms, ratio=ratio)


if __name__ == '__main__':
  app.run(main)
