"""The demo: its settings, its table and plot, and its interruption."""

import json
import pathlib
import signal

import pytest
import tiny_gpt

import demo
import gpt_configs
import text
import train_gpt

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.fixture(autouse=True)
def _optax_may_promote(monkeypatch):
  tiny_gpt.let_optax_promote(monkeypatch)


def curves(results):
  (ax,) = demo.plot(results).axes
  return {
    line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
    for line in ax.get_lines()
  }


@pytest.mark.slow
def test_interrupt_leaves_checkpoint_table_and_plot(tmp_path, monkeypatch):
  sample = text.sample
  settings = tiny_gpt.SETTINGS | {
    'vocab_size': 256,
    'num_steps': 8,
    'eval_interval': 2,
  }

  def interrupting(tokens, seed, step, *sizes):
    if step == 4:
      signal.raise_signal(signal.SIGINT)
    return sample(tokens, seed, step, *sizes)

  monkeypatch.setattr(text, 'sample', interrupting)
  handler = signal.getsignal(signal.SIGINT)
  results = demo.train_all(str(tmp_path), **settings)
  assert signal.getsignal(signal.SIGINT) is handler
  assert list(results) == ['adamw']
  assert not results['adamw'].finished
  assert (tmp_path / 'adamw' / '5').is_dir()
  assert 'AdamW              4' in demo.table(results)
  assert curves(results) == {'AdamW': ([2, 4], [0.0, 0.0])}

  monkeypatch.setattr(text, 'sample', sample)
  results = demo.train_all(str(tmp_path), **settings)
  assert list(results) == list(demo.RUNS)
  assert all(result.finished for result in results.values())
  steps = [entry['step'] for entry in results['adamw'].history]
  assert steps == [2, 4, 6, 8]
  assert all(name in demo.table(results) for name, *_ in demo.RUNS.values())


def test_the_page_has_the_record():
  record = json.loads((ROOT / 'examples/demo.json').read_text())
  page = (ROOT / 'examples/README.md').read_text()
  assert all(list(runs) == list(demo.RUNS) for runs in record.values())
  config = gpt_configs.CONFIGS['demo']
  for name in demo.RUNS:
    steps, cells = [], []
    for runs in record.values():
      end = str(config.num_steps)
      target = runs['adamw'][end]
      steps.append(next(int(t) for t, x in runs[name].items() if x <= target))
      cells.append(f'{runs[name][end]:.3f}')
    span = ' to '.join(map(str, sorted({min(steps), max(steps)})))
    assert f'| {" | ".join(cells)} | {span} |' in page


def test_table_and_plot_of_the_demo():
  def result(losses):
    history = [
      {'step': 10 * i, 'seconds': 0.5 * i, 'val_loss': loss}
      for i, loss in enumerate(losses, start=1)
    ]
    return train_gpt.Result(None, history, 1.0, True)

  results = {
    'adamw': result([5.0, 4.0]),
    'eigenbasis': result([4.0, 3.5]),
    'nadamw': result([]),  # Stopped before its first validation.
  }
  assert 'NAdamW             -' in demo.table(results)
  assert 'Eigenbasis        20      3.500        10       50' in (
    demo.table(results)
  )
  assert demo.conclusion(results) == (
    "AdamW's final loss was reached by Eigenbasis after 50 % of the steps."
  )
  demo.plot(results).draw_without_rendering()
  assert curves(results) == {
    'AdamW': ([10, 20], [0.0, 0.0]),
    'Eigenbasis': ([10, 20], [-1.0, -0.5]),
    'NAdamW': ([], []),
  }
