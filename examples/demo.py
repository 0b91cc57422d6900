"""Trains a small GPT with AdamW, NAdamW, Sophia-H and Sophia-G.

  python examples/demo.py

All start from the same parameters and train on the same batches. After Ctrl-C
the script saves a checkpoint and shows the table and the plot so far.
"""

import dataclasses
import os
import time

from absl import app
from absl import flags
from absl import logging
from matplotlib import figure

import gpt_configs
import text
import train_gpt

# Okabe and Ito's colours. Line styles differ too, for prints in grey.
STYLES = {
  'adamw': {'label': 'AdamW', 'color': '#000000', 'linestyle': '--'},
  'nadamw': {'label': 'NAdamW', 'color': '#CC79A7', 'linestyle': ':'},
  'sophia_h': {'label': 'Sophia-H', 'color': '#0072B2', 'linestyle': '-'},
  'sophia_g': {'label': 'Sophia-G', 'color': '#D55E00', 'linestyle': '-.'},
}
_BASELINE = 'adamw'  # runs first


def train_all(out_dir, **overrides) -> dict[str, train_gpt.Result]:
  """Trains with each optimizer in turn, until a run is interrupted."""
  results = {}
  for optimizer in STYLES:
    results[optimizer] = train_gpt.train(
      dataclasses.replace(
        gpt_configs.CONFIGS['demo'],
        optimizer=optimizer,
        out_dir=os.path.join(out_dir, optimizer),
        **overrides,
      )
    )
    if not results[optimizer].finished:
      break
  return results


def _target(results):
  history = results[_BASELINE].history
  return history[-1]['val_loss'] if history else float('-inf')


def table(results: dict[str, train_gpt.Result]) -> str:
  """Compares the runs with the baseline's final validation loss."""
  target = _target(results)
  row = '{:10} {:>6} {:>10} {:>8} {:>9} {:>10} {:>9}'.format
  lines = [
    row('', '', 'validation', 'steps to', 'seconds', 'mean step', 'compile'),
    row('optimizer', 'steps', 'loss', 'target', 'to target', 'ms', 's'),
  ]
  for optimizer, result in results.items():
    name = STYLES[optimizer]['label']
    if not result.history:
      lines.append(row(name, *['-'] * 6))
      continue
    last = result.history[-1]
    reached = next((h for h in result.history if h['val_loss'] <= target), None)
    lines.append(
      row(
        name,
        last['step'],
        f'{last["val_loss"]:.3f}',
        reached['step'] if reached else 'never',
        f'{reached["seconds"]:.1f}' if reached else 'never',
        f'{1e3 * last["seconds"] / last["step"]:.0f}',
        f'{result.compile_seconds:.1f}',
      )
    )
  lines.append(
    f"Target: {STYLES[_BASELINE]['label']}'s final validation loss. Seconds "
    'do not include compilation,\nvalidation and checkpoints.'
  )
  return '\n'.join(lines)


def _plot_losses(axes, results):
  """Draws validation loss over steps and over seconds of training."""
  losses = []
  for ax, key, unit in zip(
    axes, ('step', 'seconds'), ('Steps', 'Seconds of training'), strict=True
  ):
    for optimizer, result in results.items():
      values = [entry['val_loss'] for entry in result.history]
      # Leaves the steep start out of the limits of the axis.
      losses += values[len(values) // 6 :]
      ax.plot(
        [entry[key] for entry in result.history],
        values,
        linewidth=2,
        **STYLES[optimizer],
      )
    if losses:
      ax.axhline(_target(results), color='#999999', linewidth=1, zorder=0)
    ax.set_xlabel(unit)
  if losses:
    margin = 0.05 * (max(losses) - min(losses)) + 1e-3
    axes[0].set_ylim(min(losses) - margin, max(losses) + margin)
  axes[0].set_ylabel('Validation loss (nats)')
  axes[0].legend(frameon=False)


def _plot_differences(ax, results):
  """Draws the difference of each validation loss from the baseline's."""
  baseline = {h['step']: h['val_loss'] for h in results[_BASELINE].history}
  for optimizer, result in results.items():
    both = [h for h in result.history if h['step'] in baseline]
    ax.plot(
      [h['step'] for h in both],
      [h['val_loss'] - baseline[h['step']] for h in both],
      linewidth=2,
      **STYLES[optimizer],
    )
  # Early differences are ten times larger than late ones, so they are cut off.
  ax.set(
    xlabel='Steps',
    ylabel=f"Loss − {STYLES[_BASELINE]['label']}'s",
    ylim=(-0.15, 0.15),
  )


def _plot_win_rates(ax, results):
  """Draws Sophia's win rate over steps."""
  for optimizer, result in results.items():
    entries = [entry for entry in result.history if 'win_rate' in entry]
    ax.plot(
      [entry['step'] for entry in entries],
      [entry['win_rate'] for entry in entries],
      linewidth=2,
      **STYLES[optimizer],
    )
  ax.axhspan(0.1, 0.5, color='#999999', alpha=0.15, linewidth=0)
  ax.text(
    0.02,
    0.11,
    'tune γ for this range',
    fontsize='small',
    va='bottom',
    transform=ax.get_yaxis_transform(),
  )
  ax.set(xlabel='Steps', ylabel='Win rate', ylim=(0, 1))


def plot(results: dict[str, train_gpt.Result]) -> figure.Figure:
  """Draws losses, their differences from the baseline's, and win rates."""
  # Small, so that the labels can be read on a phone.
  fig = figure.Figure(figsize=(7, 6), layout='constrained')
  axes = fig.subplots(2, 2, height_ratios=(3, 2))
  axes[0, 0].sharey(axes[0, 1])
  _plot_losses(axes[0], results)
  _plot_differences(axes[1, 0], results)
  _plot_win_rates(axes[1, 1], results)
  for ax in axes.flat:
    ax.locator_params(axis='x', nbins=5)
    ax.grid(alpha=0.25)
    ax.set_xlim(left=0)
    ax.spines[['top', 'right']].set_visible(False)
  fig.suptitle('Byte-level GPT on the text of the standard library')
  return fig


def define_flags():
  flags.DEFINE_string(
    'out_dir',
    None,
    'Folder for checkpoints and plot. Runs in it are '
    'resumed. By default a new folder in runs/.',
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --out_dir=x; got {argv[1:]}.'
    )
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file as INFO
  out_dir = flags.FLAGS.out_dir or time.strftime('runs/demo-%Y%m%d-%H%M%S')
  tokens = text.standard_library()
  print(
    f'Text: {len(tokens):,} bytes of the standard library, '
    f'SHA-256 {text.fingerprint(tokens)}'
  )
  results = train_all(out_dir)
  print(table(results))
  path = os.path.abspath(os.path.join(out_dir, 'validation_loss.png'))
  plot(results).savefig(path, dpi=200)
  print(f'Plot: {path}')
  if not all(result.finished for result in results.values()):
    print(
      f'Interrupted. To continue: python examples/demo.py --out_dir={out_dir}'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)
