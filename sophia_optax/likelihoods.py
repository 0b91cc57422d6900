"""Likelihoods: how labels are distributed, given the outputs of a model.

The Gauss-Newton-Bartlett estimator draws labels from the model itself and asks
for the score of each, the gradient of -log p(label | outputs) with respect to
the outputs. The score of a sampled label has mean zero; its covariance is the
Fisher information S of the outputs:

                 label         score                     S
    categorical  class         softmax(logits) - onehot  diag(p) - p pᵀ
    bernoulli    0 or 1        sigmoid(logit) - label    p (1 - p)
    gaussian     real number   (mean - label) / scale²   1 / scale²
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax import _checks


class Likelihood(NamedTuple):
  """A distribution of labels.

  A likelihood of your own is one of these, or for predictions that are single
  numbers just a function ``(key, outputs) -> scores``.

  Attributes:
    sample: ``(key, outputs) -> labels``, drawn independently for every
      prediction.
    score: ``(outputs, labels) -> scores``, shaped like the outputs: the
      gradient of -log p of every prediction, neither summed nor averaged.
    event_ndim: Number of trailing axes of the outputs that make up one
      prediction: 1 for logits over classes, 0 for single numbers.
  """

  sample: Callable[[jax.Array, jax.Array], jax.Array]
  score: Callable[[jax.Array, jax.Array], jax.Array]
  event_ndim: int = 0

  def draw_score(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
    """Returns the score of labels that are drawn with this key."""
    return self.score(outputs, self.sample(key, outputs))


def _sample_index(key, weights):
  """Draws an index of the last axis, with probability like its weight."""
  cumulated = jnp.cumsum(weights, axis=-1)
  total = cumulated[..., -1:]
  threshold = total * jax.random.uniform(key, total.shape, total.dtype)
  return jnp.argmax(cumulated > threshold, axis=-1)


def _sample_class(key, logits):
  # First a block of √V classes, then a class in it: beside the probabilities
  # this holds 2 √V numbers a prediction. Gumbel noise would hold V, four times.
  block_key, class_key = jax.random.split(key)
  probabilities = jax.nn.softmax(logits)
  size = math.isqrt(logits.shape[-1] - 1) + 1
  window = (1,) * (logits.ndim - 1) + (size,)
  padding = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % size)]
  blocks = jax.lax.reduce_window(
    probabilities, 0.0, jax.lax.add, window, window, padding
  )
  start = size * _sample_index(block_key, blocks)
  offsets = jnp.arange(size).reshape((1,) * start.ndim + (size,))
  block = jnp.take_along_axis(
    probabilities,
    start[..., None] + offsets,
    axis=-1,
    mode='fill',
    fill_value=0,
  )
  return start + _sample_index(class_key, block)


def _score_class(logits, labels):
  classes = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return jax.nn.softmax(logits) - classes


categorical: Likelihood = Likelihood(_sample_class, _score_class, event_ndim=1)
"""Classes, from logits over the last axis."""


def _sample_bit(key, logits):
  return jax.random.bernoulli(key, jax.nn.sigmoid(logits))


def _score_bit(logits, labels):
  return jax.nn.sigmoid(logits) - labels.astype(logits.dtype)


bernoulli: Likelihood = Likelihood(_sample_bit, _score_bit)
"""Zero or one, from a logit for each."""


def gaussian(scale: float = 1.0) -> Likelihood:
  """Real numbers, from a mean for each.

  Args:
    scale: Standard deviation of the labels, greater than 0. A loss of half the
      squared error is the likelihood of scale 1.

  Returns:
    The likelihood.

  Raises:
    ValueError: If ``scale`` is not positive.
  """
  _checks.positive('scale', scale)

  def sample(key, means):
    return means + scale * jax.random.normal(key, means.shape, means.dtype)

  def score(means, labels):
    return (means - labels) / scale**2

  return Likelihood(sample, score)


BY_NAME = {
  'categorical': categorical,
  'bernoulli': bernoulli,
  'gaussian': gaussian(),
}
