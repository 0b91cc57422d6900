"""Random search for the settings of the demo, with a budget equal for all.

  python examples/sweep.py --out=sweep.json

Trial i of an optimizer draws the same settings on every machine, and trials
that are in the file are not run again, so a sweep that was stopped
continues where it was. The table is printed at the end.
"""

import json
import os

from absl import app
from absl import flags
import numpy as np

import gpt_configs
import train_gpt


def log_uniform(low, high):
  return lambda rng: float(np.exp(rng.uniform(np.log(low), np.log(high))))


def uniform(low, high):
  return lambda rng: float(rng.uniform(low, high))


def decay(low, high):
  """1 - x is drawn log-uniformly: it is 1 / (1 - x) steps that matter."""
  draw = log_uniform(1 - high, 1 - low)
  return lambda rng: 1 - draw(rng)


def choice(*values):
  return lambda rng: values[rng.integers(len(values))]


_SHARED = {
  'b1': uniform(0.5, 0.965),
  'b2': decay(0.9, 0.99),
  'warmup_steps': choice(50, 75, 100, 125),
}
RANGES = {
  'adamw': _SHARED | {'learning_rate': log_uniform(5e-3, 4e-2)},
  'sophia_h': _SHARED
  | {
    'learning_rate': log_uniform(2e-3, 1e-2),
    'gamma': log_uniform(3e-3, 1e-1),
    'update_interval': choice(2, 5, 10),
  },
  'sophia_g': _SHARED
  | {
    'learning_rate': log_uniform(2e-3, 1e-2),
    'gamma': log_uniform(1e-2, 3e-1),
    'update_interval': choice(2, 5, 10),
  },
}


def draw(optimizer: str, trial: int) -> dict[str, float]:
  """Returns the settings of one trial, rounded to what a table can show."""
  rng = np.random.default_rng((list(RANGES).index(optimizer), trial))
  settings = {name: sample(rng) for name, sample in RANGES[optimizer].items()}
  return {
    name: x if isinstance(x, int) else float(f'{x:.3g}')
    for name, x in settings.items()
  }


def table(results: list[dict]) -> str:
  """Returns a Markdown table for each optimizer, the best trial first."""
  lines = []
  for optimizer, ranges in RANGES.items():
    rows = [r for r in results if r['optimizer'] == optimizer]
    lines += [
      '',
      f'| {optimizer}: validation loss | {" | ".join(ranges)} |',
      '|---' * (1 + len(ranges)) + '|',
    ]
    # A run that diverged (NaN) sorts last.
    for row in sorted(rows, key=lambda r: np.nan_to_num(r['val_loss'], nan=99)):
      cells = [f'{row["settings"][name]:g}' for name in ranges]
      lines.append(f'| {row["val_loss"]:.3f} | {" | ".join(cells)} |')
  return '\n'.join(lines[1:])


def sweep(path: str, trials: int, **overrides) -> list[dict]:
  """Runs the trials that are not in the file yet, and returns all of them.

  Args:
    path: JSON file, rewritten after every trial.
    trials: number of trials for each optimizer.
    **overrides: fields of `gpt_configs.Config`, the same in every trial.

  Returns:
    One dictionary for each trial that is done.
  """
  results = []
  if os.path.exists(path):
    with open(path) as file:
      results = json.load(file)
  done = {(r['optimizer'], r['trial']) for r in results}
  # Trial by trial, so that a sweep that is stopped was fair until then.
  for trial in range(trials):
    for optimizer in RANGES:
      if (optimizer, trial) in done:
        continue
      settings = draw(optimizer, trial)
      run = train_gpt.train(
        gpt_configs.get_config('demo', optimizer, **(overrides | settings))
      )
      if not run.finished:
        return results
      results.append(
        {
          'optimizer': optimizer,
          'trial': trial,
          'settings': settings,
          'val_loss': run.history[-1]['val_loss'],
          'seconds': round(run.history[-1]['seconds'], 1),
        }
      )
      with open(path + '.part', 'w') as file:
        json.dump(results, file, indent=1)
      os.replace(path + '.part', path)
  return results


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --trials=9; got {argv[1:]}.')
  print(table(sweep(_OUT.value, _TRIALS.value)))


if __name__ == '__main__':
  _OUT = flags.DEFINE_string('out', 'sweep.json', 'File of the results.')
  _TRIALS = flags.DEFINE_integer('trials', 12, 'Trials for each optimizer.')
  app.run(main)
