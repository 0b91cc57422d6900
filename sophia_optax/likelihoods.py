"""Likelihoods: distributions of labels, given the outputs of a model.

The Gauss-Newton-Bartlett estimator draws labels from the model and computes
the score of each: the gradient of -log p(label | outputs) with respect to the
outputs. The score of a sampled label has mean zero. Its covariance S is the
Fisher information of the outputs:

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

  Create one for a likelihood that is not in this module. If each prediction is
  a single number, you can pass a function ``(key, outputs) -> scores`` to the
  estimator instead.

  Attributes:
    sample: ``(key, outputs) -> labels``, drawn independently for each
      prediction.
    score: ``(outputs, labels) -> scores``, shaped like the outputs: the
      gradient of -log p for each prediction, not summed or averaged.
    event_ndim: Number of trailing axes of the outputs that form one prediction:
      1 for logits over classes, 0 for single numbers.
  """

  sample: Callable[[jax.Array, jax.Array], jax.Array]
  score: Callable[[jax.Array, jax.Array], jax.Array]
  event_ndim: int = 0

  def draw_score(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
    """Draws labels with this key and returns their scores."""
    return self.score(outputs, self.sample(key, outputs))


def _sample_index(key, weights):
  """Draws an index of the last axis with the given relative weights."""
  cumulated = jnp.cumsum(weights, axis=-1)
  total = cumulated[..., -1:]
  threshold = total * jax.random.uniform(key, total.shape, total.dtype)
  return jnp.argmax(cumulated > threshold, axis=-1)


def _sample_class(key, logits):
  # Draws a block of √V classes, then a class in it. Beside the probabilities
  # this needs memory for 2 √V numbers per prediction. Gumbel noise needs 4 V.
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
"""Zeros and ones, from one logit each."""


def gaussian(scale: float = 1.0) -> Likelihood:
  """Real numbers, from one mean each.

  Args:
    scale: Standard deviation of the labels, greater than 0. Half the squared
      error is the negative log-likelihood for scale 1.

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
