"""Shows the finished runs of benchmarks/convergence.py.

  python benchmarks/convergence_plots.py --show=benchmarks/convergence.json
  python benchmarks/convergence_plots.py --show=... --plots=docs/_static

Both commands print the tables of convergence_tables.py. The second one also
draws the plots.
"""

import pathlib
import statistics

from absl import app
from absl import flags
from matplotlib import figure
import numpy as np

import convergence_protocol as protocol
import convergence_tables as tables
import records

# Okabe and Ito's colours. Line styles differ too, for prints in grey.
_STYLES = {
  'adamw': {'color': '#000000', 'linestyle': '--'},
  'nadamw': {'color': '#CC79A7', 'linestyle': '--'},
  'sophia_g': {
    'color': '#D55E00',
    'linestyle': ':',
    'markerfacecolor': 'white',
  },
  'sophia_h': {
    'color': '#0072B2',
    'linestyle': ':',
    'markerfacecolor': 'white',
  },
  'copied_g': {'color': '#D55E00', 'linestyle': '-'},
  'copied_h': {'color': '#0072B2', 'linestyle': '-'},
  'lion': {'color': '#009E73', 'linestyle': '-.'},
  'signum': {'color': '#E69F00', 'linestyle': '-.'},
  'contrib': {'color': '#56B4E9', 'linestyle': ':'},
}


def _style(name):
  return {'label': tables.LABELS[name], **_STYLES[name]}


def _finish(ax, **kwargs):
  ax.set(**kwargs)
  ax.grid(alpha=0.25)
  ax.spines[['top', 'right']].set_visible(False)


def plot_lengths(results: list[dict]) -> figure.Figure:
  """Draws the difference from AdamW over the length of the run.

  Optimizers that ran at one length only are left out. Points more than 0.04
  above AdamW's are outside the axes: of runs that broke down.
  """
  fig = figure.Figure(figsize=(8, 4.8), layout='constrained')
  ax = fig.subplots()
  summaries = {t: tables.summary(results, t) for t in protocol.LENGTHS}
  for name in tables.LABELS:
    points = [
      (protocol.TASKS[task].tokens, list(rows[name]['differences'].values()))
      for task, rows in summaries.items()
      if name in rows and rows[name]['differences']
    ]
    if len(points) < 2:
      continue
    ax.plot(
      [tokens for tokens, _ in points],
      [statistics.mean(values) for _, values in points],
      marker='o',
      linewidth=2,
      **_style(name),
    )
    ax.vlines(
      [tokens for tokens, _ in points],
      [min(values) for _, values in points],
      [max(values) for _, values in points],
      color=_STYLES[name]['color'],
      alpha=0.4,
    )
  ticks = [protocol.TASKS[task].tokens for task in protocol.LENGTHS]
  ax.set_xscale('log')
  ax.set_xlim(0.85 * ticks[0], 1.2 * ticks[-1])
  ax.set_xticks(ticks, [f'{t:.0f}' for t in ticks])
  ax.minorticks_off()
  ax.set_ylim(-0.08, 0.04)
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


def plot_curves(results: list[dict], times: dict) -> figure.Figure:
  """Draws mean and range over seeds of the losses, over steps and over time.

  It has the three lengths and the autoencoder.

  Args:
    results: All runs.
    times: `ratio` of convergence_times.json.
  """
  tasks = [
    task
    for task in (*protocol.LENGTHS, 'photographs')
    if any(row['runs'] for row in tables.summary(results, task).values())
  ]
  fig = figure.Figure(
    figsize=(10, 3.6 * max(len(tasks), 1)), layout='constrained'
  )
  grid = fig.subplots(max(len(tasks), 1), 2, squeeze=False, sharey='row')
  for axes, task in zip(grid, tasks, strict=False):
    steps = protocol.TASKS[task].steps
    shown = []
    for name, row in tables.summary(results, task).items():
      if not row['runs']:
        continue
      curves = np.array([r['curve'] for r in row['runs'].values()])
      x = steps * np.arange(1, curves.shape[1] + 1) / curves.shape[1]
      # Leaves the steep start out of the limits of the axis.
      shown += list(curves.mean(0)[curves.shape[1] // 3 :])
      ratio = tables.time_of_a_step(times, task, name)
      for ax, scale in zip(axes, (1, ratio or np.nan), strict=True):
        ax.plot(scale * x, curves.mean(0), linewidth=2, **_style(name))
        ax.fill_between(
          scale * x,
          curves.min(0),
          curves.max(0),
          color=_STYLES[name]['color'],
          alpha=0.15,
          linewidth=0,
        )
    for ax, label in zip(
      axes, ('Steps', 'Time, in steps of AdamW'), strict=True
    ):
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
  rows = tables.summary(results, task)
  fig = figure.Figure(figsize=(6.5, 8), layout='constrained')
  top, bottom = fig.subplots(2, 1, sharey=True)
  lowest = [row['searched'] for row in rows.values() if row['searched']]
  for name, row in rows.items():
    tried = row['tried']
    if tried:
      n = range(1, len(tried) + 1)
      top.plot(
        n, [tables.best_of(tried, i) for i in n], linewidth=2, **_style(name)
      )
    elif row['runs']:
      loss = statistics.mean(r['loss'] for r in row['runs'].values())
      top.axhline(loss, linewidth=2, **_style(name))
    if row['rates']:
      bottom.plot(
        row['rates'].keys(),
        row['rates'].values(),
        marker='o',
        linewidth=2,
        **_style(name),
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
  records.check_only_flags(argv)
  path = pathlib.Path(records.SHOW.value or 'benchmarks/convergence.json')
  results = records.read(path)['runs']
  times = records.read(path.with_name('convergence_times.json'))['ratio']
  print(tables.render(results, times))
  if _PLOTS.value:
    folder = pathlib.Path(_PLOTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    plot_lengths(results).savefig(folder / 'convergence.png', dpi=130)
    plot_curves(results, times).savefig(folder / 'curves.png', dpi=90)
    plot_tuning(results).savefig(folder / 'tuning.png', dpi=150)


if __name__ == '__main__':
  _PLOTS = flags.DEFINE_string('plots', None, 'Folder for the plots.')
  app.run(main)
