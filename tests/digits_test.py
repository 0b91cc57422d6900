"""The digits example."""

import math

import jax
import pytest

import digits


@pytest.fixture(autouse=True)
def _promote_as_optax_does():
  with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
    yield


def test_images_are_split_without_overlap():
  training, held_out = digits.load()
  assert len(training.labels) + len(held_out.labels) == 1797
  assert training.images.shape[1:] == (8, 8, 1)
  assert 0 <= training.images.min() < training.images.max() <= 1
  seen = {image.tobytes() for image in training.images}
  assert sum(image.tobytes() in seen for image in held_out.images) == 0


@pytest.mark.slow
def test_sophia_g_learns_and_the_plot_shows_it():
  histories = {
    name: digits.train(make(40), 40)[1]
    for name, make in digits.OPTIMIZERS.items()
  }
  for history in histories.values():
    assert history[-1]['step'] == 40
    assert history[-1]['loss'] < history[0]['loss'] < math.log(10) + 0.2
    assert history[-1]['accuracy'] > 0.5
  fig = digits.plot(histories)
  fig.draw_without_rendering()
  for ax, key in zip(fig.axes, ('loss', 'accuracy'), strict=True):
    lines, labels = ax.get_legend_handles_labels()
    assert labels == list(histories)
    for line, history in zip(lines, histories.values(), strict=True):
      assert list(line.get_ydata()) == [h[key] for h in history]
