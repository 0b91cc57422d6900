"""The Gauss-Newton-Bartlett estimator against dense Jacobians."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sophia_optax
from sophia_optax import likelihoods

estimator_of = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
PARAMS = {
  'shared': np.array([[0.3, -0.8], [1.1, 0.4]]),
  'out': np.array([[0.5, -1.0, 0.2], [-0.7, 0.1, 0.9]]),
}


def float32(tree):
  return jax.tree.map(jnp.float32, tree)


def network(params, inputs):
  """Two layers with shared weights, then an output; (..., 2) -> (..., 3)."""
  hidden = jnp.tanh(jnp.tanh(inputs @ params['shared']) @ params['shared'])
  return hidden @ params['out']


def every_label(probabilities):
  """Returns all combinations of labels, for probabilities (B, C)."""
  count, classes = probabilities.shape
  labels = np.array(list(itertools.product(range(classes), repeat=count)))
  return labels, np.prod(probabilities[np.arange(count), labels], axis=1)


# The likelihood, the shape of the predictions and their mask.
CASES = {
  'classes': ('categorical', (2,), None),
  'broadcast mask': ('categorical', (2, 2), [[True], [False]]),
  'all masked': ('categorical', (2,), [False, False]),
  'bits': ('bernoulli', (3,), None),
  'no axis': ('bernoulli', (), None),
  'numbers': ('gaussian', (4,), [True, False, True, True]),
}


@pytest.mark.parametrize('case', CASES)
def test_mean_over_all_labels_is_the_gauss_newton_diagonal(case):
  name, shape, mask = CASES[case]
  likelihood = getattr(likelihoods, name)
  classes = 3 if name == 'categorical' else 1
  with jax.enable_x64(True):
    inputs = np.random.default_rng(0).normal(size=(*shape, 2))

    def predict_fn(params):
      outputs = network(params, inputs)
      return outputs if name == 'categorical' else outputs[..., 0]

    z, jacobian = oracles.outputs_and_jacobian(predict_fn, PARAMS, classes)
    fisher = oracles.FISHER[name](z)
    if name == 'categorical':
      labels, weights = every_label(np.exp(z) / np.exp(z).sum(1, keepdims=True))
    elif name == 'bernoulli':
      labels, weights = every_label(sigmoids(z))
    else:
      # The estimate is quadratic in the labels: two nodes integrate it.
      likelihood, fisher = likelihood(scale=0.7), fisher / 0.7**2
      nodes, node_weights = np.polynomial.hermite_e.hermegauss(2)
      which, weights = every_label(np.tile(node_weights, (len(z), 1)))
      weights /= weights.sum()
      labels = z[:, 0] + 0.7 * nodes[which]
    np.testing.assert_allclose(weights.sum(), 1)

    @jax.jit
    @jax.vmap
    def estimate(labels):
      planted = likelihood._replace(sample=lambda key, outputs: labels)
      estimator = estimator_of(likelihood=planted)
      tree, _ = estimator.update(
        None,
        estimator.init(PARAMS),
        PARAMS,
        predict_fn=predict_fn,
        label_mask=None if mask is None else jnp.array(mask),
        loss_scale=None if mask is None else 8.0,  # It has no effect.
      )
      return oracles.flat(tree)

    mean = weights @ estimate(labels.reshape(-1, *shape))
    mask = np.broadcast_to(True if mask is None else mask, shape).ravel()
    expected = oracles.gauss_newton(jacobian, fisher, mask)
    np.testing.assert_allclose(mean, expected, rtol=1e-11, atol=1e-14)


def sigmoids(z):
  """Returns the probabilities of 0 and 1, (B, 2), for logits (B, 1)."""
  return 1 / (1 + np.exp(np.hstack([z, -z])))


def test_masked_predictions_have_no_effect():
  inputs = jnp.ones((4, 2))
  padding = jnp.array([0.0, jnp.nan, -jnp.inf, 0.0])
  estimator = estimator_of(likelihood=lambda key, z: jnp.sign(z))
  params = float32(PARAMS)
  got = oracles.estimate(
    estimator,
    params,
    label_mask=jnp.array([True, False, False, True]),
    predict_fn=lambda p: network(p, inputs)[:, 0] + padding,
  )
  expected = oracles.estimate(
    estimator, params, predict_fn=lambda p: network(p, inputs[:2])[:, 0]
  )
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_classes_are_drawn_with_their_probabilities():
  # 10 classes make blocks of 4, 4 and 2.
  logits = np.random.default_rng(1).normal(size=(5, 10)).astype(np.float32)
  logits[0, [0, 5, 9]] = -np.inf
  logits[2:] = np.where(np.eye(10)[[0, 3, 9]], 0, -np.inf)  # Only one is drawn.
  with jax.numpy_rank_promotion('raise'):
    labels = jax.jit(likelihoods.categorical.sample)(
      jax.random.PRNGKey(0), np.tile(logits, (50_000, 1, 1))
    )
  frequencies = np.eye(10)[labels].mean(axis=0)
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(frequencies, expected, atol=0.008)
  assert not frequencies[logits == -np.inf].any()
  (only,) = jax.jit(likelihoods.categorical.sample)(
    jax.random.PRNGKey(0), jnp.zeros((1, 1))
  )
  assert only == 0


def test_threshold_of_zero_draws_no_impossible_class(monkeypatch):
  # One random number in eight million is exactly zero.
  monkeypatch.setattr(
    jax.random, 'uniform', lambda key, shape, dtype: jnp.zeros(shape, dtype)
  )
  logits = jnp.float32([-np.inf] * 4 + [0] * 5)  # The first block.
  sample = jax.jit(likelihoods.categorical.sample)
  assert sample(jax.random.PRNGKey(0), logits) == 4


@pytest.mark.parametrize(
  ('likelihood', 'mean', 'variance'),
  [
    (likelihoods.bernoulli, [0.2689, 0.5744, 0.8808], None),
    (likelihoods.gaussian(0.5), [-1.0, 0.3, 2.0], 0.25),
  ],
)
def test_numbers_are_drawn_with_their_moments(likelihood, mean, variance):
  outputs = np.tile(np.float32([-1.0, 0.3, 2.0]), (20_000, 1))
  with jax.numpy_rank_promotion('raise'):
    labels = jax.jit(likelihood.sample)(jax.random.PRNGKey(0), outputs)
  labels = np.array(labels, np.float64)
  np.testing.assert_allclose(labels.mean(axis=0), mean, atol=0.015)
  if variance is not None:
    np.testing.assert_allclose(labels.var(axis=0), variance, rtol=0.05)


@pytest.mark.parametrize(
  ('likelihood', 'loss'),
  [
    (
      likelihoods.categorical,
      lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], -1),
    ),
    (
      likelihoods.bernoulli,
      lambda z, y: -jax.nn.log_sigmoid(jnp.where(y, z, -z)),
    ),
    (likelihoods.gaussian(0.5), lambda z, y: 2 * (z - y) ** 2),
  ],
)
def test_score_is_the_gradient_of_the_loss(likelihood, loss):
  z = jnp.array([[1.0, -2.0, 0.3], [0.0, 0.5, -1.0]])

  @jax.jit
  def scores(z):
    labels = likelihood.sample(jax.random.PRNGKey(0), z)
    gradient = jax.grad(lambda z: jnp.sum(loss(z, labels)))
    return likelihood.score(z, labels), gradient(z)

  np.testing.assert_allclose(*scores(z), rtol=1e-5, atol=1e-6)


def test_samples_share_one_forward_pass():
  params, inputs, forward = float32(PARAMS), jnp.ones((4, 2)), []

  def predict_fn(p):
    forward.append(None)
    return network(p, inputs)

  got = oracles.estimate(
    estimator_of(num_samples=500), params, predict_fn=predict_fn
  )
  assert len(forward) == 1
  z, jacobian = oracles.outputs_and_jacobian(predict_fn, params, 3)
  expected = oracles.gauss_newton(jacobian, oracles.FISHER['categorical'](z))
  np.testing.assert_allclose(oracles.flat(got), expected, rtol=0.3, atol=5e-3)


def test_first_derivatives_are_enough():
  # Like flash attention, a custom_vjp has no rule for forward differentiation.
  cube = jax.custom_vjp(lambda x: x**3)
  cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
  got = oracles.estimate(
    estimator_of(likelihood=lambda key, z: jnp.ones_like(z)),
    jnp.array([1.0, 2.0]),
    predict_fn=cube,
  )
  # B ĝ² with B = 2.
  np.testing.assert_allclose(got, [3**2 / 2, 12**2 / 2], rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_outputs_reach_the_likelihood_in_float32(dtype):
  def draw_score(key, outputs):
    assert outputs.dtype == jnp.float32
    return jnp.ones_like(outputs)

  # In half precision B ĝ² with B = 2^16 and ĝ = 2^-16 would underflow.
  got = oracles.estimate(
    estimator_of(likelihood=draw_score),
    jnp.ones(2**16, dtype),
    predict_fn=lambda p: p,
  )
  np.testing.assert_allclose(got, 2.0**-16, rtol=1e-2)
  assert got.dtype == jnp.float32


@pytest.mark.usefixtures('optimized')
def test_memory_is_two_arrays_of_the_shape_of_the_logits():
  batch, classes = 64, 4096
  inputs = jnp.ones((batch, 2))
  estimator = estimator_of()
  step = lambda w: oracles.first(estimator, w, predict_fn=lambda w: inputs @ w)
  temporary = oracles.temporary_bytes(step, np.ones((2, classes), np.float32))
  assert temporary < 2.3 * 4 * batch * classes


def test_squared_gradient():
  params = {
    'w': jnp.ones(2),
    'b': jnp.ones(2, jnp.bfloat16),
    'z': jnp.array(1j),
    'int': jnp.array(3),
  }
  grads = {
    'w': jnp.array([1.0, -2.0]),
    'b': jnp.array([3.0, 1.0078125], jnp.bfloat16),
    'z': jnp.array(3.0 - 4.0j),
    'int': np.zeros((), jax.dtypes.float0),
  }
  estimator = sophia_optax.squared_gradient_estimator_diag_hessian(10)
  estimate, _ = estimator.update(grads, estimator.init(params), params)
  expected = {
    'w': jnp.array([10.0, 40.0]),
    'b': jnp.array([90.0, 10 * 1.0078125**2]),  # More bits than bfloat16 has.
    'z': jnp.array(90.0 + 160.0j),
    'int': jnp.array(0),
  }
  chex.assert_trees_all_close(estimate, expected, rtol=1e-6)
  chex.assert_trees_all_equal_dtypes(estimate, expected)
