"""Sophia with fused kernels and functions with custom derivatives."""

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

hutchinson = sophia_optax.hutchinson_estimator_diag_hessian
MODES = ('forward_over_reverse', 'reverse_over_reverse', 'finite_difference')
HELP = r"hvp='finite_difference'.*'reverse_over_reverse'.*sophia_g"


def estimate(obj_fn, params, hvp, jit=True):
  estimator = hutchinson(hvp=hvp)
  update = lambda p: estimator.update(
    None, estimator.init(p), p, obj_fn=obj_fn
  )[0]
  return (jax.jit(update) if jit else update)(params)


def dense_estimate(obj_fn, params):
  """Returns v ⊙ H v with the dense H, for the probe that `estimate` draws."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  assert flat.size % 2, 'The sum of the signs must not be zero.'
  hessian = jax.jit(jax.hessian(lambda x: obj_fn(unravel(x))))(flat)
  # H is all ones here, so the estimate is the probe times its sum.
  square = lambda p: jnp.sum(jax.flatten_util.ravel_pytree(p)[0]) ** 2 / 2
  probe = jnp.sign(
    jax.flatten_util.ravel_pytree(
      estimate(square, params, 'forward_over_reverse')
    )[0]
  )
  return probe * (hessian @ probe)


def assert_dense(got, obj_fn, params):
  got = jax.flatten_util.ravel_pytree(got)[0]
  exact = dense_estimate(obj_fn, params)
  error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert error < 0.01, error


# Attention.

SIZE = 128  # The smallest that the kernel takes.
RNG = np.random.default_rng(0)
INPUTS = jnp.float32(RNG.normal(size=(SIZE, SIZE)))
LABELS = (INPUTS[:, 0] > 0).astype(int)
PARAMS = {
  'qkv': jnp.float32(RNG.normal(1, 1 / 4, (3, SIZE))),
  'out': jnp.float32(RNG.normal(0, 1 / 10, (SIZE, 2))),
}


def flash_predict(params):
  q, k, v = (INPUTS * w for w in params['qkv'])  # (T, C)
  out = flash_attention.flash_attention(
    q[None, None], k[None, None], v[None, None], sm_scale=SIZE**-0.5
  )[0, 0]
  return out @ params['out']  # (T, 2)


def flash_loss(params):
  return optax.softmax_cross_entropy_with_integer_labels(
    flash_predict(params), LABELS
  ).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
  'tx',
  [
    sophia_optax.sophia(
      0.02,
      update_interval=2,
      hessian_diagonal_fn=hutchinson(hvp='finite_difference'),
    ),
    sophia_optax.sophia_g(0.02, update_interval=2),
  ],
  ids=['finite_difference', 'sophia_g'],
)
def test_flash_attention_trains(tx):
  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(flash_loss)(params)
    updates, state = tx.update(
      grads, state, params, obj_fn=flash_loss, predict_fn=flash_predict
    )
    return optax.apply_updates(params, updates), state, loss

  params, state, losses = PARAMS, tx.init(PARAMS), []
  with pltpu.force_tpu_interpret_mode():
    for _ in range(4):
      params, state, loss = step(params, state)
      losses.append(float(loss))
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < 0.9 * losses[0]
  assert optax.tree.get(state, 'refresh_count') == 2
  assert optax.tree.get(state, 'nonfinite_count') == 0
  for h in jax.tree.leaves(optax.tree.get(state, 'nu')):
    assert np.mean(h != 0) > 0.9


@pytest.mark.parametrize('hvp', MODES[:2])
def test_flash_attention_has_no_second_derivative(hvp):
  tx = sophia_optax.sophia(0.02, hessian_diagonal_fn=hutchinson(hvp=hvp))
  update = lambda p: tx.update(p, tx.init(p), p, obj_fn=flash_loss)
  with (
    pltpu.force_tpu_interpret_mode(),
    pytest.raises(NotImplementedError, match=HELP) as caught,
  ):
    jax.jit(update)(PARAMS)
  assert str(caught.value).startswith(f'hvp={hvp!r} needs a second')
  assert isinstance(caught.value.__cause__, NotImplementedError)
  assert 'Higher-order AD' in str(caught.value.__cause__)


TOKENS = jnp.float32(RNG.normal(size=(1, 5, 1, 4)))
SMALL = {
  'qkv': jnp.float32(RNG.normal(1, 1 / 2, (3, 4))),
  'out': jnp.array([0.5, -1.0, 0.7, 1.1, 0.3])[:, None],
}


def xla_loss(params):
  q, k, v = (TOKENS * w for w in params['qkv'])
  out = jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation='xla'
  )
  return jnp.mean((jnp.sum(out[0, :, 0] * params['out'], 1) - 1.0) ** 2)


@pytest.mark.parametrize('hvp', MODES)
def test_xla_attention(hvp):
  assert_dense(estimate(xla_loss, SMALL, hvp), xla_loss, SMALL)


# Cross-entropies with a backward rule of their own.

TARGETS = jax.nn.one_hot(jnp.array([0, 2, 1, 2]), 3)
WEIGHTS = jnp.array([0.3, -0.5, 0.8])


def plain_cross_entropy(logits, targets):
  picked = jnp.sum(logits * targets, axis=-1)
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def with_own_rule(forward):
  """A cross-entropy whose forward rule takes the loss from `forward`."""

  @jax.custom_vjp
  def cross_entropy(logits, targets):
    return plain_cross_entropy(logits, targets)

  def forward_rule(logits, targets):
    value = forward(cross_entropy, logits, targets)
    return value, (jax.nn.softmax(logits), targets)

  def backward_rule(residuals, g):
    probabilities, targets = residuals
    return g * (probabilities - targets) / len(targets), None

  cross_entropy.defvjp(forward_rule, backward_rule)
  return cross_entropy


FORWARD = {
  'plain': lambda itself, *args: plain_cross_entropy(*args),
  'calls_itself': lambda itself, *args: itself(*args),
}


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('forward', FORWARD)
@pytest.mark.parametrize('hvp', MODES)
def test_cross_entropy_with_its_own_rule(hvp, forward, jit):
  inputs = jnp.array([[1.0], [-2.0], [0.5], [1.5]])
  own = with_own_rule(FORWARD[forward])
  loss = lambda w, fn=own: fn(jnp.tanh(inputs * w), TARGETS)
  if (hvp, forward, jit) == (MODES[0], 'calls_itself', False):
    # Under jit, JAX does not differentiate the inner function.
    with pytest.raises(NotImplementedError, match=HELP) as caught:
      estimate(loss, WEIGHTS, hvp, jit)
    assert 'forward-mode' in str(caught.value.__cause__)
    return
  plain = lambda w: loss(w, plain_cross_entropy)
  assert_dense(estimate(loss, WEIGHTS, hvp, jit), plain, WEIGHTS)


# Backward rules that have no derivative.


def power(backward):
  """x³ with a backward rule that takes x² from `backward`."""
  fn = jax.custom_vjp(lambda x: x**3)
  fn.defvjp(lambda x: (x**3, x), lambda x, g: (3 * g * backward(x),))
  return lambda x: jnp.sum(fn(x))


def callback(x):
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return jax.pure_callback(lambda y: np.square(y), shape, x)


def loop(x):
  return jax.lax.while_loop(
    lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * x), (0, jnp.ones_like(x))
  )[1]


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize(
  ('backward', 'refused'),
  [(callback, MODES[:2]), (loop, MODES[1:2])],
  ids=['callback', 'loop'],
)
def test_backward_rule_without_a_derivative(backward, refused, jit):
  loss, x = power(backward), jnp.array([1.0, 2.0])
  for hvp in MODES:
    if hvp in refused:
      with pytest.raises(NotImplementedError, match=HELP) as caught:
        estimate(loss, x, hvp, jit)
      assert isinstance(caught.value.__cause__, ValueError)
    else:
      np.testing.assert_allclose(estimate(loss, x, hvp, jit), 6 * x, rtol=1e-3)


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('hvp', MODES)
@pytest.mark.parametrize(
  'error',
  [
    AssertionError('mine'),
    KeyError('mine'),
    NotImplementedError('mine'),
    TypeError('mine'),
    ValueError('mine'),
  ],
  ids=lambda e: type(e).__name__,
)
def test_errors_of_the_objective_are_not_changed(error, hvp, jit):
  def obj_fn(params):
    raise error

  with pytest.raises(type(error)) as caught:
    estimate(obj_fn, WEIGHTS, hvp, jit)
  assert caught.value is error
  assert 'mine' in str(error)
  assert 'hvp' not in ''.join([str(error), *getattr(error, '__notes__', [])])


def test_kernel_without_a_gradient_keeps_its_error():
  # It has no gradient, so Sophia-G could not train it either.
  loss = lambda x: jnp.sum(callback(x))
  for hvp in MODES:
    with pytest.raises(ValueError, match='Pure callbacks do not support JVP'):
      estimate(loss, jnp.ones(2), hvp)
