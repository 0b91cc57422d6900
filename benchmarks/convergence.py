"""How far AdamW, Lion and Sophia get, each with the same number of trials.

  python benchmarks/convergence.py --output=benchmarks/convergence.json
  python benchmarks/convergence.py --show=benchmarks/convergence.json

Three problems: a byte-level GPT of 0.95 million parameters on the text of the
standard library, in steps of 2,048 tokens; one of 0.25 million, in steps of
16,384; and digits of 8 × 8 pixels. Every optimizer has warm-up and cosine decay
to 5 %, gradients that are clipped to a norm of 1 (GPT), and as many trials:
settings drawn at random from RANGES, which the trial's number decides. The
best, by its last validation loss, is run with two more seeds of parameters,
batches and probes. Sophia's best is also run, with all three seeds, with
target_win_rate=0.3 and γ from its default.

Runs that are in the file are not run again, so a benchmark that was stopped
goes on where it was. --jobs runs go on side by side, on one core each. Seconds
are those of one core: steps times the time of a step in the fastest stretch
between two validations of any of the three runs, as other load on the machine
only ever adds to it. Compilation and validation are not in them.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys

from absl import app
from absl import flags
import flax
import jax
import jaxlib
from matplotlib import figure
import numpy as np
import optax
import tqdm

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import demo
import digits
import gpt_configs
import sophia_optax
from sweep import choice
from sweep import decay
from sweep import log_uniform
from sweep import uniform
import text
import train_gpt

_SEEDS = 3
_TARGET_WIN_RATE = 0.3
_DEFAULT_GAMMA = {'sophia_h': 0.01, 'sophia_g': 0.04}

_GPT = gpt_configs.Config(
  num_layers=2,
  unroll=2,
  micro_batch_size=16,
  eval_interval=20,
  eval_batches=16,
  curvature_parts=4,
)
TASKS = {
  'gpt_1m_2k': dataclasses.replace(
    _GPT,
    width=192,
    num_heads=4,
    batch_size=32,
    num_steps=260,
    warmup_steps=80,
    curvature_batch_size=32,
  ),
  'gpt_16k': dataclasses.replace(
    _GPT,
    width=96,
    num_heads=3,
    batch_size=256,
    num_steps=120,
    warmup_steps=40,
    curvature_batch_size=64,
  ),
  'digits': {'steps': 300, 'warmup_steps': 30},
}
TITLES = {
  'gpt_1m_2k': 'GPT, 0.95 M parameters, 2,048 tokens a step',
  'gpt_16k': 'GPT, 0.25 M parameters, 16,384 tokens a step',
  'digits': 'Digits, 128 images a step',
}
_TASK_SEEDS = {'gpt_1m_2k': 0, 'gpt_16k': 2, 'digits': 3}  # of the trials
STYLES = demo.STYLES | {
  'lion': {'label': 'Lion', 'color': '#009E73', 'linestyle': '--'}
}
OPTIMIZERS = gpt_configs.OPTIMIZERS

_SOPHIA = {'update_interval': choice(5, 10)}
_GPT_RANGES = {
  'adamw': {
    'learning_rate': log_uniform(1e-3, 2e-2),
    'b1': uniform(0.6, 0.95),
    'b2': decay(0.9, 0.99),
    'weight_decay': log_uniform(0.01, 1.0),
  },
  'lion': {
    'learning_rate': log_uniform(1.5e-4, 3e-3),
    'b1': uniform(0.6, 0.95),
    'b2': decay(0.9, 0.99),
    'weight_decay': log_uniform(0.03, 3.0),
  },
  'sophia_h': _SOPHIA
  | {
    'learning_rate': log_uniform(3e-4, 6e-3),
    'b1': uniform(0.6, 0.95),
    'b2': decay(0.9, 0.99),
    'weight_decay': log_uniform(0.01, 1.0),
    'gamma': log_uniform(3e-3, 3e-1),
  },
  'sophia_g': _SOPHIA
  | {
    'learning_rate': log_uniform(3e-4, 6e-3),
    'b1': uniform(0.6, 0.95),
    'b2': decay(0.9, 0.99),
    'weight_decay': log_uniform(0.01, 1.0),
    'gamma': log_uniform(1e-2, 1.0),
  },
}
_DIGITS_RATES = {
  'adamw': log_uniform(2e-3, 1e-1),
  'lion': log_uniform(2e-4, 1e-2),
  'sophia_h': log_uniform(5e-4, 2e-2),
  'sophia_g': log_uniform(5e-4, 2e-2),
}
RANGES = dict.fromkeys(TASKS, _GPT_RANGES) | {
  'digits': {
    name: ranges | {'learning_rate': _DIGITS_RATES[name]}
    for name, ranges in _GPT_RANGES.items()
  }
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One run. Trials have the first seed; γ is fixed unless it is steered."""

  task: str
  optimizer: str
  trial: int
  seed: int = 0
  steered: bool = False

  @functools.cached_property
  def settings(self) -> dict[str, float]:
    """What the trial draws, rounded to what a table can show."""
    ranges = RANGES[self.task][self.optimizer]
    rng = np.random.default_rng(
      (_TASK_SEEDS[self.task], OPTIMIZERS.index(self.optimizer), self.trial)
    )
    settings = {name: sample(rng) for name, sample in ranges.items()}
    settings = {
      name: x if isinstance(x, int) else float(f'{x:.3g}')
      for name, x in settings.items()
    }
    if self.steered:
      settings |= {
        'gamma': _DEFAULT_GAMMA[self.optimizer],
        'target_win_rate': _TARGET_WIN_RATE,
      }
    return settings


def _train_gpt(case):
  config = dataclasses.replace(
    TASKS[case.task], optimizer=case.optimizer, seed=case.seed, **case.settings
  )
  return train_gpt.train(config).history


def _train_digits(case):
  task, settings = TASKS[case.task], dict(case.settings)
  rate = settings.pop('learning_rate')
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, task['warmup_steps'], task['steps'], 0.05 * rate
  )
  gamma = settings.pop('gamma', None)
  optimizer = {
    'adamw': optax.adamw,
    'lion': optax.lion,
    'sophia_h': functools.partial(sophia_optax.sophia, gamma=gamma),
    'sophia_g': functools.partial(sophia_optax.sophia_g, rho=gamma),
  }[case.optimizer](schedule, **settings)
  history = digits.train(optimizer, task['steps'], case.seed)[1]
  return [{'val_loss': h.pop('loss')} | h for h in history]


def run(case: Case) -> dict:
  """Trains once; returns the case and what every validation saw."""
  train = _train_digits if case.task == 'digits' else _train_gpt
  history = [
    {name: float(f'{x:.5g}') for name, x in entry.items()}
    for entry in train(case)
  ]
  return dataclasses.asdict(case) | {
    'settings': case.settings,
    'history': history,
  }


def _case(result):
  return Case(**{f.name: result[f.name] for f in dataclasses.fields(Case)})


def final_loss(result: dict) -> float:
  """The last validation loss; one that diverged is worse than any."""
  loss = result['history'][-1]['val_loss']
  return loss if np.isfinite(loss) else float('inf')


def _trials_of(results, task, optimizer):
  return [
    r
    for r in results
    if r['seed'] == 0
    and not r['steered']
    and (r['task'], r['optimizer']) == (task, optimizer)
  ]


def best_trial(results: list[dict], task: str, optimizer: str) -> int:
  """Returns the trial with the lowest final loss of the first seed."""
  return min(_trials_of(results, task, optimizer), key=final_loss)['trial']


def trials(num_trials: int) -> list[Case]:
  """All trials, one of each optimizer before the next of any."""
  return [
    Case(task, optimizer, trial)
    for trial in range(num_trials)
    for task in TASKS
    for optimizer in OPTIMIZERS
  ]


def finals(results: list[dict]) -> list[Case]:
  """The runs that are reported, given the results of all trials."""
  return [
    Case(task, optimizer, best_trial(results, task, optimizer), seed, steered)
    for task in TASKS
    for seed in range(_SEEDS)
    for optimizer in OPTIMIZERS
    for steered in ((False, True) if optimizer in _DEFAULT_GAMMA else (False,))
  ]


def _steps_to(history, target):
  return next((h['step'] for h in history if h['val_loss'] <= target), None)


def _seconds_a_step(results):
  """Of the fastest stretch between two validations."""
  return min(
    (b['seconds'] - a['seconds']) / (b['step'] - a['step'])
    for r in results
    for a, b in itertools.pairwise(r['history'])
  )


def _label(result):
  name = STYLES[result['optimizer']]['label']
  return f'{name}, γ steered' if result['steered'] else name


def summary(results: list[dict], task: str) -> list[dict]:
  """Compares the final runs of a task.

  Args:
    results: all runs.
    task: a key of `TASKS`.

  Returns:
    For each optimizer: label, runs, mean and standard deviation of the final
    losses, the steps after which each seed is at AdamW's mean final loss (None
    if it never is), seconds a step, and the final losses of all trials, sorted.
  """
  by_case = {_case(r): r for r in results}
  chosen = [[by_case[c] for c in cases] for cases in _by_row(results, task)]
  target = statistics.mean(map(final_loss, chosen[0]))
  rows = []
  for runs in chosen:
    losses = [final_loss(r) for r in runs]
    rows.append(
      {
        'label': _label(runs[0]),
        'runs': runs,
        'mean': statistics.mean(losses),
        'deviation': float(np.std(losses, ddof=1)),
        'steps': [_steps_to(r['history'], target) for r in runs],
        'seconds_a_step': _seconds_a_step(runs),
        'trials': sorted(
          map(final_loss, _trials_of(results, task, runs[0]['optimizer']))
        ),
      }
    )
  return rows


def _by_row(results, task):
  """The final cases of a task: a list for each optimizer, AdamW first."""
  rows = {}
  for case in finals(results):
    if case.task == task:
      rows.setdefault((case.optimizer, case.steered), []).append(case)
  return list(rows.values())


def render(results: list[dict]) -> str:
  """Lays out a Markdown table and the best settings for each task."""
  lines = []
  for task in TASKS:
    lines += [
      f'{TITLES[task]}:',
      '',
      "| | validation loss | steps to AdamW's | ms a step |"
      " seconds to AdamW's | trials: best, median |",
      '|---' * 6 + '|',
    ]
    settings = []
    for row in summary(results, task):
      reached = [s for s in row['steps'] if s is not None]
      steps = seconds = 'never'
      if reached:
        steps = f'{statistics.mean(reached):.0f}'
        seconds = f'{statistics.mean(reached) * row["seconds_a_step"]:.1f}'
      if 0 < len(reached) < _SEEDS:
        steps += f' ({len(reached)} of {_SEEDS} seeds)'
      if not row['runs'][0]['steered']:
        settings.append(
          f'* {row["label"]}: '
          + ', '.join(
            f'{name} {x:g}' for name, x in row['runs'][0]['settings'].items()
          )
        )
      lines.append(
        f'| {row["label"]} | {row["mean"]:.3f} ± {row["deviation"]:.3f} '
        f'| {steps} | {1e3 * row["seconds_a_step"]:.0f} | {seconds} '
        f'| {row["trials"][0]:.3f}, {statistics.median(row["trials"]):.3f} |'
      )
    lines += ['', 'Settings of the best trials:', '', *settings, '']
  return '\n'.join(lines)


def plot_losses(results: list[dict], path: str) -> None:
  """Draws validation loss over steps: mean and range of the seeds."""
  fig = figure.Figure(figsize=(12, 4.5), layout='constrained')
  for ax, task in zip(fig.subplots(1, 3), TASKS, strict=True):
    rows = summary(results, task)
    shown = []
    for row in rows:
      losses = np.array(
        [[h['val_loss'] for h in r['history']] for r in row['runs']]
      )
      steps = [h['step'] for h in row['runs'][0]['history']]
      style = dict(STYLES[row['runs'][0]['optimizer']])
      if row['runs'][0]['steered']:
        style |= {'linestyle': ':', 'alpha': 0.7}
      ax.plot(
        steps, losses.mean(0), linewidth=2, **style | {'label': row['label']}
      )
      ax.fill_between(
        steps,
        losses.min(0),
        losses.max(0),
        alpha=0.15,
        linewidth=0,
        color=style['color'],
      )
      # The steep start would press what matters into a corner.
      shown += list(losses.mean(0)[len(steps) // 4 :])
    ax.axhline(rows[0]['mean'], color='#999999', linewidth=1, zorder=0)
    if task == 'digits':
      ax.set_yscale('log')
    else:
      ax.set_ylim(0.98 * min(shown), 1.02 * max(shown))
    ax.set_title(TITLES[task], fontsize='medium')
    ax.set_xlabel('Steps')
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
  fig.axes[0].set_ylabel('Validation loss (nats)')
  fig.axes[0].legend(frameon=False, fontsize='small')
  fig.savefig(path, dpi=110)


def plot_trials(results: list[dict], path: str) -> None:
  """Draws the final loss of every trial, sorted: how hard is it to tune?"""
  fig = figure.Figure(figsize=(12, 4), layout='constrained')
  for ax, task in zip(fig.subplots(1, 3), TASKS, strict=True):
    rows = [r for r in summary(results, task) if not r['runs'][0]['steered']]
    for row in rows:
      ax.plot(
        range(1, len(row['trials']) + 1),
        row['trials'],
        marker='o',
        markersize=4,
        **STYLES[row['runs'][0]['optimizer']],
      )
    best = min(row['trials'][0] for row in rows)
    if task == 'digits':
      ax.set_yscale('log')
    else:
      ax.set_ylim(0.98 * best, 1.5 * best)
    ax.set_title(TITLES[task], fontsize='medium')
    ax.set_xlabel('Trials, the best first')
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
  fig.axes[0].set_ylabel('Final validation loss (nats)')
  fig.axes[0].legend(frameon=False, fontsize='small')
  fig.savefig(path, dpi=110)


def _begin_worker(cores):
  """Gives it a core of its own, where the system lets it, and no bars."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  core = cores.get()
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {core})


def left(cases: list[Case], results: list[dict]) -> list[Case]:
  """Returns the cases that have no result yet."""
  done = {_case(r) for r in results}
  return [case for case in cases if case not in done]


def _run_all(cases, record, path, jobs):
  """Runs what the record does not have, writing it after every run."""
  os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
  spawn = multiprocessing.get_context('spawn')
  cores = spawn.SimpleQueue()
  for core in range(jobs):
    cores.put(core)
  with concurrent.futures.ProcessPoolExecutor(
    jobs, spawn, _begin_worker, (cores,)
  ) as pool:
    futures = [pool.submit(run, case) for case in left(cases, record['runs'])]
    for future in tqdm.tqdm(
      concurrent.futures.as_completed(futures), total=len(futures)
    ):
      record['runs'].append(future.result())
      record['runs'].sort(key=lambda r: dataclasses.astuple(_case(r)))
      write(record, path)


def write(record: dict, path: pathlib.Path) -> None:
  """Writes a run a line; never leaves a file that is cut off."""
  runs = ',\n'.join(json.dumps(r) for r in record['runs'])
  rest = json.dumps({k: v for k, v in record.items() if k != 'runs'}, indent=1)
  part = pathlib.Path(f'{path}.part')
  part.write_text(f'{rest[:-2]},\n "runs": [\n{runs}\n]}}\n')
  part.replace(path)


def _begin():
  return {
    'command': ' '.join(['python benchmarks/convergence.py', *sys.argv[1:]]),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'jaxlib': jaxlib.__version__,
      'optax': optax.__version__,
      'flax': flax.__version__,
      'sophia_optax': sophia_optax.__version__,
    },
    'text_sha256': text.fingerprint(text.standard_library()),
    'runs': [],
  }


def main(argv):
  """Runs what is left, prints the tables and draws the plots."""
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --output=f; got {argv[1:]}.')
  path = pathlib.Path(_SHOW.value or _OUTPUT.value or 'convergence.json')
  record = json.loads(path.read_text()) if path.exists() else _begin()
  if not _SHOW.value:
    _run_all(trials(_TRIALS.value), record, path, _JOBS.value)
    _run_all(finals(record['runs']), record, path, _JOBS.value)
  print(render(record['runs']))
  if _PLOTS.value:
    plot_losses(record['runs'], f'{_PLOTS.value}/convergence.png')
    plot_trials(record['runs'], f'{_PLOTS.value}/trials.png')


if __name__ == '__main__':
  _OUTPUT = flags.DEFINE_string('output', None, 'JSON file of the runs.')
  _SHOW = flags.DEFINE_string('show', None, 'JSON file whose table to print.')
  _PLOTS = flags.DEFINE_string('plots', None, 'Folder to draw the plots into.')
  _TRIALS = flags.DEFINE_integer('trials', 12, 'Trials for each optimizer.')
  _JOBS = flags.DEFINE_integer('jobs', 1, 'Runs side by side, a core each.')
  app.run(main)
