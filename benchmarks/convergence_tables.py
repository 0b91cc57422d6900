"""Tables of the finished runs of benchmarks/convergence.py.

convergence_plots.py prints them. Their columns:

* Validation loss: mean ± standard deviation over the seeds of the report.
* − AdamW: difference from AdamW with the same seed.
* Steps to AdamW's: fraction of the steps after which the curve reaches AdamW's
  final loss with the same seed, averaged over seeds.
* Time of a step, relative to AdamW's; time to AdamW's loss: steps times this.
* Best of n: expected lowest loss of n trials drawn at random.
* Steps to AdamW's loss, of runs of three quarters of the steps: fraction of all
  steps, as `fraction_of_steps` computes it for each seed.
* Rates: the largest learning rate whose loss is within 0.03 of the best,
  divided by the smallest one.
"""

import dataclasses
import math
import statistics

import convergence_protocol as protocol

_WITHIN = 0.03
LABELS = {  # in the order of rows and lines
  'adamw': 'AdamW',
  'nadamw': 'NAdamW',
  'sophia_g': 'Sophia-G',
  'sophia_h': 'Sophia-H',
  'copied_g': 'Sophia-G, settings to copy',
  'copied_h': 'Sophia-H, settings to copy',
  'lion': 'Lion',
  'signum': 'Signum',
  'contrib': 'optax.contrib.sophia',
}


def losses_of(results: list[dict]) -> dict[protocol.Case, float]:
  """Returns the final loss of each case."""
  return {protocol.case_of(r): r['loss'] for r in results}


def num_trials(results: list[dict], task: str) -> int:
  """Returns how many trials all optimizers have finished in a task's search."""
  while protocol.TASKS[task].parent:
    task = protocol.TASKS[task].parent
  done = losses_of(results)
  searched = set(protocol.TASKS[task].peers) - set(protocol.UNTUNED)
  count = 0
  while all(protocol.Case(task, o, count) in done for o in searched):
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


def fraction_of_steps(
  part: float, shorter: float, full: float, target: float
) -> float:
  """Returns the fraction of the steps with which a run ends at a loss.

  The final loss is interpolated linearly over the logarithm of the steps.

  Args:
    part: Steps of the shorter run, as a fraction of those of the full run.
    shorter: Final loss of the shorter run.
    full: Final loss of the full run.
    target: The loss.
  """
  return part ** ((target - full) / (shorter - full))


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
    by seed) and `rates`.
  """
  losses = losses_of(results)
  of_task = [r for r in results if r['task'] == task]
  by_case = {protocol.case_of(r): r for r in of_task}
  count = num_trials(results, task)
  rows = {}
  for name in LABELS:
    of_name = [r for r in of_task if r['optimizer'] == name]
    searched = [
      r
      for r in of_name
      if r['seed'] == 0 and not r['variant'] and name not in protocol.UNTUNED
    ]
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


def time_of_a_step(times: dict, task: str, name: str) -> float | None:
  """Returns the time of a step relative to AdamW's, or None if not measured.

  Args:
    times: `ratio` of convergence_times.json.
    task: A key of `protocol.TASKS`.
    name: The optimizer.
  """
  return times.get(protocol.TASKS[task].problem, {}).get(name)


def _row(name, row, task, times):
  form = _form(task)
  ratio = time_of_a_step(times, task, name)
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
      time = f'{part * ratio:.2f}' if ratio else '–'
  tried = row['tried']
  best = '–'
  if len(tried) > 1 and protocol.TASKS[task].parent is None:
    best = ', '.join(
      f'{best_of(tried, n):{form}}'
      for n in (1, 5, len(tried))
      if n <= len(tried)
    )
  return [
    LABELS[name],
    _mean(losses, form),
    _mean(row['differences'].values(), '+' + form),
    steps,
    f'{ratio:.2f}' if ratio else '–',
    time,
    '–' if row['searched'] is None else f'{row["searched"]:{form}}',
    best,
    f'{width(row["rates"]):.1f}'
    if protocol.TASKS[task].margin == _WITHIN and len(row['rates']) > 2
    else '–',
  ]


def _steps_table(rows, spec, parent_rows):
  """Returns a table of the steps to the loss that AdamW has after all steps."""
  parent = protocol.TASKS[spec.parent]
  full = {name: row['runs'] for name, row in parent_rows.items()}
  cells = []
  for name, row in rows.items():
    fractions = [
      fraction_of_steps(
        spec.steps / parent.steps,
        row['runs'][seed]['loss'],
        full[name][seed]['loss'],
        full['adamw'][seed]['loss'],
      )
      for seed in row['runs'].keys() & full[name].keys() & full['adamw'].keys()
    ]
    cells.append([LABELS[name], _mean(fractions, '.2f')])
  return _table(['', f"steps to AdamW's loss, {parent.title}"], cells)


def render(results: list[dict], times: dict) -> str:
  """Returns Markdown tables of all runs.

  Args:
    results: All runs.
    times: `ratio` of convergence_times.json.
  """
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
        'time of a step',
        "time to AdamW's",
        'search',
        'best of 1, 5, all trials',
        'rates',
      ],
      [_row(name, row, task, times) for name, row in rows.items()],
    )
    found = {name: row for name, row in rows.items() if row['best']}
    if found:
      lines += ['Settings, and devices of the runs:', '']
      for name, row in found.items():
        chosen = ', '.join(
          f'{k} {v:g}' if isinstance(v, float) else f'{k} {v}'
          for k, v in protocol.settings(row['best']).items()
        )
        devices = ', '.join(sorted({r['device'] for r in row['runs'].values()}))
        lines.append(f'* {LABELS[name]}: {chosen}; {devices or "no runs"}')
      lines.append('')
    spec = protocol.TASKS[task]
    if spec.parent in summaries and spec.margin is None:
      lines += _steps_table(rows, spec, summaries[spec.parent])
    variants = [
      [
        LABELS[name],
        variant,
        _mean(
          [
            r['loss'] - row['runs'][seed]['loss']
            for seed, r in runs.items()
            if seed in row['runs']
          ],
          '+' + _form(task),
        ),
      ]
      for name, row in rows.items()
      for variant, runs in row['variants'].items()
    ]
    if variants:
      lines += _table(['', 'variant', 'difference'], variants)
  lines += ['### Cost', '']
  costs = []
  for task in summaries:
    of_task = [r for r in results if r['task'] == task]
    on_cpu = [r['seconds'] for r in of_task if r['device'] == 'cpu']
    hours = f'{sum(on_cpu) / 3600:.2f}' if on_cpu else '–'
    costs.append([task, str(len(of_task)), hours])
  lines += _table(['', 'runs', 'hours of a core, without GPUs'], costs)
  return '\n'.join(lines)
