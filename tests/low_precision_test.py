"""Half precision: underflow, float32 copies, and training in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

HUTCHINSON = sophia_optax.hutchinson_estimator_diag_hessian


def half(tree, dtype=jnp.float16):
  return optax.tree.cast(tree, dtype)


def test_float16_underflows_without_loss_scale_and_not_with_it():
  x = half(jnp.array([0.5, -1.0, 2.0]))

  def estimate(x, scale, **extra):
    def obj_fn(x):  # Its second derivative is too small for float16.
      small = x * x.dtype.type(2.0**-14)
      return jnp.float32(scale) * jnp.sum(small.astype(jnp.float32) ** 2)

    return oracles.estimate(HUTCHINSON(), x, obj_fn=obj_fn, **extra)

  exact = estimate(x.astype(jnp.float32), 1.0)
  assert jnp.all(exact > 0)
  assert not jnp.any(estimate(x, 1.0))
  scaled = estimate(x, 2.0**12, loss_scale=2.0**12)
  np.testing.assert_allclose(scaled, exact, rtol=4 * 2.0**-11)


@jax.jit
def make_problem():
  """Returns images, labels and a network."""
  images = jax.random.normal(jax.random.PRNGKey(1), (256, 8))
  teacher = jax.random.normal(jax.random.PRNGKey(3), (8, 4))
  labels = jax.random.categorical(
    jax.random.PRNGKey(2), 2 * jnp.tanh(images @ teacher)
  )
  network = {
    'hidden': jax.random.normal(jax.random.PRNGKey(4), (8, 16)) / 3,
    'w': jax.random.normal(jax.random.PRNGKey(5), (16, 4)) / 4,
    'b': jnp.zeros(4),
  }
  return images, labels, network


def logits(params, images):
  x = images.astype(params['w'].dtype)
  if 'hidden' in params:
    x = jnp.tanh(x @ params['hidden'])
  return x @ params['w'] + params['b']


def train(
  estimator, params, cast=lambda params: params, num_steps=300, scale=1.0
):
  """Returns the final loss, in float32, after 300 steps."""
  tx = sophia_optax.sophia(
    optax.cosine_decay_schedule(0.01, 300),
    gamma=0.05,
    mu_dtype=jnp.float32,
    hessian_diagonal_fn=estimator,
  )
  images, labels, _ = make_problem()

  def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), labels
    ).mean()

  predict_fn = lambda params: logits(cast(params), images)
  obj_fn = lambda params: scale * cross_entropy(predict_fn(params))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(
      jax.grad(obj_fn)(params),
      state,
      params,
      obj_fn=obj_fn,
      predict_fn=predict_fn,
      loss_scale=scale,
    )
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(
    lambda p: jax.lax.scan(step, (p, tx.init(p)), length=num_steps)[0][0]
  )
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    params = run(params)
  return float(cross_entropy(logits(half(params, jnp.float32), images)))


@pytest.mark.slow
@pytest.mark.parametrize(
  'estimator',
  [
    HUTCHINSON(),
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(),
    sophia_optax.squared_gradient_estimator_diag_hessian(256),
  ],
  ids=['hutchinson', 'gauss_newton', 'squared'],
)
def test_half_precision_ends_near_float32(estimator):
  linear, network = (
    {'w': jnp.zeros((8, 4)), 'b': jnp.zeros(4)},
    make_problem()[2],
  )
  full = train(estimator, linear)
  assert full < 0.9 * train(estimator, linear, num_steps=10)
  coarse = train(estimator, half(linear, jnp.bfloat16))
  assert coarse != full
  assert abs(coarse / full - 1) < 0.002
  scaled = train(estimator, half(linear), scale=2.0**10)
  assert scaled != full
  assert abs(scaled / full - 1) < 0.002

  # A network continues to improve, but bfloat16 weights are too coarse for it.
  # With float32 copies, only the computations of the model are coarse.
  full = train(estimator, network)
  copied = train(
    estimator, network, cast=lambda params: half(params, jnp.bfloat16)
  )
  assert copied != full
  assert abs(copied / full - 1) < 0.04
  assert train(estimator, half(network, jnp.bfloat16)) > 1.05 * full


def test_loss_scale_of_the_gradient_suits_gauss_newton_in_float16():
  # Regression: the backward pass computed √B times the gradient. Its largest
  # entries overflowed and were ignored, which is a bias.
  num_predictions, scale = 4096, 2.0**12
  x = jnp.linspace(0.1, 10.0, 8).astype(jnp.float16)
  params = jnp.zeros(8, jnp.float16)
  predict_fn = lambda p: jnp.broadcast_to(p * x, (num_predictions, 8))
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, means: jnp.ones_like(means)
  )
  loss = lambda p: scale * jnp.mean(predict_fn(p).astype(jnp.float32))
  assert jnp.all(jnp.isfinite(jax.grad(loss)(params)))
  got, _ = jax.jit(
    lambda: estimator.update(
      None,
      estimator.init(params),
      params,
      predict_fn=predict_fn,
      loss_scale=scale,
    )
  )()
  exact = (x.astype(jnp.float32) / 8) ** 2 * num_predictions * 8
  np.testing.assert_allclose(got, exact, rtol=5e-3)


def test_normal_probes_are_drawn_in_float32():
  # Draws in bfloat16 have only a few hundred different values, with a wrong
  # variance.
  squares = oracles.estimate(
    HUTCHINSON(distribution='normal'),
    jnp.zeros(20_000, jnp.bfloat16),
    obj_fn=lambda x: jnp.sum(x.astype(jnp.float32) ** 2) / 2,
  )
  assert np.unique(squares).size > 700


def test_gradients_are_unscaled_in_float32():
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    mu_dtype=jnp.float32,
    hessian_diagonal_fn=sophia_optax.squared_gradient_estimator_diag_hessian(1),
  )
  x = jnp.ones(1, jnp.float16)
  grads = jnp.full(1, 2.0**-20, jnp.float16)  # Dividing it by 1024 gives 0.
  _, state = tx.update(grads, tx.init(x), x, loss_scale=2.0**10)
  assert state.mu == 2.0**-30


def test_h_in_bfloat16_is_averaged_in_float32():
  tx = sophia_optax.scale_by_sophia(
    b2=0.99,
    nu_dtype=jnp.bfloat16,
    hessian_diagonal_fn=optax.stateless(lambda g, _: 1.5 * jnp.ones_like(g)),
  )
  x = jnp.ones(1)
  state = tx.init(x)._replace(nu=jnp.ones(1, jnp.bfloat16))
  _, state = tx.update(x, state, x)
  # 1.005 is nearer to this number than to 1, the average in bfloat16.
  assert state.nu == 1 + 2.0**-7
