"""How often a training breaks down in its first steps.

  python benchmarks/breakdown.py --output=benchmarks/breakdown.json
  python benchmarks/breakdown.py --show=benchmarks/breakdown.json

A run breaks down if its loss stops decreasing for some time. In runs of
convergence.py's shortest language task this happens during warm-up, or not at
all. So these runs stop after 180 of 1,200 steps, with the schedule of all. The
validation loss of a good run is then 2.2 to 2.4. That of a run that broke down
is 2.5 or more, and the run does not recover. There are twelve seeds, none of
which convergence.py uses.

AdamW and NAdamW have the best settings of convergence.json. Sophia has the
settings to copy of docs/choosing.md. Each is also run with other learning
rates.
"""

import pathlib
import statistics

from absl import app
import tqdm

import convergence
import convergence_protocol as protocol
import records

_TASK = protocol.LENGTHS[0]
_STEPS = 180
_LIMIT = 2.45
_SEEDS = range(5, 17)
_FACTORS = (1.0, 1.41)  # of the learning rate
# A limit that does not follow Adam's, and γ falls instead of adapting.
_FIXED_LIMIT = {
  'adam_b2': None,
  'cap': 0.3,
  'target_win_rate': None,
  'gamma_end': 0.1,
  'parts': 4,
}
# Name in the table, optimizer, and how its settings differ.
_ROWS = (
  ('AdamW', 'adamw', {}),
  ('NAdamW', 'nadamw', {}),
  ('Sophia-H, settings to copy', 'copied_h', {}),
  ('Sophia-G, settings to copy', 'copied_g', {}),
  (
    'Sophia-G, `max_update_rms=0.3`, warm-up of 3/8',
    'copied_g',
    _FIXED_LIMIT | {'warmup': 0.375},
  ),
  (
    'Sophia-G, `max_update_rms=0.3`, warm-up of 1/4',
    'copied_g',
    _FIXED_LIMIT | {'warmup': 0.25},
  ),
)


def best(optimizer: str) -> protocol.Case:
  """Returns the best case of the search in convergence.json."""
  record = pathlib.Path(__file__).with_name('convergence.json')
  losses = {
    protocol.case_of(r): r['loss'] for r in records.read(record)['runs']
  }
  _, case = protocol.search(_TASK, optimizer, losses, protocol.NUM_TRIALS)
  return case


def cases() -> list[dict]:
  """Returns the row, the optimizer and the settings of each case."""
  found = []
  for row, optimizer, changed in _ROWS:
    settings = protocol.settings(best(optimizer)) | changed
    for factor in _FACTORS:
      rate = {'learning_rate': factor * settings['learning_rate']}
      found.append(
        {'row': row, 'optimizer': optimizer, 'settings': settings | rate}
      )
  return found


def measure(case: dict) -> dict:
  """Trains with every seed, and adds the losses to a case."""
  name, settings = case['optimizer'], case['settings']
  losses = [
    convergence.train(_TASK, name, settings, seed, _STEPS)['loss']
    for seed in _SEEDS
  ]
  return case | {'losses': losses}


def render(found: list[dict]) -> str:
  """Lays out a Markdown table: runs that broke down, and the median loss."""
  lines = [
    '| | learning rate | broke down | median loss | highest loss |',
    '|---|---|---|---|---|',
  ]
  for case in found:
    losses = case['losses']
    broken = sum(loss > _LIMIT for loss in losses)
    lines.append(
      f'| {case["row"]} | {case["settings"]["learning_rate"]:.2g}'
      f' | {broken} of {len(losses)} | {statistics.median(losses):.2f}'
      f' | {max(losses):.2f} |'
    )
  return '\n'.join(lines)


def main(argv):
  """Runs, prints and writes."""
  records.check_only_flags(argv)
  if records.SHOW.value:
    print(render(records.read(records.SHOW.value)['cases']))
    return
  found = []
  for case in tqdm.tqdm(cases()):
    found.append(measure(case))
    if records.OUTPUT.value:
      records.write(records.OUTPUT.value, cases=found)
  print(render(found))


if __name__ == '__main__':
  app.run(main)
