"""Plots of the finished runs of benchmarks/convergence.py."""

import statistics

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


def _style(name, **kwargs):
  color, line = _STYLES[name]
  if 'marker' in kwargs and name in ('sophia_g', 'sophia_h'):
    kwargs['markerfacecolor'] = 'white'
  return kwargs | {
    'label': tables.LABELS[name],
    'color': color,
    'linestyle': line,
    'linewidth': 2,
  }


def _finish(ax, **kwargs):
  ax.set(**kwargs)
  ax.grid(alpha=0.25)
  ax.spines[['top', 'right']].set_visible(False)


def _legend(fig, ax, **kwargs):
  fig.legend(*ax.get_legend_handles_labels(), frameon=False, **kwargs)


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
    values = points.values()
    style = _style(name, marker='o')
    ax.plot(list(points), [statistics.mean(x) for x in values], **style)
    low, high = ([f(x) for x in values] for f in (min, max))
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
  _legend(fig, ax, loc='outside right center')
  return fig


def plot_curves(results: list[dict], times: dict) -> figure.Figure:
  """Draws mean and range over seeds of the losses, over steps and over time.

  It has the three lengths and the autoencoder. The times are `optimizers` of
  convergence_times.json.
  """
  summaries = {}
  for task in (*protocol.LENGTHS, 'photographs'):
    rows = tables.summary(results, task)
    if rows := {name: row for name, row in rows.items() if row['runs']}:
      summaries[task] = rows
  count = max(len(summaries), 1)
  fig = figure.Figure(figsize=(10, 3.6 * count), layout='constrained')
  grid = fig.subplots(count, 2, squeeze=False, sharey='row')
  for axes, (task, rows) in zip(grid, summaries.items(), strict=False):
    spec = protocol.TASKS[task]
    shown = []
    for name, row in rows.items():
      curves = np.array([r['curve'] for r in row['runs'].values()])
      mean, num_points = curves.mean(0), curves.shape[1]
      # Leaves the steep start out of the limits of the axis.
      shown += list(mean[num_points // 3 :])
      ratio = tables.time_of_a_step(times, task, name) or np.nan
      for ax, scale in zip(axes, (1, ratio), strict=True):
        x = scale * spec.steps * np.arange(1, num_points + 1) / num_points
        style = _style(name)
        ax.plot(x, mean, **style)
        low, high = curves.min(0), curves.max(0)
        ax.fill_between(
          x, low, high, color=style['color'], alpha=0.15, linewidth=0
        )
    _finish(axes[0], xlabel='Steps', ylabel='Validation loss')
    _finish(axes[1], xlabel='Time, in steps of AdamW')
    for ax in axes:
      ax.set_xlim(left=0)
    if not spec.tokens:
      axes[0].set_yscale('log')
    elif shown:
      axes[0].set_ylim(min(shown) - 0.02, np.quantile(shown, 0.95))
    axes[0].set_title(spec.title, loc='left', fontsize='medium')
  _legend(fig, grid[0, 0], loc='outside upper center', ncols=4)
  return fig


def plot_tuning(results: list[dict]) -> figure.Figure:
  """Draws best of n, and loss over learning rate, for the shortest task."""
  rows = tables.summary(results, protocol.LENGTHS[0])
  fig = figure.Figure(figsize=(6.5, 8), layout='constrained')
  top, bottom = fig.subplots(2, 1, sharey=True)
  for name, row in rows.items():
    tried = row['tried']
    if tried:
      n = range(1, len(tried) + 1)
      top.plot(n, [tables.best_of(tried, i) for i in n], **_style(name))
    elif row['runs']:
      loss = statistics.mean(r['loss'] for r in row['runs'].values())
      top.axhline(loss, **_style(name))
    if rates := row['rates']:
      bottom.plot(list(rates), rates.values(), **_style(name, marker='o'))
  if lowest := [row['searched'] for row in rows.values() if row['searched']]:
    top.set_ylim(min(lowest) - 0.03, min(lowest) + 0.3)
  _finish(
    top,
    xticks=[1, 5, 10, 15, 20],
    xlabel='Number n of trials; expected best of n',
    ylabel='Final validation loss',
  )
  _finish(
    bottom,
    xscale='log',
    xlabel='Learning rate, with the best other settings',
    ylabel='Final validation loss',
  )
  _legend(fig, top, loc='outside upper center', ncols=2)
  return fig
