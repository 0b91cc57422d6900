"""The Gauss-Newton-Bartlett estimator against dense Jacobians."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sophia_optax
from sophia_optax import likelihoods

estimator_of = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian


def network(params, inputs, outputs=3):
  """Two layers with shared weights, then an output; (..., 2) -> (..., C)."""
  hidden = jnp.tanh(jnp.tanh(inputs @ params['shared']) @ params['shared'])
  return hidden @ params['out'][:, :outputs]


def make_params(dtype=jnp.float32):
  return {
    'shared': jnp.array([[0.3, -0.8], [1.1, 0.4]], dtype),
    'out': jnp.array([[0.5, -1.0, 0.2], [-0.7, 0.1, 0.9]], dtype),
  }


def dense_diagonal(predict_fn, params, fisher, mask=None):
  """diag(Σ Jᵀ S J) / B, with fisher(prediction) -> S, from dense Jacobians."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  outputs = predict_fn(params)
  event = fisher(outputs).ndim - outputs.ndim  # Axes that S adds: 1, or 0.
  size = outputs.shape[-1] if event else 1
  predictions = lambda x: predict_fn(unravel(x)).ravel()
  jacobian = jax.jit(jax.jacobian(predictions))(flat)
  jacobian = jacobian.reshape(-1, size, flat.size)
  metric = fisher(outputs).reshape(-1, size, size)
  per_prediction = jnp.einsum('bcp,bcd,bdp->bp', jacobian, metric, jacobian)
  mask = jnp.ones(len(jacobian)) if mask is None else mask.ravel()
  mask = mask.astype(flat.dtype)
  return unravel(mask @ per_prediction / jnp.maximum(mask.sum(), 1))


def fisher_of_classes(logits):
  p = jax.nn.softmax(logits)
  return (
    jax.vmap(jnp.diag)(p.reshape(-1, p.shape[-1])).reshape(
      *p.shape, p.shape[-1]
    )
    - p[..., :, None] * p[..., None, :]
  )


def fisher_of_bits(logits):
  p = jax.nn.sigmoid(logits)
  return p * (1 - p)


def enumerated_mean(likelihood, labels, weights, predict_fn, params, **kwargs):
  """Returns the estimator's mean over labels, which are passed in its key.

  Args:
    likelihood: Its score is used, and its sampling is replaced.
    labels: All combinations of labels, shape (K, *predictions).
    weights: The probability of each combination, shape (K,).
  """

  def estimate(these):
    planted = likelihood._replace(sample=lambda key, outputs: these)
    estimator = estimator_of(likelihood=planted)
    return estimator.update(
      None, estimator.init(params), params, predict_fn=predict_fn, **kwargs
    )[0]

  estimates = jax.jit(jax.vmap(estimate))(labels)
  return jax.tree.map(lambda e: jnp.tensordot(weights, e, axes=1), estimates)


def every_label(probabilities):
  """Returns all combinations of labels, for probabilities (*predictions, C)."""
  *predictions, classes = probabilities.shape
  table = np.array(probabilities).reshape(-1, classes)
  labels = np.array(list(itertools.product(range(classes), repeat=len(table))))
  weights = np.prod(table[np.arange(len(table)), labels], axis=1)
  return jnp.array(labels).reshape(-1, *predictions), jnp.array(weights)


CASES = {
  'no_axis': ((), None),
  'one': ((1,), None),
  'three': ((3,), None),
  'ranks': ((2, 2), None),
  'masked': ((4,), [True, False, True, True]),
  'masked_broadcast': ((2, 2), [[True], [False]]),
  'all_masked': ((2,), [False, False]),
}


FAST = (
  ('categorical', 'ranks'),
  ('categorical', 'masked_broadcast'),
  ('categorical', 'all_masked'),
  ('bernoulli', 'three'),
  ('gaussian', 'masked'),
)


@pytest.mark.parametrize(
  ('name', 'case'),
  [
    pytest.param(*both, marks=[] if both in FAST else pytest.mark.slow)
    for both in itertools.product(
      ('categorical', 'bernoulli', 'gaussian'), CASES
    )
  ],
)
def test_mean_over_all_labels_is_the_gauss_newton_diagonal(name, case):
  with jax.enable_x64(True):
    shape, mask = CASES[case]
    params = make_params(jnp.float64)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(*shape, 2)))
    if name == 'categorical':
      predict_fn = lambda p: network(p, inputs)
      likelihood, fisher = likelihoods.categorical, fisher_of_classes
      labels, weights = every_label(jax.nn.softmax(predict_fn(params)))
    else:
      predict_fn = lambda p: network(p, inputs, outputs=1)[..., 0]
      outputs = predict_fn(params)
      if name == 'bernoulli':
        likelihood, fisher = likelihoods.bernoulli, fisher_of_bits
        p = jax.nn.sigmoid(outputs)
        labels, weights = every_label(jnp.stack([1 - p, p], axis=-1))
      else:
        # The estimate is a quadratic in the labels: two nodes integrate it.
        likelihood = likelihoods.gaussian(scale=0.7)
        fisher = lambda z: jnp.full(z.shape, 0.7**-2)
        nodes, node_weights = np.polynomial.hermite_e.hermegauss(2)
        half = jnp.broadcast_to(node_weights / node_weights.sum(), (*shape, 2))
        which, weights = every_label(half)
        labels = outputs + 0.7 * jnp.asarray(nodes)[which]
    extra, predictions_mask = {}, None
    if mask is not None:
      extra['label_mask'] = jnp.array(mask)
      predictions_mask = jnp.broadcast_to(jnp.array(mask), shape)
    actual = enumerated_mean(
      likelihood, labels, weights, predict_fn, params, **extra
    )
    expected = dense_diagonal(predict_fn, params, fisher, predictions_mask)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-14)


def test_masked_predictions_have_no_effect():
  params, inputs = make_params(), jnp.ones((4, 2))
  padding = jnp.array([[0.0], [jnp.nan], [-jnp.inf], [0.0]])
  padded = lambda p: network(p, inputs) + jnp.broadcast_to(padding, (4, 3))
  estimator = estimator_of(likelihood=lambda key, z: jnp.sign(z))
  mask = jnp.array([True, False, False, True])
  expected, _ = estimator.update(
    None,
    estimator.init(params),
    params,
    predict_fn=lambda p: network(p, inputs[:2])[:, 0],
  )
  actual, _ = estimator.update(
    None,
    estimator.init(params),
    params,
    label_mask=mask,
    predict_fn=lambda p: padded(p)[:, 0],
  )
  chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_classes_are_drawn_with_their_probabilities():
  logits = jnp.array([[0.0, 1.0, -2.0, -jnp.inf], [3.0, -1.0, 0.0, 0.5]])
  keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
  labels = jax.vmap(likelihoods.categorical.sample, (0, None))(keys, logits)
  frequencies = jax.nn.one_hot(labels, 4).mean(axis=0)
  np.testing.assert_allclose(frequencies, jax.nn.softmax(logits), atol=0.012)
  assert frequencies[0, 3] == 0


def test_many_classes_are_drawn_with_their_probabilities():
  # 10 classes make blocks of 4, 4 and 2.
  logits = jax.random.normal(jax.random.PRNGKey(1), (10,))
  labels = likelihoods.categorical.sample(
    jax.random.PRNGKey(0), jnp.broadcast_to(logits, (50_000, 10))
  )
  frequencies = jax.nn.one_hot(labels, 10).mean(axis=0)
  np.testing.assert_allclose(frequencies, jax.nn.softmax(logits), atol=0.008)
  single = likelihoods.categorical.sample(jax.random.PRNGKey(0), logits[:1])
  assert single == 0


def test_threshold_of_zero_draws_no_impossible_class(monkeypatch):
  # One random number in eight million is exactly zero.
  monkeypatch.setattr(
    jax.random, 'uniform', lambda key, shape, dtype: jnp.zeros(shape, dtype)
  )
  logits = jnp.full(9, 0.0).at[:4].set(-jnp.inf)  # The first block, and one.
  label = likelihoods.categorical.sample(jax.random.PRNGKey(0), logits)
  assert label == 4


@pytest.mark.parametrize('possible', [0, 3, 9])
def test_impossible_classes_are_never_drawn(possible):
  logits = jnp.full(10, -jnp.inf).at[possible].set(0.0)
  keys = jax.random.split(jax.random.PRNGKey(0), 10_000)
  labels = jax.vmap(likelihoods.categorical.sample, (0, None))(keys, logits)
  assert jnp.all(labels == possible)


@pytest.mark.parametrize(
  ('likelihood', 'moments'),
  [
    (likelihoods.bernoulli, lambda z: (jax.nn.sigmoid(z), None)),
    (likelihoods.gaussian(0.5), lambda z: (z, 0.25)),
  ],
)
def test_numbers_are_drawn_with_their_moments(likelihood, moments):
  outputs = jnp.array([-1.0, 0.3, 2.0])
  keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
  labels = jax.vmap(likelihood.sample, (0, None))(keys, outputs)
  labels = labels.astype(jnp.float32)
  mean, variance = moments(outputs)
  np.testing.assert_allclose(labels.mean(axis=0), mean, atol=0.015)
  if variance is not None:
    np.testing.assert_allclose(labels.var(axis=0), variance, rtol=0.05)


@pytest.mark.parametrize(
  ('likelihood', 'negative_log_p'),
  [
    (
      likelihoods.categorical,
      lambda z, y: (
        -jnp.sum(jax.nn.log_softmax(z) * jax.nn.one_hot(y, z.shape[-1]))
      ),
    ),
    (
      likelihoods.bernoulli,
      lambda z, y: -jnp.sum(jax.nn.log_sigmoid(jnp.where(y, z, -z))),
    ),
    (
      likelihoods.gaussian(0.5),
      lambda z, y: jnp.sum((y - z) ** 2) / (2 * 0.25),
    ),
  ],
)
def test_score_is_the_gradient_of_the_negative_log_likelihood(
  likelihood, negative_log_p
):
  outputs = jax.random.normal(jax.random.PRNGKey(0), (2, 3, 4))
  labels = likelihood.sample(jax.random.PRNGKey(1), outputs)
  chex.assert_trees_all_close(
    likelihood.score(outputs, labels),
    jax.grad(negative_log_p)(outputs, labels),
    rtol=1e-5,
    atol=1e-6,
  )


def test_names_are_the_likelihoods():
  params, inputs = make_params(), jnp.ones((4, 2))
  predict_fn = lambda p: network(p, inputs)
  for name, likelihood in [
    ('categorical', likelihoods.categorical),
    ('bernoulli', likelihoods.bernoulli),
    ('gaussian', likelihoods.gaussian()),
  ]:
    by_name, by_object = (
      e.update(None, e.init(params), params, predict_fn=predict_fn)[0]
      for e in (estimator_of(likelihood=x) for x in (name, likelihood))
    )
    chex.assert_trees_all_equal(by_name, by_object)


def test_likelihood_that_a_user_wrote():
  # The negative log of a unit Laplace density has the score ±1.
  sign = lambda key, means: jax.random.rademacher(key, means.shape, means.dtype)
  estimator = estimator_of(likelihood=sign)
  params = jnp.array([2.0, 3.0])
  estimate, _ = estimator.update(
    None, estimator.init(params), params, predict_fn=lambda p: p
  )
  # B ĝ²: 2 predictions, the mean gradient is ±1/2 of each.
  np.testing.assert_allclose(estimate, [0.5, 0.5])


def test_samples_are_averaged_from_one_forward_pass():
  params, inputs = make_params(), jnp.ones((4, 2))
  forward = []

  def predict_fn(p):
    forward.append(None)
    return network(p, inputs)

  estimator = estimator_of(num_samples=500)
  estimate, _ = estimator.update(
    None, estimator.init(params), params, predict_fn=predict_fn
  )
  assert len(forward) == 1
  expected = dense_diagonal(predict_fn, params, fisher_of_classes)
  chex.assert_trees_all_close(estimate, expected, rtol=0.3, atol=5e-3)


def test_first_derivatives_are_enough():
  # Like flash attention, a custom_vjp has no rule for forward differentiation.
  @jax.custom_vjp
  def cube(x):
    return x**3

  cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
  params = jnp.array([1.0, 2.0])
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(cube, (params,), (params,))
  estimator = estimator_of(likelihood=lambda key, z: jnp.ones_like(z))
  update = lambda fn: estimator.update(
    None, estimator.init(params), params, predict_fn=fn
  )[0]
  chex.assert_trees_all_close(update(cube), update(lambda x: x**3))
  assert jnp.all(update(cube) > 0)


def test_low_precision_outputs_reach_the_likelihood_in_float32():
  seen = []

  def draw_score(key, outputs):
    seen.append(outputs.dtype)
    return jnp.ones_like(outputs)

  for dtype in (jnp.bfloat16, jnp.float16):
    # In half precision B ĝ² with B = 2^16 and ĝ = 2^-16 would underflow.
    params = jnp.ones(2**16, dtype)
    estimator = estimator_of(likelihood=draw_score)
    estimate, _ = estimator.update(
      None, estimator.init(params), params, predict_fn=lambda p: p
    )
    np.testing.assert_allclose(estimate, 2.0**-16, rtol=1e-2)
    assert estimate.dtype == jnp.float32
  assert set(seen) == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures('optimized')
def test_memory_is_two_arrays_of_the_shape_of_the_logits():
  batch, classes = 64, 4096
  logits_bytes = 4 * batch * classes
  inputs = jnp.ones((batch, 2))
  params = {'out': jnp.ones((2, classes))}  # Small against the logits.
  estimator = estimator_of()
  step = lambda p: estimator.update(
    None, estimator.init(p), p, predict_fn=lambda p: inputs @ p['out']
  )[0]
  memory = jax.jit(step).lower(params).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2.3 * logits_bytes


def test_leaves_of_every_kind():
  params = {
    'f32': jnp.ones(2),
    'bf16': jnp.ones(2, jnp.bfloat16),
    'int': jnp.array([3]),
    'complex': jnp.array([1.0 + 2.0j]),
    'none': None,
  }

  def predict_fn(p):
    z = p['complex']
    return jnp.concatenate(
      [p['f32'], 2 * p['bf16'].astype(jnp.float32), 3 * z.real, 4 * z.imag]
    )

  estimator = estimator_of(likelihood=lambda key, z: jnp.ones_like(z))
  estimate, _ = estimator.update(
    None, estimator.init(params), params, predict_fn=predict_fn
  )
  expected = {
    'f32': jnp.full(2, 1 / 6),
    'bf16': jnp.full(2, 4 / 6),
    'int': jnp.array([0]),
    'complex': jnp.array([9 / 6 + 16j / 6]),
    'none': None,
  }
  # 1/√6 reaches the bfloat16 leaf in bfloat16.
  chex.assert_trees_all_close(estimate, expected, rtol=1e-3)
  chex.assert_trees_all_equal_dtypes(estimate, expected)


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


def test_rank_promotion_is_not_needed():
  # Regression: the sampling of classes added arrays of ranks 2 and 1.
  w = jnp.ones((3, 5))
  inputs = jax.random.normal(jax.random.PRNGKey(0), (4, 3))
  for name in ('categorical', 'bernoulli', 'gaussian'):
    estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
      likelihood=name
    )
    with jax.numpy_rank_promotion('raise'):
      estimate, _ = estimator.update(
        None, estimator.init(w), w, predict_fn=lambda w: inputs @ w
      )
    assert jnp.all(estimate >= 0)
    assert jnp.any(estimate > 0)
