"""The tables and the plot of tpu.py."""

import collections
from collections.abc import Iterable

from matplotlib import figure
from matplotlib import patches

import hlo
import tpu_cases

# Of the plot, by program; they are Okabe's and Ito's.
_COLORS = {'ordinary': '#0072B2', 'refresh': '#E69F00', 'one': '#999999'}
COUNT = 4 * tpu_cases.SIZE**2  # parameters of the update alone
_K = 10  # steps from one refresh to the next


def _programs(cases: list[dict]) -> dict[str, dict[str, dict]]:
  """Returns figures by row and program."""
  found: dict[str, dict[str, dict]] = {}
  for case in cases:
    found.setdefault(case['row'], {})[case['program']] = case
  return found


_WAYS = {'one program': ('one', 'one'), 'two programs': ('ordinary', 'refresh')}


def _table(lines: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  layout = '  '.join([f'{{:{widths[0]}}}', *(f'{{:>{w}}}' for w in widths[1:])])
  return '\n'.join(layout.format(*line).rstrip() for line in lines)


def _pair(cells: Iterable[str]) -> str:
  return ' / '.join(dict.fromkeys(cells))


def update_words(cases: list[dict]) -> dict[str, dict[str, float]]:
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
      pair = [of_row[name] for name in names]
      ordinary, refresh = (words(x['HBM bytes'][i]) for i, x in enumerate(pair))
      seconds = {
        name: f'{of_row[name]["compile seconds"]:.0f}' for name in names
      }
      name = f'{row}, {way}' if row.startswith('sophia') else row
      found[name] = {
        'words': ordinary,
        'refresh adds': refresh - ordinary,
        'alone': words(alone),
        'mean': ordinary + (refresh - ordinary) / _K,
        'temporaries': _pair(
          f'{words(x["temporary bytes"]):.2f}' for x in pair
        ),
        'compile s': ' + '.join(seconds.values()),
      }
  return found


def render_update(cases: list[dict]) -> str:
  """Lays out the table of the update alone; a / b is ordinary / refresh."""
  found = update_words(cases)
  names = list(next(iter(found.values()), ()))
  number = lambda x: x if isinstance(x, str) else f'{x:.2f}' if x else ''
  return _table(
    [
      [f'update alone, {COUNT:,} parameters', *names],
      *([name, *map(number, x.values())] for name, x in found.items()),
    ]
  )


def render_draws(title: str, cases: list[dict], count: int) -> str:
  """Lays out a table of random draws, for each entry of an array."""
  return _table(
    [
      [title, 'words', 'temporaries', 'FLOPs', 'compile s'],
      *(
        [
          x['row'],
          f'{x["HBM bytes"][0] / (4 * count):.2f}',
          f'{x["temporary bytes"] / (4 * count):.2f}',
          f'{x["FLOPs"] / count:,.0f}',
          f'{x["compile seconds"]:.0f}',
        ]
        for x in cases
      ),
    ]
  )


def render_step(table: str, cases: list[dict]) -> str:
  """Lays out a table of the train step; a / b is ordinary / refresh."""

  def cells(case):
    if 'error' in case:
      return [case['error'], *[''] * (len(lines[0]) - 2)]
    steps = [case['ordinary'], case['refresh']]
    return [
      f'{case["temporary bytes"] / 1e6:,.0f}',
      _pair(f'{moved / 1e6:,.0f}' for moved in case['HBM bytes']),
      f'{case["FLOPs"] / 1e9:,.0f}',
      _pair(f'{step["sent bytes"] / 1e6:,.0f}' for step in steps),
      *(
        _pair(str(step['collectives'].get(kind, 0)) for step in steps)
        for kind in hlo.KINDS
      ),
      f'{case["compile seconds"]:.0f}',
    ]

  columns = ['temporaries MB', 'HBM MB', 'GFLOPs', 'sent MB']
  lines = [[table, *columns, *hlo.KINDS, 'compile s']]
  for case in cases:
    name = f'{case["row"]}, {case["program"]}'
    lines.append([name, *cells(case)])
  return _table(lines)


def render_goals(tables: dict[str, list[dict]]) -> str:
  """Lays out the goals, the figures nearest to and farthest from them."""
  found: dict[tuple[str, float], list[float]] = collections.defaultdict(list)
  words = update_words(tables.get('update', []))
  for name, x in words.items():
    if name.endswith('two programs'):
      found['update: words of an ordinary step', 6].append(x['words'])
      if adamw := words.get('optax.adamw'):
        found['update: mean words / adamw', 1].append(x['mean'] / adamw['mean'])
      found['update: words of a refresh beside the estimator', 4].append(
        x['refresh adds'] - x['alone']
      )
  for table, of_table in tables.items():
    programs = _programs(of_table)
    for row, of_row in programs.items():
      mesh, _, optimizer = row.partition(' ')
      adamw = programs.get(f'{mesh} adamw', {}).get('one', {})
      if table in ('update', 'probes', 'labels') or 'FLOPs' not in adamw:
        continue
      if own := of_row.get('ordinary'):
        found['step: temporaries of an ordinary step / adamw', 1.02].append(
          own['temporary bytes'] / adamw['temporary bytes']
        )
        found['step: bytes sent by an ordinary step / adamw', 1].append(
          own['ordinary']['sent bytes'] / adamw['ordinary']['sent bytes']
        )
        found['step: collectives of an ordinary step / adamw', 1].append(
          sum(own['ordinary']['collectives'].values())
          / sum(adamw['ordinary']['collectives'].values())
        )
      for name, limit in (('sophia_h', 1.8), ('sophia_g', 1.3)):
        for program, label in (('one', 'one program'), ('refresh', 'refresh')):
          if optimizer == name and 'FLOPs' in of_row.get(program, {}):
            goal = f'step: compile s of {name}, {label} / adamw', limit
            found[goal].append(
              of_row[program]['compile seconds'] / adamw['compile seconds']
            )
  return _table(
    [
      ['goal', 'at most', 'least', 'most', 'reached'],
      *(
        [
          name,
          f'{limit:g}',
          f'{min(values):.3f}',
          f'{max(values):.3f}',
          # A ratio of 1.0000001 is one of a few scalars.
          f'{sum(x < limit + 5e-4 for x in values)} of {len(values)}',
        ]
        for (name, limit), values in sorted(found.items())
      ),
    ]
  )


def by_table(cases: list[dict]) -> dict[str, list[dict]]:
  """Returns the cases of each table."""
  tables: dict[str, list[dict]] = {}
  for case in cases:
    tables.setdefault(case['table'], []).append(case)
  return tables


def render(cases: list[dict]) -> str:
  """Lays out all tables."""
  tables = by_table(cases)
  rows, _, classes = tpu_cases.LABELS
  lay_out = {
    'update': render_update,
    'probes': lambda cases: render_draws(
      f'a probe of {COUNT:,} entries', cases, COUNT
    ),
    'labels': lambda cases: render_draws(
      f'labels of {rows:,} × {classes:,} logits', cases, rows * classes
    ),
  }
  steps = [
    lay_out.pop(table)(of_table)
    if table in lay_out
    else render_step(table, of_table)
    for table, of_table in tables.items()
  ]
  return '\n\n'.join([*steps, render_goals(tables)])


def plot(cases: list[dict]) -> figure.Figure:
  """Draws words of the update, and temporaries of the step beside AdamW's."""
  tables = by_table(cases)
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
