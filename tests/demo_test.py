"""The demo: its settings, its table and plot, and its interruption."""

import signal

import pytest
import tiny_gpt

import demo
import text
import train_gpt

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.fixture(autouse=True)
def _optax_may_promote(monkeypatch):
  tiny_gpt.let_optax_promote(monkeypatch)


def curves(ax):
  lines, labels = ax.get_legend_handles_labels()
  return {
    label: (list(line.get_xdata()), list(line.get_ydata()))
    for line, label in zip(lines, labels, strict=True)
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
  assert 'AdamW           4' in demo.table(results)
  losses = [entry['val_loss'] for entry in results['adamw'].history]
  assert curves(demo.plot(results).axes[0]) == {'AdamW': ([2, 4], losses)}

  monkeypatch.setattr(text, 'sample', sample)
  results = demo.train_all(str(tmp_path), **settings)
  assert list(results) == ['adamw', 'nadamw', 'sophia_h', 'sophia_g']
  assert all(result.finished for result in results.values())
  steps = [entry['step'] for entry in results['adamw'].history]
  assert steps == [2, 4, 6, 8]
  assert all(name in demo.table(results) for name in ('Sophia-H', 'Sophia-G'))
  win_rates = curves(demo.plot(results).axes[3])
  assert win_rates['Sophia-G'][0] == [2, 4, 6, 8]


def test_table_and_plot_of_the_demo():
  def result(losses, *inside):
    history = [
      {'step': 10 * i, 'seconds': 0.5 * i, 'val_loss': loss}
      for i, loss in enumerate(losses, start=1)
    ]
    for entry, more in zip(history, inside, strict=False):
      entry |= more
    return train_gpt.Result(None, history, 1.0, True)

  results = {
    'adamw': result([5.0, 4.0]),
    'sophia_h': result([4.5, 3.5], {'win_rate': 0.2}, {'win_rate': 0.4}),
    'sophia_g': result([]),  # Stopped before its first validation.
  }
  assert 'Sophia-G        -' in demo.table(results)
  fig = demo.plot(results)
  fig.draw_without_rendering()
  losses, times, differences, win_rates = map(curves, fig.axes)
  assert losses == {
    'AdamW': ([10, 20], [5.0, 4.0]),
    'Sophia-H': ([10, 20], [4.5, 3.5]),
    'Sophia-G': ([], []),
  }
  assert times == {
    name: ([0.05 * step for step in steps], values)
    for name, (steps, values) in losses.items()
  }
  # The target is AdamW's last loss.
  assert list(fig.axes[0].lines[-1].get_ydata()) == [4.0, 4.0]
  assert differences == {
    'AdamW': ([10, 20], [0.0, 0.0]),
    'Sophia-H': ([10, 20], [-0.5, -0.5]),
    'Sophia-G': ([], []),
  }
  assert win_rates['AdamW'] == ([], [])
  assert win_rates['Sophia-H'] == ([10, 20], [0.2, 0.4])
