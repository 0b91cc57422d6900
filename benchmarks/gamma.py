"""Compares a fixed γ with one that is adjusted to a win rate.

  python benchmarks/gamma.py --output=benchmarks/gamma.json
  python benchmarks/gamma.py --show=benchmarks/gamma.json

Each run is one of examples/train_gpt.py, with 250 steps of 8,192 tokens. Except
for γ and target_win_rate, the settings are the best of twelve random trials.
Columns: final validation loss and win rate, the final γ, and the first
validation after which the win rate stays within 0.1 of the target. Nothing is
timed.
"""

import dataclasses
import sys

from absl import app
import tqdm

import records

sys.path.append(records.EXAMPLES)
import gpt_configs
import train_gpt

_TARGET = 0.3
_SHORT = gpt_configs.Config(
  unroll=2, num_steps=250, batch_size=128, eval_interval=10
)
_TUNED = {
  'sophia_h': dataclasses.replace(
    _SHORT,
    optimizer='sophia_h',
    b1=0.816,
    b2=0.968,
    warmup_steps=125,
    learning_rate=0.00399,
    gamma=0.00487,
    update_interval=5,
  ),
  'sophia_g': dataclasses.replace(
    _SHORT,
    optimizer='sophia_g',
    b1=0.737,
    b2=0.975,
    warmup_steps=125,
    learning_rate=0.00712,
    gamma=0.0186,
    update_interval=2,
    curvature_batch_size=64,
    curvature_parts=8,
  ),
}
# Initial γ, in multiples of the tuned one.
_STARTS = (1e-2, 1.0, 1e2)


def run(optimizer: str, start: float, target: float) -> dict:
  """Trains once and returns the case with the history of its validations."""
  tuned = _TUNED[optimizer]
  config = dataclasses.replace(
    tuned, gamma=start * tuned.gamma, target_win_rate=target
  )
  history = train_gpt.train(config).history
  return {
    'optimizer': optimizer,
    'start': start,
    'gamma': config.gamma,
    'target_win_rate': target,
    'history': history,
  }


def render(cases: list[dict]) -> str:
  """Returns a table with one line for each optimizer and initial γ."""
  lines = [
    f'{"":24}{"fixed":>24}{f"steered to {_TARGET}":>46}',
    f'{"":9}{"start / tuned γ":>15}{"loss":>12}{"win rate":>12}'
    f'{"loss":>12}{"win rate":>12}{"γ / tuned":>12}{"from step":>10}',
  ]
  by_key = {
    (c['optimizer'], c['start'], c['target_win_rate']): c for c in cases
  }
  for optimizer, start, target in by_key:
    if target:
      continue
    fixed = by_key[optimizer, start, 0.0]['history'][-1]
    case = by_key.get((optimizer, start, _TARGET))
    line = (
      f'{optimizer:9}{start:15g}{fixed["val_loss"]:12.3f}'
      f'{fixed["win_rate"]:12.2f}'
    )
    if case:
      last = case['history'][-1]
      outside = [
        h['step'] for h in case['history'] if abs(h['win_rate'] - _TARGET) > 0.1
      ]
      steps = [
        h['step']
        for h in case['history']
        if not outside or h['step'] > outside[-1]
      ]
      line += (
        f'{last["val_loss"]:12.3f}{last["win_rate"]:12.2f}'
        f'{last["gamma_factor"] * start:12.3g}'
        f'{steps[0] if steps else "never":>10}'
      )
    lines.append(line)
  return '\n'.join(lines)


def main(argv):
  """Runs, prints and writes."""
  records.check_only_flags(argv)
  if records.SHOW.value:
    print(render(records.read(records.SHOW.value)['cases']))
    return
  runs = [
    (optimizer, start, target)
    for optimizer in ('sophia_h', 'sophia_g')
    for start in _STARTS
    for target in (0.0, _TARGET)
  ]
  cases = []
  for args in tqdm.tqdm(runs):
    cases.append(run(*args))
    if records.OUTPUT.value:
      records.write(records.OUTPUT.value, cases=cases)
  print(render(cases))


if __name__ == '__main__':
  app.run(main)
