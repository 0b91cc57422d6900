"""Trains a small GPT with AdamW, NAdamW, and Sophia-G in the eigenbasis.

  python examples/demo.py

All start from the same parameters and train on the same batches. After Ctrl-C
the script saves a checkpoint and shows the table and the plot so far.
"""

import dataclasses
import json
import os
import time

from absl import app
from absl import flags
from absl import logging
from matplotlib import figure

import gpt_configs
import text
import train_gpt

# What is trained: name, colour and settings. The others are compared with the
# first.
RUNS = {
  'adamw': ('AdamW', '#808080', {'optimizer': 'adamw'}),
  'nadamw': ('NAdamW', '#CC79A7', {'optimizer': 'nadamw'}),
  'eigenbasis': (
    'Eigenbasis',
    '#3A8DC8',
    {'optimizer': 'sophia_g', 'eigenbasis': True},
  ),
}
_BASELINE = next(iter(RUNS))


def train_all(out_dir, **overrides) -> dict[str, train_gpt.Result]:
  """Trains with each optimizer in turn, until a run is interrupted."""
  results = {}
  for name, (_, _, settings) in RUNS.items():
    results[name] = train_gpt.train(
      dataclasses.replace(
        gpt_configs.CONFIGS['demo'],
        out_dir=os.path.join(out_dir, name),
        **settings,
        **overrides,
      )
    )
    if not results[name].finished:
      break
  return results


def losses(result: train_gpt.Result) -> dict[int, float]:
  """Returns the validation losses by step, rounded."""
  return {h['step']: round(h['val_loss'], 4) for h in result.history}


def _steps_to_target(results):
  """Returns the step at which each run reached the baseline's final loss."""
  history = results[_BASELINE].history
  target = history[-1]['val_loss'] if history else float('-inf')
  reached = {
    optimizer: next(
      (h['step'] for h in result.history if h['val_loss'] <= target), None
    )
    for optimizer, result in results.items()
  }
  return {optimizer: step for optimizer, step in reached.items() if step}


def table(results: dict[str, train_gpt.Result]) -> str:
  """Compares the runs with the baseline's final validation loss."""
  baseline, *_ = RUNS[_BASELINE]
  row = '{:13} {:>6} {:>10} {:>9} {:>8}'.format
  lines = [
    row('', '', 'validation', 'steps to', 'ms for'),
    row('optimizer', 'steps', 'loss', f"{baseline}'s", 'a step'),
  ]
  reached = _steps_to_target(results)
  for optimizer, result in results.items():
    cells = ['-'] * 4
    if result.history:
      last = result.history[-1]
      cells = [
        last['step'],
        f'{last["val_loss"]:.3f}',
        reached.get(optimizer, 'never'),
        f'{1e3 * last["seconds"] / last["step"]:.0f}',
      ]
    lines.append(row(RUNS[optimizer][0], *cells))
  return '\n'.join(lines)


def conclusion(results: dict[str, train_gpt.Result]) -> str:
  """Says how many steps the others needed, after runs to the end."""
  reached = _steps_to_target(results)
  num_steps = reached.pop(_BASELINE)
  others = ', '.join(
    f'by {RUNS[optimizer][0]} after {100 * step / num_steps:.0f} %'
    for optimizer, step in reached.items()
  )
  return (
    f"{RUNS[_BASELINE][0]}'s final loss was reached "
    f'{others or "by no other within 100 %"} of the steps.'
  )


def plot(results: dict[str, train_gpt.Result]) -> figure.Figure:
  """Draws the difference of each validation loss from the baseline's."""
  # Small, so that the text can be read on a phone.
  fig = figure.Figure(figsize=(4.16, 2.8), layout='constrained')
  ax = fig.subplots()
  baseline = losses(results[_BASELINE])
  ends, late = [], [0.0]
  for optimizer, result in results.items():
    both = {t: x for t, x in losses(result).items() if t in baseline}
    steps, values = list(both), [x - baseline[t] for t, x in both.items()]
    label, color, _ = RUNS[optimizer]
    ax.plot(steps, values, color=color, label=label)
    # Leaves the steep start out of the limits of the axis.
    late += values[len(values) // 6 :]
    if both:
      ends.append((values[-1], steps[-1], label, color))
  low, high = min(late) - 0.005, max(late) + 0.01
  # Each line is labelled at its end, a label above the one before.
  y = low
  for value, step, label, color in sorted(ends):
    y = max(value, y)
    ax.annotate(
      label, (step, y), (4, 0), textcoords='offset points', color=color,
      va='center', annotation_clip=False,
    )  # fmt: skip
    y += 0.075 * (high - low)
  ax.set(xlabel='Steps', xlim=(0, None), ylim=(low, high))
  ax.set_title(
    f"Validation loss minus {RUNS[_BASELINE][0]}'s",
    fontsize='medium', color='#808080', loc='left',
  )  # fmt: skip
  ax.xaxis.label.set_color('#808080')
  ax.tick_params(colors='#808080')
  ax.locator_params(nbins=5)
  ax.grid(color='#808080', alpha=0.25)
  ax.spines[:].set_visible(False)
  return fig


def define_flags():
  flags.DEFINE_string(
    'out_dir',
    None,
    'Folder for checkpoints and plot. Runs in it are '
    'resumed. By default a new folder in runs/.',
  )
  flags.DEFINE_integer('seed', 0, 'For parameters and batches.')


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
  results = train_all(out_dir, seed=flags.FLAGS.seed)
  print(table(results))
  with open(os.path.join(out_dir, 'losses.json'), 'w') as f:
    json.dump({name: losses(result) for name, result in results.items()}, f)
  path = os.path.abspath(os.path.join(out_dir, 'validation_loss.png'))
  plot(results).savefig(path, dpi=200, transparent=True)
  print(f'Plot: {path}')
  if all(result.finished for result in results.values()):
    print(conclusion(results))
  else:
    print(
      f'Interrupted. To continue: python examples/demo.py --out_dir={out_dir}'
      f' --seed={flags.FLAGS.seed}'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)
