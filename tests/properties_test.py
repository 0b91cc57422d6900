"""Properties for all trees of parameters and all valid hyperparameters."""

import itertools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

# Operations run one by one. With few shapes, JAX compiles each only once.
SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0)]
DTYPES = ['float32', 'bfloat16', 'float16', 'complex64', 'int32', 'bool']
LARGE = 1e4  # It and the square of 0.01 times it are in the range of float16.
SETTINGS = hypothesis.settings(
  deadline=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)


@st.composite
def leaves(draw):
  shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
  random = np.random.default_rng(draw(st.integers(0, 99)))
  scale = draw(st.sampled_from([0, 1e-6, 1, 10]))
  values = scale * random.standard_normal((2, *shape))
  if dtype == 'complex64':
    values = values + 1j * values[::-1]
  return jnp.asarray(values[0].astype(jnp.dtype(dtype)))


TREES = st.recursive(
  leaves() | st.none(),
  lambda inner: (
    st.dictionaries(st.sampled_from('abc'), inner, max_size=3)
    | st.lists(inner, max_size=2).map(tuple)
  ),
  max_leaves=5,
)


def real(tree):
  """Returns all coordinates of a tree in one float32 vector."""
  parts = [jnp.zeros(0)]
  for x in jax.tree.leaves(tree):
    if jnp.iscomplexobj(x):
      parts += [x.real.ravel(), x.imag.ravel()]
    elif jnp.issubdtype(x.dtype, jnp.floating):
      parts.append(x.ravel().astype(jnp.float32))
  return jnp.concatenate(parts)


def hostile(grads, params):
  """Returns an estimate with only NaN and infinities."""
  del params
  values = {0: jnp.nan, 1: jnp.inf, 2: -jnp.inf}

  def estimate(g):
    inexact = jnp.issubdtype(g.dtype, jnp.inexact)
    return jnp.full(g.shape, values[g.ndim] if inexact else 0, g.dtype)

  return jax.tree.map(estimate, grads)


DECAYS = st.sampled_from([0.0, 0.5, 0.965, 0.9999])
OPTIONS = st.fixed_dictionaries(
  {
    'learning_rate': st.sampled_from([0.0, 1e-3, 1.0]),
    'b1': DECAYS,
    'b2': DECAYS,
    'eps': st.sampled_from([1e-12, 1e-8, 0.1]),
    'weight_decay': st.sampled_from([0.0, 0.1]),
    'gamma': st.sampled_from([1e-12, 1e-3, 1.0, 1e3]),
    'clip_threshold': st.sampled_from([0.5, 1.0, 3.0]),
    'update_interval': st.integers(1, 3),
    'bias_correction': st.booleans(),
    'refresh_before_update': st.booleans(),
    'mu_dtype': st.sampled_from([None, 'float32']),
    'target_win_rate': st.sampled_from([None, None, 0.3]),
    'hessian_diagonal_fn': st.sampled_from(
      [
        optax.stateless(hostile),
        sophia_optax.hutchinson_estimator_diag_hessian(),
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
          likelihood='gaussian'
        ),
        sophia_optax.squared_gradient_estimator_diag_hessian(4),
      ]
    ),
  }
)
SCALES = st.lists(st.sampled_from([0, 1e-4, 1, LARGE]), min_size=3, max_size=3)
CASES = st.tuples(TREES, OPTIONS, SCALES, st.data())


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def check(tree, options, scales, data):
  """Takes three steps, with one scale of the gradients each."""
  params = {'params': tree}  # None alone would be a missing argument.
  # optax.masked puts MaskedNode in place of leaves.
  mask = jax.tree.map(lambda _: data.draw(st.integers(0, 3)) > 0, params)
  random = np.random.default_rng(data.draw(st.integers(0, 99)))

  def gradient(p, scale):
    values = scale * np.clip(random.standard_normal(p.shape), -1, 1)
    return jnp.asarray(values).astype(p.dtype)

  tx = optax.masked(sophia_optax.sophia(**options), mask)
  history = [(None, tx.init(params))]
  with jax.disable_jit():
    for scale in scales:
      grads = jax.tree.map(lambda p, scale=scale: gradient(p, scale), params)
      step = tx.update(
        grads,
        history[-1][1],
        params,
        full_params=params,
        obj_fn=lambda p: jnp.sum(jnp.sin(real(p))),
        predict_fn=real,
      )
      history.append(step)

  for (_, before), (updates, state) in itertools.pairwise(history):
    assert types(updates) == types(params)
    assert types(state) == types(before)
    for x in jax.tree.leaves(state):
      assert not jnp.issubdtype(x.dtype, jnp.inexact) or jnp.isfinite(x).all()
    for p, m, u in zip(
      *map(jax.tree.leaves, (params, mask, updates)), strict=True
    ):
      if m and jnp.issubdtype(p.dtype, jnp.inexact):
        size = options['clip_threshold']
        size += options['weight_decay'] * jnp.abs(real(p))
        rounded = 1 + 4 * float(jnp.finfo(p.dtype).eps)
        bound = options['learning_rate'] * size * rounded
        assert jnp.all(jnp.abs(real(u)) <= bound)
      elif m:
        assert not jnp.any(u)


@hypothesis.settings(SETTINGS, max_examples=6)
@hypothesis.given(CASES)
def test_trees_and_hyperparameters(case):
  check(*case)


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=200)
@hypothesis.given(CASES)
def test_any_tree_and_any_hyperparameters(case):
  check(*case)
