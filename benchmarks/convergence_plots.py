"""The plot of the finished runs of benchmarks/convergence.py."""

from matplotlib import figure
import numpy as np

import convergence_protocol as protocol
import convergence_tables as tables

_GREY = '#808080'  # Readable on white and on black.
# Colours of Okabe and Ito. NAdamW and Sophia-G, and the last two, are close.
_LINES = {
  'adamw': ('AdamW', _GREY),
  'nadamw': ('', '#CC79A7'),
  'copied_g': ('NAdamW,\nSophia-G', '#D55E00'),
  'muon': ('Muon', '#009E73'),
  'eigen_g': ('', '#56B4E9'),
  'soap': ('SOAP,\nSophia-G\nin the basis', '#3A8DC8'),
}


def plot_lengths(results: list[dict]) -> figure.Figure:
  """Draws the difference from AdamW over the length of the run.

  Lines are means of three seeds; bars go from the lowest to the highest.
  """
  # As wide as a phone, so that the text can be read there.
  fig = figure.Figure(figsize=(4.16, 3.0), layout='constrained')
  ax = fig.subplots()
  summaries = {t: tables.summary(results, t) for t in protocol.LENGTHS}
  for name, (label, color) in _LINES.items():
    points = {
      protocol.TASKS[task].tokens: list(rows[name]['differences'].values())
      for task, rows in summaries.items()
      if name in rows and rows[name]['differences']
    }
    if not points:
      continue
    low, mean, high = (
      np.array([f(x) for x in points.values()]) for f in (min, np.mean, max)
    )
    ax.plot(list(points), mean, marker='o', color=color)
    ax.vlines(list(points), low, high, color=color, alpha=0.4)
    ax.annotate(
      label, (min(points), mean[0]), (-7, 0), color=color, ha='right',
      textcoords='offset points', va='center', fontsize='small',
    )  # fmt: skip
  ticks = [protocol.TASKS[task].tokens for task in protocol.LENGTHS]
  ax.set_xscale('log')
  ax.set_xticks(ticks, [f'{t:.0f}' for t in ticks])
  ax.set_xlim(left=ticks[0] / 3)
  ax.minorticks_off()
  ax.set_xlabel('Tokens for each parameter', color=_GREY)
  ax.set_title(
    "Final validation loss minus AdamW's", loc='left', fontsize='medium',
    color=_GREY,
  )  # fmt: skip
  ax.tick_params(colors=_GREY)
  ax.grid(color=_GREY, alpha=0.25)
  ax.spines[:].set_visible(False)
  return fig
