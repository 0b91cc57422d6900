"""Draws the picture of docs/getting-started.md, by running that page.

python docs/plots.py
python docs/plots.py --rates  # prints the losses at other learning rates
"""

import doctest
import pathlib
import sys

import matplotlib

PAGE = pathlib.Path(__file__).with_name('getting-started.md')


def run_page() -> dict:
  """Returns the variables that the page's code leaves."""
  variables = {}
  for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
    exec(compile(example.source, str(PAGE), 'single'), variables)
  return variables


def main():
  """Writes the plot, or prints the losses."""
  # Names in the file that repeat, so that the same curves are the same bytes.
  matplotlib.rcParams['svg.hashsalt'] = 'sophia-optax'
  page = run_page()
  if '--rates' in sys.argv:
    for name in page['optimizers']:
      for rate in (0.01, 0.03, 0.1):
        losses, _, _ = page['run'](name, rate)
        print(f'{name} {rate} {losses[-1]:.4f}')
    return
  page['fig'].savefig(PAGE.with_suffix('.svg'), metadata={'Date': None})


if __name__ == '__main__':
  main()
