"""Classifies handwritten digits with AdamW and with Sophia-G.

  python examples/digits.py

The data are 1,797 images of 8 × 8 pixels from scikit-learn. Both optimizers
train the same Flax network, from the same parameters and on the same batches. A
table and a plot compare loss and accuracy on held-out images.
"""

import os
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax
from sklearn import datasets
import tqdm

import sophia_optax

_BATCH_SIZE = 128


def adamw(steps, learning_rate=4e-2, b1=0.9):
  return optax.adamw(
    optax.cosine_decay_schedule(learning_rate, steps), b1, weight_decay=1e-2
  )


def sophia_g(steps, learning_rate=5e-3, rho=0.01):
  return sophia_optax.sophia_g(
    optax.cosine_decay_schedule(learning_rate, steps),
    b1=0.9,
    b2=0.9,
    rho=rho,
    weight_decay=1e-2,
    update_interval=5,
  )


OPTIMIZERS = {'AdamW': adamw, 'Sophia-G': sophia_g}
# The same number of settings for each optimizer. The defaults above are those
# with the lowest loss on the held-out images, for one seed.
_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
SEARCH = {
  'AdamW': [{'learning_rate': x, 'b1': y} for x in _RATES for y in (0.9, 0.8)],
  'Sophia-G': [
    {'learning_rate': x, 'rho': y} for x in _RATES for y in (0.01, 0.1)
  ],
}


class Split(NamedTuple):
  images: np.ndarray  # (N, 8, 8, 1), float32 in [0, 1]
  labels: np.ndarray  # (N,), int32


class Network(nn.Module):
  """Two convolutions and a hidden layer."""

  @nn.compact
  def __call__(self, x):  # (B, 8, 8, 1)
    for features in (16, 32):
      x = nn.relu(nn.Conv(features, (3, 3))(x))
      x = nn.avg_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape(len(x), -1)  # (B, 128)
    return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))  # (B, 10)


def load() -> tuple[Split, Split]:
  """Returns the training images and the quarter that is held out."""
  digits = datasets.load_digits()
  images = np.float32(digits.images[..., None]) / 16
  labels = np.int32(digits.target)
  order = np.random.default_rng(0).permutation(len(labels))
  held_out, rest = np.split(order, [len(order) // 4])
  return (
    Split(images[rest], labels[rest]),
    Split(images[held_out], labels[held_out]),
  )


def train(optimizer: Any, steps: int, seed: int = 0, name: str = ''):
  """Trains a network.

  Args:
    optimizer: an optax optimizer. It gets Sophia's extra arguments.
    steps: number of batches.
    seed: seed of parameters and batches.
    name: label of the progress bar.

  Returns:
    The parameters, and a list of dictionaries with step, seconds of training,
    loss and accuracy.
  """
  training, held_out = load()
  network = Network()
  params = network.init(jax.random.key(seed), training.images[:1])
  state = optimizer.init(params)

  def loss_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      network.apply(params, batch.images), batch.labels
    ).mean()

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(loss_fn)(params, batch)
    # Sophia-H estimates the curvature of obj_fn. Sophia-G uses the same images,
    # with labels that it samples from the outputs of predict_fn.
    updates, state = optax.with_extra_args_support(optimizer).update(
      grads,
      state,
      params,
      obj_fn=lambda params: loss_fn(params, batch),
      predict_fn=lambda params: network.apply(params, batch.images),
    )
    return optax.apply_updates(params, updates), state

  @jax.jit
  def evaluate(params):
    right = jnp.argmax(network.apply(params, held_out.images), -1)
    return {
      'loss': loss_fn(params, held_out),
      'accuracy': jnp.mean(right == held_out.labels),
    }

  step = step.lower(
    params, state, jax.tree.map(lambda x: x[:_BATCH_SIZE], training)
  ).compile()
  history = []
  seconds = 0.0
  rng = np.random.default_rng(seed)
  clock = time.perf_counter()
  for t in tqdm.trange(steps, desc=name):
    rows = rng.choice(len(training.labels), _BATCH_SIZE, replace=False)
    batch = Split(training.images[rows], training.labels[rows])
    params, state = step(params, state, batch)
    if (t + 1) % max(steps // 20, 1) == 0:
      jax.block_until_ready(params)
      seconds += time.perf_counter() - clock
      history.append(
        {'step': t + 1, 'seconds': seconds}
        | {k: float(v) for k, v in evaluate(params).items()}
      )
      clock = time.perf_counter()
  return params, history


def plot(histories: dict[str, list[dict[str, float]]]) -> figure.Figure:
  """Draws loss and accuracy on the held-out images over steps."""
  fig = figure.Figure(figsize=(10, 4), layout='constrained')
  styles = ({'color': '#000000', 'linestyle': '--'}, {'color': '#D55E00'})
  titles = {'loss': 'Loss', 'accuracy': 'Accuracy'}
  for ax, key in zip(fig.subplots(1, 2), titles, strict=True):
    for (name, history), style in zip(histories.items(), styles, strict=True):
      ax.plot(
        [h['step'] for h in history],
        [h[key] for h in history],
        linewidth=2,
        label=name,
        **style,
      )
    ax.set(xlabel='Steps', ylabel=f'{titles[key]} on held-out images')
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
  fig.axes[0].set_yscale('log')
  fig.axes[0].legend(frameon=False)
  fig.suptitle('Digits, 1,348 images to train on')
  return fig


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --steps=9; got {argv[1:]}.'
    )
  if _SEARCH.value:
    for name, settings in SEARCH.items():
      for setting in settings:
        optimizer = OPTIMIZERS[name](_STEPS.value, **setting)
        last = train(optimizer, _STEPS.value, name=name)[1][-1]
        print(f'| {name} | {setting} | {last["loss"]:.4f} |')
    return
  histories = {
    name: train(make(_STEPS.value), _STEPS.value, name=name)[1]
    for name, make in OPTIMIZERS.items()
  }
  for name, history in histories.items():
    last = history[-1]
    print(
      f'{name:10} loss {last["loss"]:.4f}  '
      f'accuracy {100 * last["accuracy"]:.1f} %'
    )
  os.makedirs(_OUT_DIR.value, exist_ok=True)
  path = os.path.abspath(os.path.join(_OUT_DIR.value, 'digits.png'))
  plot(histories).savefig(path, dpi=150)
  print(f'Plot: {path}')


if __name__ == '__main__':
  _SEARCH = flags.DEFINE_bool(
    'search', False, 'Try all settings from which the defaults were chosen.'
  )
  _STEPS = flags.DEFINE_integer('steps', 300, 'Number of batches (128 images).')
  _OUT_DIR = flags.DEFINE_string('out_dir', 'runs', 'Folder for the plot.')
  app.run(main)
