"""Tables and plots of the finished runs of benchmarks/convergence.py.

  python benchmarks/convergence_plots.py --show=benchmarks/convergence.json
  python benchmarks/convergence_plots.py --show=... --plots=docs/_static

Columns of the tables:

* Validation loss: mean ± standard deviation over the seeds of the report.
* − AdamW: difference from AdamW with the same seed.
* Steps to AdamW's: fraction of the steps after which the curve reaches AdamW's
  final loss with the same seed, averaged over seeds.
* ms a step: processor time, the median over the same seeds.
* Best of n: expected lowest loss of n trials drawn at random.
* Rates: the largest learning rate whose loss is within 0.03 of the best,
  divided by the smallest one.
"""

import dataclasses
import math
import pathlib
import statistics

from absl import app
from absl import flags
from matplotlib import figure
import numpy as np

import convergence_protocol as protocol
import records

_WITHIN = 0.03
# Okabe and Ito's colours. Line styles differ too, for prints in grey.
STYLES = {
  'adamw': {'label': 'AdamW', 'color': '#000000', 'linestyle': '--'},
  'nadamw': {'label': 'NAdamW', 'color': '#CC79A7', 'linestyle': '--'},
  'sophia_g': {'label': 'Sophia-G', 'color': '#D55E00', 'linestyle': '-'},
  'sophia_h': {'label': 'Sophia-H', 'color': '#0072B2', 'linestyle': '-'},
  'copied_g': {
    'label': 'Sophia-G, settings to copy',
    'color': '#D55E00',
    'linestyle': ':',
    'markerfacecolor': 'white',
  },
  'copied_h': {
    'label': 'Sophia-H, settings to copy',
    'color': '#0072B2',
    'linestyle': ':',
    'markerfacecolor': 'white',
  },
  'steered': {
    'label': 'Sophia-G, γ adapted',
    'color': '#999999',
    'linestyle': '-',
    'markerfacecolor': 'white',
  },
  'lion': {'label': 'Lion', 'color': '#009E73', 'linestyle': '-.'},
  'signum': {'label': 'Signum', 'color': '#E69F00', 'linestyle': '-.'},
  'contrib': {
    'label': 'optax.contrib.sophia',
    'color': '#56B4E9',
    'linestyle': ':',
  },
}


def losses_of(results: list[dict]) -> dict[protocol.Case, float]:
  """Returns the final loss of each case."""
  return {protocol.case_of(r): r['loss'] for r in results}


def num_trials(results: list[dict], task: str) -> int:
  """Returns how many trials all optimizers have finished in a task's search."""
  while protocol.TASKS[task].parent:
    task = protocol.TASKS[task].parent
  done = losses_of(results)
  count = 0
  while all(protocol.Case(task, o, count) in done for o in protocol.SPACES):
    count += 1
  return count


def best_of(losses: list[float], n: int) -> float:
  """Returns the lowest of n losses, averaged over all choices of n."""
  losses = sorted(losses)
  total = math.comb(len(losses), n)
  return sum(
    loss * math.comb(len(losses) - 1 - i, n - 1) / total
    for i, loss in enumerate(losses[: len(losses) - n + 1])
  )


def part_to(curve: list[float], target: float) -> float | None:
  """Returns the fraction of a run after which its curve reaches a loss.

  Args:
    curve: Losses at evenly spaced steps. The last one is at the end.
    target: The loss to reach.

  Returns:
    The fraction, or None if the curve does not reach the loss.
  """
  for i, loss in enumerate(curve):
    if loss <= target:
      before = curve[i - 1] if i else loss
      inside = (before - target) / (before - loss) if before > loss else 1.0
      return (i + inside) / len(curve)
  return None


def rates(results: list[dict], best: protocol.Case) -> dict[float, float]:
  """Returns losses by learning rate, with the other settings of the best."""
  losses = losses_of(results)
  return dict(
    sorted(
      (r['settings']['learning_rate'], protocol.score(case, losses))
      for r in results
      if dataclasses.replace(case := protocol.case_of(r), rate=best.rate)
      == best
      and protocol.score(case, losses) is not None
    )
  )


def width(losses: dict[float, float], within: float = _WITHIN) -> float:
  """Returns the ratio of the largest to the smallest rate with a good loss.

  The limits are interpolated linearly over the logarithm of the rate.

  Args:
    losses: losses by learning rate.
    within: largest distance of a good loss from the lowest one.
  """
  limit = min(losses.values()) + within
  edges = []
  for items in list(losses.items()), list(losses.items())[::-1]:
    start = min(range(len(items)), key=lambda i, x=items: x[i][1])
    inside = items[start]
    for outside in items[start + 1 :]:
      if outside[1] > limit:
        part = (limit - inside[1]) / (outside[1] - inside[1])
        edges.append(inside[0] * (outside[0] / inside[0]) ** part)
        break
      inside = outside
    else:
      edges.append(inside[0])
  return edges[0] / edges[1]


def summary(results: list[dict], task: str) -> dict[str, dict]:
  """Collects the data of a task for tables and plots.

  Args:
    results: all runs.
    task: a key of `protocol.TASKS`.

  Returns:
    For each optimizer with runs: `tried` (losses of the trials), `best` (the
    best case, or None before the search has ended), `searched` (the lowest loss
    of the search), `runs` (by seed), `variants` (by name and seed), `parts`
    (fraction of the steps to AdamW's loss, by seed), `differences` (from AdamW,
    by seed), `ms` and `rates`.
  """
  losses = losses_of(results)
  of_task = [r for r in results if r['task'] == task]
  by_case = {protocol.case_of(r): r for r in of_task}
  count = num_trials(results, task)
  rows = {}
  for name in STYLES:
    of_name = [r for r in of_task if r['optimizer'] == name]
    searched = [r for r in of_name if r['seed'] == 0 and not r['variant']]
    if not of_name:
      continue
    best = None
    if count and name in protocol.TASKS[task].peers:
      _, best = protocol.search(task, name, losses, count)
    runs, variants = {}, {}
    for case, result in by_case.items():
      same = best and (case.optimizer, case.trial, case.rate) == (
        best.optimizer,
        best.trial,
        best.rate,
      )
      if same and case.seed in protocol.SEEDS:
        into = variants.setdefault(case.variant, {}) if case.variant else runs
        into[case.seed] = result
    rows[name] = {
      'tried': [r['loss'] for r in searched if r['rate'] == 0],
      'best': best,
      'searched': min((r['loss'] for r in searched), default=None),
      'runs': runs,
      'variants': variants,
      # Runs of the same seeds were made at about the same time.
      'ms': statistics.median(
        r['ms'] for r in (list(runs.values()) or of_name)
      ),
      'rates': rates(results, best) if best else {},
    }
  first = rows.get('adamw', {'runs': {}})['runs']
  for row in rows.values():
    both = sorted(row['runs'].keys() & first.keys())
    row['differences'] = {
      seed: row['runs'][seed]['loss'] - first[seed]['loss'] for seed in both
    }
    row['parts'] = {
      seed: part_to(row['runs'][seed]['curve'], first[seed]['curve'][-1])
      for seed in both
    }
  return rows


def _mean(values, form):
  values = list(values)
  if not values:
    return '–'
  text = format(statistics.mean(values), form)
  if len(values) > 1:
    text += f' ± {statistics.stdev(values):{form.lstrip("+")}}'
  return text


def _table(header, rows):
  return [
    '| ' + ' | '.join(header) + ' |',
    '|---' * len(header) + '|',
    *('| ' + ' | '.join(cells) + ' |' for cells in rows),
    '',
  ]


def _form(task):
  return '.3f' if protocol.TASKS[task].tokens else '.3g'


def _row(name, row, first, task):
  form = _form(task)
  losses = [r['loss'] for r in row['runs'].values()]
  parts = list(row['parts'].values())
  steps = time = '–'
  if parts:
    reached = [p for p in parts if p is not None]
    steps = time = 'never'
    if reached:
      part = statistics.mean(reached)
      few = (
        ''
        if len(reached) == len(parts)
        else (f' ({len(reached)} of {len(parts)} seeds)')
      )
      steps = f'{part:.2f}{few}'
      time = f'{part * row["ms"] / first["ms"]:.2f}'
  tried = row['tried']
  best = '–'
  if len(tried) > 1 and protocol.TASKS[task].parent is None:
    best = ', '.join(
      f'{best_of(tried, n):{form}}'
      for n in (1, 5, len(tried))
      if n <= len(tried)
    )
  return [
    STYLES[name]['label'],
    _mean(losses, form),
    _mean(row['differences'].values(), '+' + form),
    steps,
    f'{row["ms"]:.3g}',
    time,
    '–' if row['searched'] is None else f'{row["searched"]:{form}}',
    best,
    f'{width(row["rates"]):.1f}'
    if protocol.TASKS[task].margin == _WITHIN and row['rates']
    else '–',
  ]


def render(results: list[dict]) -> str:
  """Returns Markdown tables of all runs."""
  lines = []
  summaries = {
    task: summary(results, task)
    for task in protocol.TASKS
    if any(r['task'] == task for r in results)
  }
  for task, rows in summaries.items():
    lines += [f'### {protocol.TASKS[task].title}', '']
    lines += _table(
      [
        '',
        'validation loss',
        '− AdamW',
        "steps to AdamW's",
        'ms a step',
        "time to AdamW's",
        'search',
        'best of 1, 5, all trials',
        'rates',
      ],
      [_row(name, row, rows['adamw'], task) for name, row in rows.items()],
    )
    found = [row['best'] for row in rows.values() if row['best']]
    if found:
      lines += ['Settings:', '']
      for case in found:
        chosen = ', '.join(
          f'{k} {v:g}' if isinstance(v, float) else f'{k} {v}'
          for k, v in protocol.settings(case).items()
        )
        lines.append(f'* {STYLES[case.optimizer]["label"]}: {chosen}')
      lines.append('')
    variants = [
      [
        STYLES[name]['label'],
        variant,
        _mean(
          [
            r['loss'] - row['runs'][seed]['loss']
            for seed, r in runs.items()
            if seed in row['runs']
          ],
          '+.3f',
        ),
      ]
      for name, row in rows.items()
      for variant, runs in row['variants'].items()
    ]
    if variants:
      lines += _table(['', 'variant', 'difference'], variants)
  lines += ['### Cost', '']
  lines += _table(
    ['', 'runs', 'hours of a core'],
    [
      [
        task,
        str(sum(r['task'] == task for r in results)),
        f'{sum(r["seconds"] for r in results if r["task"] == task) / 3600:.2f}',
      ]
      for task in summaries
    ],
  )
  return '\n'.join(lines)


def _finish(ax, **kwargs):
  ax.set(**kwargs)
  ax.grid(alpha=0.25)
  ax.spines[['top', 'right']].set_visible(False)


def plot_lengths(results: list[dict]) -> figure.Figure:
  """Draws the difference from AdamW over the length of the run."""
  fig = figure.Figure(figsize=(8, 4.8), layout='constrained')
  ax = fig.subplots()
  summaries = {t: summary(results, t) for t in protocol.LENGTHS}
  for name, style in STYLES.items():
    points = [
      (protocol.TASKS[task].tokens, list(rows[name]['differences'].values()))
      for task, rows in summaries.items()
      if name in rows and rows[name]['differences']
    ]
    if not points:
      continue
    ax.plot(
      [tokens for tokens, _ in points],
      [statistics.mean(values) for _, values in points],
      marker='o',
      linewidth=2,
      **style,
    )
    ax.vlines(
      [tokens for tokens, _ in points],
      [min(values) for _, values in points],
      [max(values) for _, values in points],
      color=style['color'],
      alpha=0.4,
    )
  ticks = [protocol.TASKS[task].tokens for task in protocol.LENGTHS]
  ax.set_xscale('log')
  ax.set_xlim(0.85 * ticks[0], 1.2 * ticks[-1])
  ax.set_xticks(ticks, [f'{t:.0f}' for t in ticks])
  ax.minorticks_off()
  _finish(
    ax,
    xlabel='Tokens for each parameter',
    ylabel="Final validation loss − AdamW's (nats per byte)",
  )
  fig.suptitle('Mean and range of three seeds; lower is better')
  fig.legend(
    *ax.get_legend_handles_labels(), frameon=False, loc='outside right center'
  )
  return fig


def plot_curves(results: list[dict]) -> figure.Figure:
  """Draws mean and range over seeds of the losses, over steps and over time."""
  tasks = [
    task
    for task in protocol.TASKS
    if any(row['runs'] for row in summary(results, task).values())
  ]
  fig = figure.Figure(
    figsize=(10, 3.6 * max(len(tasks), 1)), layout='constrained'
  )
  grid = fig.subplots(max(len(tasks), 1), 2, squeeze=False, sharey='row')
  for axes, task in zip(grid, tasks, strict=False):
    steps = protocol.TASKS[task].steps
    shown = []
    for name, row in summary(results, task).items():
      if not row['runs']:
        continue
      curves = np.array([r['curve'] for r in row['runs'].values()])
      x = steps * np.arange(1, curves.shape[1] + 1) / curves.shape[1]
      # Leaves the steep start out of the limits of the axis.
      shown += list(curves.mean(0)[curves.shape[1] // 3 :])
      for ax, scale in zip(axes, (1, row['ms'] / 1e3), strict=True):
        ax.plot(scale * x, curves.mean(0), linewidth=2, **STYLES[name])
        ax.fill_between(
          scale * x,
          curves.min(0),
          curves.max(0),
          color=STYLES[name]['color'],
          alpha=0.15,
          linewidth=0,
        )
    for ax, label in zip(axes, ('Steps', 'Seconds of one core'), strict=True):
      _finish(ax, xlabel=label)
      ax.set_xlim(left=0)
    if protocol.TASKS[task].tokens:
      axes[0].set_ylim(min(shown) - 0.02, np.quantile(shown, 0.95))
    else:
      axes[0].set_yscale('log')
    axes[0].set_ylabel('Validation loss')
    axes[0].set_title(protocol.TASKS[task].title, loc='left', fontsize='medium')
  if tasks:
    fig.legend(
      *grid[0, 0].get_legend_handles_labels(),
      frameon=False,
      loc='outside upper center',
      ncols=4,
    )
  return fig


def plot_tuning(results: list[dict]) -> figure.Figure:
  """Draws best of n, and loss over learning rate, for the shortest task."""
  task = protocol.LENGTHS[0]
  rows = summary(results, task)
  fig = figure.Figure(figsize=(6.5, 8), layout='constrained')
  top, bottom = fig.subplots(2, 1, sharey=True)
  lowest = [row['searched'] for row in rows.values() if row['searched']]
  for name, row in rows.items():
    tried = row['tried']
    if tried:
      n = range(1, len(tried) + 1)
      top.plot(n, [best_of(tried, i) for i in n], linewidth=2, **STYLES[name])
    elif row['runs']:
      loss = statistics.mean(r['loss'] for r in row['runs'].values())
      top.axhline(loss, linewidth=2, **STYLES[name])
    if row['rates']:
      bottom.plot(
        row['rates'].keys(),
        row['rates'].values(),
        marker='o',
        linewidth=2,
        **STYLES[name],
      )
  if lowest:
    top.set_ylim(min(lowest) - 0.03, min(lowest) + 0.3)
  top.set_xticks([1, 5, 10, 15, 20])
  _finish(
    top,
    xlabel='Number n of trials; expected best of n',
    ylabel='Final validation loss',
  )
  bottom.set_xscale('log')
  _finish(
    bottom,
    xlabel='Learning rate, with the best other settings',
    ylabel='Final validation loss',
  )
  handles, labels = top.get_legend_handles_labels()
  fig.legend(
    handles, labels, frameon=False, loc='outside upper center', ncols=2
  )
  return fig


def main(argv):
  """Prints the tables and draws the plots."""
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --show=f; got {argv[1:]}.'
    )
  path = records.SHOW.value or 'benchmarks/convergence.json'
  results = records.read(path)['runs']
  print(render(results))
  if _PLOTS.value:
    folder = pathlib.Path(_PLOTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    plot_lengths(results).savefig(folder / 'convergence.png', dpi=130)
    plot_curves(results).savefig(folder / 'curves.png', dpi=110)
    plot_tuning(results).savefig(folder / 'tuning.png', dpi=150)


if __name__ == '__main__':
  _PLOTS = flags.DEFINE_string('plots', None, 'Folder for the plots.')
  app.run(main)
