"""The tables and the plot of tpu.py."""

import collections
from collections.abc import Iterable
from typing import Any

from matplotlib import figure
from matplotlib import patches

import hlo
import records
import tpu_cases

# Of the plot, by program; they are Okabe's and Ito's.
_COLORS = {'ordinary': '#0072B2', 'refresh': '#E69F00', 'one': '#999999'}
COUNT = 4 * tpu_cases.SIZE**2  # parameters of the update alone
_K = 10  # steps from one refresh to the next


_WAYS = {'one program': ('one', 'one'), 'two programs': ('ordinary', 'refresh')}


def _group(cases: list[dict], key: str) -> dict[str, list[dict]]:
  """Returns the cases by the value of a key."""
  groups: dict[str, list[dict]] = {}
  for case in cases:
    groups.setdefault(case[key], []).append(case)
  return groups


def _programs(cases: list[dict]) -> dict[str, dict[str, dict]]:
  """Returns figures by row and program."""
  return {
    row: {case['program']: case for case in of_row}
    for row, of_row in _group(cases, 'row').items()
  }


def _pair(cells: Iterable[str]) -> str:
  return ' / '.join(dict.fromkeys(cells))


def update_words(cases: list[dict]) -> dict[str, dict[str, Any]]:
  """Returns words for each parameter of the update alone, by row and way."""
  words = lambda n: n / (4 * COUNT)
  programs = _programs(cases)
  found = {}
  for row, of_row in programs.items():
    estimator = f'{row.split(", ")[1]} alone' if ', ' in row else None
    alone = programs.get(estimator, {}).get('one', {}).get('HBM bytes', [0])[0]
    for way, names in _WAYS.items():
      if not all(name in of_row for name in names):
        continue
      first, second = (of_row[name] for name in names)
      ordinary = words(first['HBM bytes'][0])
      added = words(second['HBM bytes'][-1]) - ordinary
      pair = {name: of_row[name] for name in names}.values()
      temporaries = (f'{words(x["temporary bytes"]):.2f}' for x in pair)
      name = f'{row}, {way}' if row.startswith('sophia') else row
      found[name] = {
        'words': ordinary,
        'refresh adds': added,
        'alone': words(alone),
        'mean': ordinary + added / _K,
        'temporaries': _pair(temporaries),
        'compile s': ' + '.join(f'{x["compile seconds"]:.0f}' for x in pair),
      }
  return found


def render_update(cases: list[dict]) -> str:
  """Lays out the table of the update alone; a / b is ordinary / refresh."""
  found = update_words(cases)
  header = [f'update alone, {COUNT:,} parameters', *next(iter(found.values()))]
  number = lambda x: x if isinstance(x, str) else f'{x:.2f}' if x else ''
  rows = ([name, *map(number, x.values())] for name, x in found.items())
  return records.table([header, *rows])


def render_draws(title: str, cases: list[dict], count: int) -> str:
  """Lays out a table of random draws, for each entry of an array."""
  lines = [[title, 'words', 'temporaries', 'FLOPs', 'compile s']]
  for case in cases:
    words = case['HBM bytes'][0] / (4 * count)
    lines.append([
      case['row'],
      f'{words:.2f}',
      f'{case["temporary bytes"] / (4 * count):.2f}',
      f'{case["FLOPs"] / count:,.0f}',
      f'{case["compile seconds"]:.0f}',
    ])  # fmt: skip
  return records.table(lines)


def render_step(table: str, cases: list[dict]) -> str:
  """Lays out a table of the train step; a / b is ordinary / refresh."""
  columns = ['temporaries MB', 'HBM MB', 'GFLOPs', 'sent MB']
  lines = [[table, *columns, *hlo.KINDS, 'compile s']]
  for case in cases:
    cells = [case.get('error', '')] + [''] * (len(lines[0]) - 2)
    if 'error' not in case:
      cells = [
        f'{case["temporary bytes"] / 1e6:,.0f}',
        _pair(f'{n / 1e6:,.0f}' for n in case['HBM bytes']),
        f'{case["FLOPs"] / 1e9:,.0f}',
        _pair(f'{n / 1e6:,.0f}' for n in case['sent bytes']),
        *(
          _pair(str(x.get(kind, 0)) for x in case['collectives'])
          for kind in hlo.KINDS
        ),
        f'{case["compile seconds"]:.0f}',
      ]
    lines.append([f'{case["row"]}, {case["program"]}', *cells])
  return records.table(lines)


def goals(tables: dict[str, list[dict]]) -> dict[tuple[str, float], list]:
  """Returns the figures of each goal, which has a name and a limit."""
  found = collections.defaultdict(list)
  words = update_words(tables.get('update', []))
  for name, x in words.items():
    if name.endswith('two programs'):
      found['update: words of an ordinary step', 6].append(x['words'])
      if adamw := words.get('optax.adamw'):
        found['update: mean words / adamw', 1].append(x['mean'] / adamw['mean'])
      found['update: words of a refresh beside the estimator', 4].append(
        x['refresh adds'] - x['alone']
      )
  for table in tables.keys() - {'update', 'probes', 'labels'}:
    programs = _programs(tables[table])
    for row, of_row in programs.items():
      mesh, _, optimizer = row.partition(' ')
      adamw = programs.get(f'{mesh} adamw', {}).get('one', {})
      if 'FLOPs' not in adamw:
        continue
      if own := of_row.get('ordinary'):
        for what, limit, figure_of in (
          ('temporaries of', 1.02, lambda x: x['temporary bytes']),
          ('bytes sent by', 1, lambda x: x['sent bytes'][0]),
          ('collectives of', 1, lambda x: sum(x['collectives'][0].values())),
        ):
          found[f'step: {what} an ordinary step / adamw', limit].append(
            figure_of(own) / figure_of(adamw)
          )
      limit = {'sophia_h': 1.8, 'sophia_g': 1.3}.get(optimizer)
      for program, label in (('one', 'one program'), ('refresh', 'refresh')):
        if limit and 'FLOPs' in of_row.get(program, {}):
          seconds = of_row[program]['compile seconds']
          goal = f'step: compile s of {optimizer}, {label} / adamw', limit
          found[goal].append(seconds / adamw['compile seconds'])
  return found


def render_goals(tables: dict[str, list[dict]]) -> str:
  """Lays out the goals, the figures nearest to and farthest from them."""
  lines = [['goal', 'at most', 'least', 'most', 'reached']]
  for (name, limit), values in sorted(goals(tables).items()):
    # A ratio of 1.0000001 is one of a few scalars.
    count = sum(x < limit + 5e-4 for x in values)
    cells = f'{limit:g}', f'{min(values):.3f}', f'{max(values):.3f}'
    lines.append([name, *cells, f'{count} of {len(values)}'])
  return records.table(lines)


def render(cases: list[dict]) -> str:
  """Lays out all tables."""
  tables = _group(cases, 'table')
  rows, _, classes = tpu_cases.LABELS
  draws = {
    'probes': (f'a probe of {COUNT:,} entries', COUNT),
    'labels': (f'labels of {rows:,} × {classes:,} logits', rows * classes),
  }
  parts = []
  for table, of_table in tables.items():
    if table == 'update':
      parts.append(render_update(of_table))
    elif table in draws:
      title, count = draws[table]
      parts.append(render_draws(title, of_table, count))
    else:
      parts.append(render_step(table, of_table))
  return '\n\n'.join([*parts, render_goals(tables)])


def plot(cases: list[dict]) -> figure.Figure:
  """Draws words of the update, and temporaries of the step beside AdamW's."""
  tables = _group(cases, 'table')
  words = {
    name: x
    for name, x in update_words(tables['update']).items()
    if 'alone' not in name and 'refresh first' not in name
  }
  steps = [x for x in tables['124M, v5e-8'] if x['row'].startswith('fsdp:8 ')]
  fig = figure.Figure(figsize=(6, 8), layout='constrained')
  top, bottom = fig.subplots(
    2, 1, height_ratios=[len(words) + 1, len(steps) + 1]
  )

  ordinary = [x['words'] for x in words.values()]
  mean = [x['mean'] for x in words.values()]
  top.barh(list(words), mean, color=_COLORS['refresh'])
  top.barh(list(words), ordinary, color=_COLORS['ordinary'])
  top.set_title('Update alone: words of HBM traffic\nfor each parameter')

  bottom.barh(
    [f'{x["row"].removeprefix("fsdp:8 ")}, {x["program"]}' for x in steps],
    [x['temporary bytes'] / 1e9 for x in steps],
    color=[_COLORS[x['program']] for x in steps],
  )
  bottom.set_title('Train step of GPT-2 124M on 8 chips:\ntemporaries, GB')
  for ax in (top, bottom):
    bars = ax.containers[0]
    box = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 1}
    ax.bar_label(bars, fmt='%.1f', padding=4, bbox=box)
    ax.axvline(bars[0].get_width(), color='black', linestyle=':', zorder=0)
    ax.set_xlim(0, 1.15 * max(bar.get_width() for bar in bars))
    ax.invert_yaxis()
    ax.spines[['top', 'right']].set_visible(False)
  labels = {
    'ordinary': 'Ordinary step',
    'refresh': f'Refresh (above: divided by {_K})',
    'one': 'One program for both',
  }
  fig.legend(
    handles=[
      patches.Patch(color=_COLORS[program], label=label)
      for program, label in labels.items()
    ],
    loc='outside lower center',
    frameon=False,
    ncols=2,
  )
  return fig
