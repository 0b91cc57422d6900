"""Plots of the finished runs of benchmarks/convergence.py."""

from matplotlib import figure
import numpy as np

import convergence_protocol as protocol
import convergence_tables as tables

# Okabe and Ito's colours. Line styles differ too, for prints in grey.
_STYLES = {
  'adamw': ('#000000', '--'),
  'nadamw': ('#CC79A7', '--'),
  'sophia_g': ('#D55E00', ':'),
  'sophia_h': ('#0072B2', ':'),
  'copied_g': ('#D55E00', '-'),
  'copied_h': ('#0072B2', '-'),
  'lion': ('#009E73', '-.'),
  'signum': ('#E69F00', '-.'),
  'contrib': ('#56B4E9', ':'),
}


def _style(name):
  color, line = _STYLES[name]
  label = tables.LABELS[name]
  return {'color': color, 'linestyle': line, 'linewidth': 2, 'label': label}


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
    points = {
      protocol.TASKS[task].tokens: list(rows[name]['differences'].values())
      for task, rows in summaries.items()
      if name in rows and rows[name]['differences']
    }
    if len(points) < 2:
      continue
    low, mean, high = (
      np.array([f(x) for x in points.values()]) for f in (min, np.mean, max)
    )
    style = _style(name)
    ax.plot(list(points), mean, marker='o', **style)
    ax.vlines(list(points), low, high, color=style['color'], alpha=0.4)
  ticks = [protocol.TASKS[task].tokens for task in protocol.LENGTHS]
  ax.set_xscale('log')
  ax.set_xlim(0.85 * ticks[0], 1.2 * ticks[-1])
  ax.set_xticks(ticks, [f'{t:.0f}' for t in ticks])
  ax.minorticks_off()
  _finish(
    ax,
    ylim=(-0.08, 0.04),
    xlabel='Tokens for each parameter',
    ylabel="Final validation loss − AdamW's (nats per byte)",
  )
  fig.suptitle('Mean and range of three seeds; lower is better')
  handles = ax.get_legend_handles_labels()
  fig.legend(*handles, frameon=False, loc='outside right center')
  return fig


def plot_curves(results: list[dict], times: dict) -> figure.Figure:
  """Draws mean and range over seeds of the losses, over steps and over time.

  It has the three lengths and the autoencoder. The times are `optimizers` of
  convergence_times.json.
  """
  tasks = (*protocol.LENGTHS, 'photographs')
  fig = figure.Figure(figsize=(10, 3.6 * len(tasks)), layout='constrained')
  grid = fig.subplots(len(tasks), 2, sharey='row')
  for axes, task in zip(grid, tasks, strict=True):
    spec = protocol.TASKS[task]
    shown = []
    for name, row in tables.summary(results, task).items():
      if not row['runs']:
        continue
      curves = np.array([r['curve'] for r in row['runs'].values()])
      mean, num_points = curves.mean(0), curves.shape[1]
      # Leaves the steep start out of the limits of the axis.
      shown.extend(mean[num_points // 3 :])
      ratio = tables.time_of_a_step(times, task, name) or np.nan
      for ax, scale in zip(axes, (1, ratio), strict=True):
        x = scale * spec.steps * np.arange(1, num_points + 1) / num_points
        style = _style(name)
        ax.plot(x, mean, **style)
        band = {'color': style['color'], 'alpha': 0.15, 'linewidth': 0}
        ax.fill_between(x, curves.min(0), curves.max(0), **band)
    _finish(axes[0], xlabel='Steps', ylabel='Validation loss')
    _finish(axes[1], xlabel='Time, in steps of AdamW')
    for ax in axes:
      ax.set_xlim(left=0)
    if not spec.tokens:
      axes[0].set_yscale('log')
    elif shown:
      axes[0].set_ylim(min(shown) - 0.02, np.quantile(shown, 0.95))
    axes[0].set_title(spec.title, loc='left', fontsize='medium')
  handles = grid[0, 0].get_legend_handles_labels()
  fig.legend(*handles, frameon=False, loc='outside upper center', ncols=4)
  return fig
