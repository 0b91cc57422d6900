"""Tables of the finished runs of benchmarks/convergence.py.

Their columns:

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
* Broke down: runs whose loss after 180 steps is above 2.45. A good run is then
  at 2.2 to 2.4, and the others do not recover.
"""

import dataclasses
import math
import statistics

import convergence_protocol as protocol
import records

_WITHIN = 0.03
_BROKE_DOWN = 2.45
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
  """Returns the fraction of a run after which its curve reaches a loss, if so.

  The losses of a curve are at evenly spaced steps, the last one at the end.
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
  """Returns the fraction of the steps with which a run ends at `target`.

  The final loss is interpolated linearly over the logarithm of the steps,
  between a run of all steps (`full`) and one of a part of them (`shorter`).
  """
  return part ** ((target - full) / (shorter - full))


def rates(
  losses: dict[protocol.Case, float], best: protocol.Case
) -> dict[float, float]:
  """Returns losses by learning rate, with the other settings of the best."""
  found = {
    protocol.settings(case)['learning_rate']: protocol.score(case, losses)
    for case in losses
    if case.trial == best.trial
    and dataclasses.replace(case, rate=best.rate) == best
  }
  return dict(sorted((x, y) for x, y in found.items() if y is not None))


def width(losses: dict[float, float], within: float = _WITHIN) -> float:
  """Returns the ratio of the largest to the smallest rate with a good loss.

  A good loss is at most `within` above the lowest one. The limits are
  interpolated linearly over the logarithm of the rate.
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
  """Collects the data of a task for tables and plots, by optimizer.

  They are `tried` (losses of the trials), `best` (the best case, or None before
  the search has ended), `searched` (the lowest loss of the search, or None),
  `runs` (by seed), `variants` (by name and seed), `parts` (fraction of the
  steps to AdamW's loss, by seed), `differences` (from AdamW, by seed) and
  `rates`.
  """
  losses = losses_of(results)
  spec = protocol.TASKS[task]
  count = num_trials(results, task)
  rows = {}
  for name in LABELS:
    of_name = {
      case: r
      for r in results
      if (r['task'], r['optimizer']) == (task, name)
      for case in [protocol.case_of(r)]
    }
    if not of_name:
      continue
    best = None
    if count and name in spec.peers:
      _, best = protocol.search(task, name, losses, count)
    runs = {'': {}}
    for case, result in of_name.items():
      reported = dataclasses.replace(case, seed=0, variant='')
      if reported == best and case.seed in spec.seeds:
        runs.setdefault(case.variant, {})[case.seed] = result
    searched = {
      case: r['loss']
      for case, r in of_name.items()
      if case.seed == 0 and not case.variant and name not in protocol.UNTUNED
    }
    rows[name] = {
      'tried': [loss for case, loss in searched.items() if case.rate == 0],
      'best': best,
      'searched': min(searched.values(), default=None),
      'runs': runs.pop(''),
      'variants': runs,
      'rates': rates(losses, best) if best else {},
    }
  first = rows.get('adamw', {'runs': {}})['runs']
  for row in rows.values():
    pairs = {
      seed: (run, first[seed])
      for seed, run in sorted(row['runs'].items())
      if seed in first
    }
    row['differences'] = {
      seed: run['loss'] - adamw['loss'] for seed, (run, adamw) in pairs.items()
    }
    row['parts'] = {
      seed: part_to(run['curve'], adamw['curve'][-1])
      for seed, (run, adamw) in pairs.items()
      if not spec.stop
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


def _form(task):
  return '.3f' if protocol.TASKS[task].tokens else '.3g'


def time_of_a_step(times: dict, task: str, name: str) -> float | None:
  """Returns the time of a step relative to AdamW's, or None if not measured.

  The times are `optimizers` of convergence_times.json.
  """
  of_problem = times.get(protocol.TASKS[task].problem, {})
  return of_problem.get(name, {}).get('time/adamw')


def _steps_and_time(parts, ratio):
  """Returns the cells of the steps and the time to AdamW's loss."""
  reached = [part for part in parts if part is not None]
  if not reached:
    return ['never', 'never'] if parts else ['–', '–']
  part = statistics.mean(reached)
  few = f' ({len(reached)} of {len(parts)} seeds)' * (len(reached) < len(parts))
  return [f'{part:.2f}{few}', f'{part * ratio:.2f}' if ratio else '–']


def _row(name, row, task, times):
  form, spec = _form(task), protocol.TASKS[task]
  ratio = time_of_a_step(times, task, name)
  steps, time = _steps_and_time(list(row['parts'].values()), ratio)
  tried, searched = row['tried'], row['searched']
  best = [f'{best_of(tried, n):{form}}' for n in (1, 5) if n < len(tried)]
  if spec.parent or len(tried) < 2:
    best = ['–']
  else:
    best.append(f'{min(tried):{form}}')
  is_swept = spec.margin == _WITHIN and len(row['rates']) > 2
  return [
    LABELS[name],
    _mean((r['loss'] for r in row['runs'].values()), form),
    _mean(row['differences'].values(), '+' + form),
    steps,
    f'{ratio:.2f}' if ratio else '–',
    time,
    '–' if searched is None else f'{searched:{form}}',
    ', '.join(best),
    f'{width(row["rates"]):.1f}' if is_swept else '–',
  ]


def _settings(rows):
  """Yields the settings of the best case of each optimizer, and its devices."""
  for name, row in rows.items():
    if not row['best']:
      continue
    chosen = ', '.join(
      f'{k} {v:g}' if isinstance(v, float) else f'{k} {v}'
      for k, v in protocol.settings(row['best']).items()
    )
    devices = ', '.join(sorted({r['device'] for r in row['runs'].values()}))
    yield f'* {LABELS[name]}: {chosen}; {devices or "no runs"}'


def _fractions(rows, task, parent_rows):
  """Yields the steps to the loss that AdamW has after all steps, by name."""
  spec = protocol.TASKS[task]
  part = spec.steps / protocol.TASKS[spec.parent].steps
  target = parent_rows['adamw']['runs']
  for name, row in rows.items():
    full = parent_rows[name]['runs']
    fractions = [
      fraction_of_steps(
        part, run['loss'], full[seed]['loss'], target[seed]['loss']
      )
      for seed, run in row['runs'].items()
      if seed in full and seed in target
    ]
    yield [LABELS[name], _mean(fractions, '.2f')]


def _variants(rows, task):
  """Yields how much the loss of each variant differs."""
  for name, row in rows.items():
    for variant, runs in row['variants'].items():
      differences = (
        run['loss'] - row['runs'][seed]['loss']
        for seed, run in runs.items()
        if seed in row['runs']
      )
      yield [LABELS[name], variant, _mean(differences, '+' + _form(task))]


def _breakdowns(results, task):
  """Yields how many runs of each kind broke down, and the losses."""
  kinds = {}
  for result in results:
    if result['task'] == task:
      kind = dataclasses.replace(protocol.case_of(result), seed=0)
      kinds.setdefault(kind, []).append(result['loss'])
  order = list(LABELS)
  for kind, losses in sorted(
    kinds.items(), key=lambda x: (order.index(x[0].optimizer), x[0].variant)
  ):
    yield [
      ', '.join(filter(None, [LABELS[kind.optimizer], kind.variant])),
      f'{protocol.settings(kind)["learning_rate"]:.2g}',
      f'{sum(x > _BROKE_DOWN for x in losses)} of {len(losses)}',
      f'{statistics.median(losses):.2f}',
      f'{max(losses):.2f}',
    ]


def _render_task(results, summaries, task, times):
  """Yields the tables of a task."""
  spec, rows = protocol.TASKS[task], summaries[task]
  yield f'### {spec.title}'
  if spec.stop:
    header = ['', 'learning rate', 'broke down', 'median loss', 'highest loss']
    yield records.markdown(header, _breakdowns(results, task))
    return
  header = [
    '',
    'validation loss',
    '− AdamW',
    "steps to AdamW's",
    'time of a step',
    "time to AdamW's",
    'search',
    'best of 1, 5, all trials',
    'rates',
  ]
  yield records.markdown(header, (_row(*x, task, times) for x in rows.items()))
  if settings := list(_settings(rows)):
    yield 'Settings, and devices of the runs:'
    yield '\n'.join(settings)
  if spec.parent in summaries and spec.margin is None:
    title = protocol.TASKS[spec.parent].title
    fractions = _fractions(rows, task, summaries[spec.parent])
    yield records.markdown(['', f"steps to AdamW's loss, {title}"], fractions)
  if variants := list(_variants(rows, task)):
    yield records.markdown(['', 'variant', 'difference'], variants)


def render(results: list[dict], times: dict) -> str:
  """Returns Markdown tables of all runs, and of times as above."""
  tasks = {r['task'] for r in results}
  summaries = {t: summary(results, t) for t in protocol.TASKS if t in tasks}
  parts = []
  for task in summaries:
    parts += _render_task(results, summaries, task, times)
  costs = []
  for task in summaries:
    of_task = [r for r in results if r['task'] == task]
    seconds = [r.get('seconds', 0) for r in of_task if r['device'] == 'cpu']
    hours = f'{sum(seconds) / 3600:.2f}' if any(seconds) else '–'
    costs.append([task, str(len(of_task)), hours])
  header = ['', 'runs', 'hours of a core, without GPUs']
  return '\n\n'.join([*parts, '### Cost', records.markdown(header, costs)])
