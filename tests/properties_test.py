"""Properties for all trees of parameters and all valid hyperparameters."""

import dataclasses
import itertools
from typing import Any

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
DECAYS = st.sampled_from([0.0, 0.5, 0.965, 0.9999])


@dataclasses.dataclass
class Case:
  params: Any
  mask: Any
  grads: list[Any]
  name: str
  options: dict[str, Any]


@st.composite
def cases(draw):
  params = {'params': draw(TREES)}  # None alone would be a missing argument.
  # Puts MaskedNode in place of leaves, like optax.masked.
  hidden = jax.tree.map(lambda _: draw(st.integers(0, 3)) == 0, params)
  scales = draw(
    st.lists(st.sampled_from([0, 1e-4, 1, LARGE]), min_size=3, max_size=3)
  )
  random = np.random.default_rng(draw(st.integers(0, 99)))

  def gradient(scale):
    return jax.tree.map(
      lambda p: jnp.asarray(
        scale * np.clip(random.standard_normal(p.shape), -1, 1)
      ).astype(p.dtype),
      params,
    )

  name = draw(st.sampled_from(list(ESTIMATORS)))
  return Case(
    params,
    jax.tree.map(lambda h: not h, hidden),
    [gradient(s) for s in scales],
    name,
    {
      'learning_rate': draw(st.sampled_from([0.0, 1e-3, 1.0])),
      'b1': draw(DECAYS),
      'b2': draw(DECAYS),
      'eps': draw(st.sampled_from([1e-12, 1e-8, 0.1])),
      'weight_decay': draw(st.sampled_from([0.0, 0.1])),
      'gamma': draw(st.sampled_from([1e-12, 1e-3, 1.0, 1e3])),
      'clip_threshold': draw(st.sampled_from([0.5, 1.0, 3.0])),
      'update_interval': draw(st.integers(1, 3)),
      'bias_correction': draw(st.booleans()),
      'refresh_before_update': draw(st.booleans()),
      'mu_dtype': draw(st.sampled_from([None, 'float32'])),
      'target_win_rate': draw(st.sampled_from([None, None, 0.3])),
    },
  )


def real(tree):
  """Returns all coordinates of a tree in one float32 vector."""
  parts = [jnp.zeros(0)]
  for x in jax.tree.leaves(tree):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      parts += [x.real.ravel(), x.imag.ravel()]
    elif jnp.issubdtype(x.dtype, jnp.floating):
      parts.append(x.ravel().astype(jnp.float32))
  return jnp.concatenate(parts)


EXTRA = {'obj_fn': lambda p: jnp.sum(jnp.sin(real(p))), 'predict_fn': real}


def hostile(updates, state, params=None):
  """Returns an estimate with only NaN and infinities."""
  del updates
  values = {0: jnp.nan, 1: jnp.inf, 2: -jnp.inf}

  def estimate(p):
    inexact = jnp.issubdtype(p.dtype, jnp.inexact)
    return jnp.full(p.shape, values[p.ndim] if inexact else 0, p.dtype)

  return jax.tree.map(estimate, params), state


ESTIMATORS = {
  'hostile': optax.GradientTransformation(
    lambda params: optax.EmptyState(), hostile
  ),
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian(),
  'gauss_newton': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood='gaussian'
  ),
  'squared': sophia_optax.squared_gradient_estimator_diag_hessian(4),
}


def run(case):
  """Takes three steps; returns updates and state of each."""
  tx = optax.masked(
    sophia_optax.sophia(
      **case.options, hessian_diagonal_fn=ESTIMATORS[case.name]
    ),
    case.mask,
  )
  state = tx.init(case.params)
  history = [(None, state)]
  for grads in case.grads:
    updates, state = tx.update(
      grads, state, case.params, full_params=case.params, **EXTRA
    )
    history.append((updates, state))
  return history


def all_finite(tree):
  return all(
    bool(jnp.all(jnp.isfinite(x)))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  )


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def check(case):
  with jax.disable_jit():
    history, again = run(case), run(case)

  for (updates, state), (same_updates, same_state) in zip(
    history, again, strict=True
  ):
    for x, y in zip(
      *map(jax.tree.leaves, ((updates, state), (same_updates, same_state))),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)

  rate, decay = case.options['learning_rate'], case.options['weight_decay']
  for (_, before), (updates, state) in itertools.pairwise(history):
    assert types(updates) == types(case.params)
    assert types(state) == types(before)
    assert all_finite(state)
    for p, m, u in zip(
      *map(jax.tree.leaves, (case.params, case.mask, updates)), strict=True
    ):
      if m:
        bound = rate * (
          case.options['clip_threshold'] + decay * jnp.abs(real(p))
        )
        ulp = float(jnp.finfo(p.dtype).eps) if real(p).size else 0.0
        assert jnp.all(jnp.abs(real(u)) <= bound * (1 + 4 * ulp))
        if not jnp.issubdtype(p.dtype, jnp.inexact):
          assert not jnp.any(u)


@hypothesis.settings(SETTINGS, max_examples=10)
@hypothesis.given(cases())
def test_trees_and_hyperparameters(case):
  check(case)


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=200)
@hypothesis.given(cases())
def test_any_tree_and_any_hyperparameters(case):
  check(case)
