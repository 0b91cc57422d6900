"""Tables of benchmarks/convergence.py, of the searches that are finished.

Their columns:

* Validation loss: mean ± standard deviation over the seeds of the report.
* − AdamW: difference from AdamW with the same seed.
* Steps to AdamW's: fraction of the steps after which the curve reaches AdamW's
  final loss with the same seed, averaged over seeds.
* Time of a step, relative to AdamW's; time to AdamW's loss: steps times this.
* Rates: the largest learning rate whose loss is within 0.03 of the best,
  divided by the smallest one.
"""

import dataclasses
import statistics

import convergence_protocol as protocol
import records

_WITHIN = 0.03
LABELS = {  # in the order of rows
  'adamw': 'AdamW',
  'nadamw': 'NAdamW',
  'sophia_g': 'Sophia-G',
  'sophia_h': 'Sophia-H',
  'copied_g': 'Sophia-G, settings to copy',
  'copied_h': 'Sophia-H, settings to copy',
  'eigen_g': 'Sophia-G in the eigenbasis',
  'eigen_h': 'Sophia-H in the eigenbasis',
  'soap': 'NAdamW in the eigenbasis (SOAP)',
  'muon': 'Muon',
  'tuned_muon': 'Muon, 20 trials',
  'lion': 'Lion',
  'signum': 'Signum',
  'contrib': 'optax.contrib.sophia',
}


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


def width(losses: dict[float, float], within: float = _WITHIN) -> float:
  """Returns the ratio of the largest to the smallest rate with a good loss.

  Of losses by rate, a good one is at most `within` above the lowest. The limits
  are interpolated linearly over the logarithm of the rate.
  """
  limit = min(losses.values()) + within
  best = min(losses, key=losses.get)
  edges = []
  for rates in sorted(losses), sorted(losses, reverse=True):
    inside = best
    for rate in rates[rates.index(best) + 1 :]:
      if losses[rate] > limit:
        part = (limit - losses[inside]) / (losses[rate] - losses[inside])
        inside *= (rate / inside) ** part
        break
      inside = rate
    edges.append(inside)
  return edges[0] / edges[1]


def summary(results: list[dict], task: str) -> dict[str, dict]:
  """Collects the data of a task for tables and plots, by optimizer.

  They are `best` (the best case of the search), `runs` (by seed), `variants`
  (runs by name and seed), `differences` (from AdamW, by seed) and `parts`
  (fraction of the steps to AdamW's loss, by seed).
  """
  losses = protocol.losses_of(results)
  rows = {}
  for name in filter(protocol.TASKS[task].peers.__contains__, LABELS):
    _, best = protocol.search(task, name, losses)
    if best is None:
      continue
    runs = {'': {}}
    for result in results:
      case = protocol.case_of(result)
      reported = dataclasses.replace(case, seed=best.seed, variant='')
      if reported == best and case.seed in protocol.SEEDS:
        runs.setdefault(case.variant, {})[case.seed] = result
    rows[name] = {'best': best, 'runs': runs.pop(''), 'variants': runs}
  first = rows['adamw']['runs'] if 'adamw' in rows else {}
  for row in rows.values():
    runs = {seed: run for seed, run in row['runs'].items() if seed in first}
    row['differences'] = {
      seed: run['loss'] - first[seed]['loss'] for seed, run in runs.items()
    }
    row['parts'] = {
      seed: part_to(run['curve'], first[seed]['curve'][-1])
      for seed, run in runs.items()
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


def _row(name, row, task, times, losses):
  form = _form(task)
  ratio = time_of_a_step(times, task, name)
  steps, time = _steps_and_time(list(row['parts'].values()), ratio)
  rates = {
    protocol.settings(case)['learning_rate']: loss
    for case, loss in protocol.swept_from(row['best'], losses).items()
  }
  is_swept = protocol.TASKS[task].margin == _WITHIN and len(rates) > 2
  return [
    LABELS[name],
    _mean((r['loss'] for r in row['runs'].values()), form),
    _mean(row['differences'].values(), '+' + form),
    steps,
    f'{ratio:.2f}' if ratio else '–',
    time,
    f'{width(rates):.1f}' if is_swept else '–',
  ]


def _settings(rows):
  """Lists the settings of the best case of each optimizer."""
  return '\n'.join(
    f'* {LABELS[name]}: '
    + ', '.join(
      f'{key} {x:g}' if isinstance(x, float) else f'{key} {x}'
      for key, x in protocol.settings(row['best']).items()
    )
    for name, row in rows.items()
  )


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


def render(results: list[dict], times: dict) -> str:
  """Returns Markdown tables of all tasks, with times as above."""
  losses = protocol.losses_of(results)
  parts = []
  for task, spec in protocol.TASKS.items():
    rows = summary(results, task)
    if not rows:
      continue
    header = ['', 'validation loss', '− AdamW', "steps to AdamW's"]
    header += ['time of a step', "time to AdamW's", 'rates']
    table = (_row(*x, task, times, losses) for x in rows.items())
    parts += [f'### {spec.title}', records.markdown(header, table)]
    parts += ['Settings:', _settings(rows)]
    if variants := list(_variants(rows, task)):
      parts.append(records.markdown(['', 'variant', 'difference'], variants))
  return '\n\n'.join(parts)
