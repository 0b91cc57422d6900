"""sophiaw: the settings of its docstring, and which examples it takes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

RNG = np.random.default_rng(0)
INPUTS = jnp.float32(RNG.normal(size=(64, 3)))
MASK = jnp.arange(64) % 3 > 0
W = jnp.float32(RNG.normal(size=(3, 4)))
GAUSS_NEWTON = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
HUTCHINSON = sophia_optax.hutchinson_estimator_diag_hessian


def predict(w, inputs):
  return inputs @ w


def loss_fn(w, inputs):
  return jnp.mean(jax.nn.logsumexp(predict(w, inputs), axis=-1))


def train(tx, stride=1):
  """Returns parameters and moments after four steps."""

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(
      jax.grad(loss_fn)(w, INPUTS),
      state,
      w,
      obj_fn=loss_fn,
      predict_fn=predict,
      batch=INPUTS[::stride],
      label_mask=MASK[::stride],
    )
    return (optax.apply_updates(w, updates), state), None

  w, (state, *_) = jax.lax.scan(step, (W, tx.init(W)), length=4)[0]
  return w, state.mu, state.nu, state.second_moment, state.gamma_factor


@pytest.mark.parametrize(
  ('curvature', 'estimator', 'gamma', 'target'),
  [
    ('gauss_newton', GAUSS_NEWTON(), 0.1, 0.3),
    ('hessian', HUTCHINSON(), 0.05, 0.45),
    (HUTCHINSON(5), HUTCHINSON(5), 0.1, 0.3),
  ],
  ids=['gauss_newton', 'hessian', 'own'],
)
def test_is_sophia_with_the_settings_of_its_docstring(
  curvature, estimator, gamma, target
):
  ours = sophia_optax.sophiaw(
    0.1,
    0.8,
    0.99,
    1e-6,
    mu_dtype=jnp.bfloat16,
    weight_decay=0.2,
    mask=lambda w: False,
    curvature=curvature,
  )
  expected = sophia_optax.sophia(
    0.1,
    b1=0.8,
    b2=0.95,
    eps=1e-6,
    weight_decay=0.2,
    weight_decay_mask=lambda w: False,
    gamma=gamma,
    target_win_rate=target,
    mu_dtype=jnp.bfloat16,
    nesterov=True,
    nu_bias_correction=True,
    adam_b2=0.99,
    hessian_diagonal_fn=sophia_optax.microbatched(estimator, 8),
  )
  chex.assert_trees_all_close(
    *jax.jit(lambda: (train(ours), train(expected, stride=4)))(), rtol=1e-6
  )


@pytest.mark.parametrize(
  ('size', 'fraction', 'parts', 'part'),
  [
    (64, 1.0, 8, 8),
    (64, 0.25, 8, 2),
    (64, 0.3, 5, 11),  # Of 22 examples 2 parts are equal, but not 3, 4 or 5.
    (3, 0.25, 8, 1),
  ],
)
def test_size_of_a_part(size, fraction, parts, part):
  shapes = []

  def predict_fn(w, inputs):
    shapes.append(inputs.shape)
    return inputs @ w

  tx = sophia_optax.sophiaw(
    0.1, curvature_fraction=fraction, curvature_parts=parts
  )
  jax.eval_shape(
    lambda s: tx.update(W, s, W, predict_fn=predict_fn, batch=INPUTS[:size]),
    tx.init(W),
  )
  assert {shape[0] for shape in shapes} == {part}


def test_without_a_batch():
  tx = sophia_optax.sophiaw(0.1)
  step = jax.jit(
    lambda s: tx.update(W, s, W, predict_fn=lambda w: predict(w, INPUTS))
  )
  assert jnp.all(optax.tree.get(step(tx.init(W))[1], 'nu') > 0)


@pytest.mark.parametrize(
  'wrong',
  [
    {'curvature': 'fisher'},
    {'curvature_fraction': 3.0},
    {'curvature_parts': 0},
  ],
)
def test_errors(wrong):
  with pytest.raises(ValueError, match=f'{next(iter(wrong))} must'):
    sophia_optax.sophiaw(0.1, **wrong)
