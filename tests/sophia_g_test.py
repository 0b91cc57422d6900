"""Compares Sophia-G with a transcript of PyTorch's SophiaG."""

import chex
import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax


class SophiaG:
  """PyTorch's SophiaG in NumPy, for one parameter group."""

  def __init__(self, lr, betas, rho, weight_decay, maximize, bs):
    self.lr, self.betas, self.rho, self.bs = lr, betas, rho, bs
    self.weight_decay, self.maximize = weight_decay, maximize
    self.exp_avg = self.hessian = 0.0

  def step(self, param, grad):
    grad = -grad if self.maximize else grad
    param = param * (1 - self.lr * self.weight_decay)
    self.exp_avg = self.betas[0] * self.exp_avg + (1 - self.betas[0]) * grad
    ratio = np.abs(self.exp_avg) / (self.rho * self.bs * self.hessian + 1e-15)
    return param - self.lr * np.sign(self.exp_avg) * np.minimum(ratio, 1)

  def update_hessian(self, grad):
    self.hessian = self.betas[1] * self.hessian + (1 - self.betas[1]) * grad**2


class ComplexSophiaG:
  """Treats complex parameters as two real ones, like PyTorch's view_as_real."""

  def __init__(self, *args):
    self.parts = SophiaG(*args), SophiaG(*args)

  def step(self, param, grad):
    re, im = self.parts
    return re.step(param.real, grad.real) + 1j * im.step(param.imag, grad.imag)

  def update_hessian(self, grad):
    for part, g in zip(self.parts, (grad.real, grad.imag), strict=True):
      part.update_hessian(g)


def curvature_gradients(batch_size):
  """Returns B ĝ ⊙ ĝ of the gradients that are passed in."""
  squared = sophia_optax.squared_gradient_estimator_diag_hessian(batch_size)

  def update(updates, state, params=None, *, curvature_grads, **extra_args):
    del updates, extra_args
    return squared.update(curvature_grads, state, params)

  return optax.GradientTransformationExtraArgs(squared.init, update)


@pytest.mark.parametrize('maximize', [False, True])
def test_transcript_of_pytorch(maximize):
  lr, betas, rho, decay, bs, k = 0.01, (0.9, 0.8), 0.04, 0.1, 5, 10
  rng = np.random.default_rng(0)
  params = {
    'decayed': rng.normal(size=(3, 2)),
    'not_decayed': rng.normal(size=4),
    'complex': rng.normal(size=2) + 1j * rng.normal(size=2),
  }
  groups = {
    name: (ComplexSophiaG if name == 'complex' else SophiaG)(
      lr, betas, rho, 0 if name == 'not_decayed' else decay, maximize, bs
    )
    for name in params
  }

  def draw():
    return {
      name: rng.normal(size=p.shape)
      + (1j * rng.normal(size=p.shape) if name == 'complex' else 0)
      for name, p in params.items()
    }

  tx = sophia_optax.sophia_g(
    lr,
    *betas,
    rho,
    decay,
    weight_decay_mask={name: name != 'not_decayed' for name in params},
    update_interval=k,
    maximize=maximize,
    hessian_diagonal_fn=curvature_gradients(bs),
  )
  to_jax = lambda tree: jax.tree.map(
    lambda x: jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else 'f4'),
    tree,
  )
  actual = to_jax(params)
  state = tx.init(actual)
  update = jax.jit(lambda g, s, p, c: tx.update(g, s, p, curvature_grads=c))
  for step in range(100):
    grads, curvature = draw(), draw()
    updates, state = update(to_jax(grads), state, actual, to_jax(curvature))
    actual = optax.apply_updates(actual, updates)
    for name, group in groups.items():
      params[name] = group.step(params[name], grads[name])
      if step % k == 0:
        group.update_hessian(curvature[name])
    chex.assert_trees_all_close(actual, params, rtol=1e-5, atol=1e-6)
  assert 0.02 < optax.tree.get(state, 'win_rate') < 0.98


def test_maximize_negates_the_curvature_of_hutchinson():
  # A maximum at 1, where the curvature is -2.
  objective = lambda x: -jnp.sum((x - 1.0) ** 2)
  tx = sophia_optax.sophia_g(
    0.5,
    b1=0.0,
    b2=0.0,
    rho=1.0,
    weight_decay=0.0,
    maximize=True,
    refresh_before_update=True,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(),
  )
  x = jnp.array([0.6, 1.2])
  update = lambda x: tx.update(
    jax.grad(objective)(x), tx.init(x), x, obj_fn=objective
  )
  updates, state = update(x)
  np.testing.assert_allclose(optax.tree.get(state, 'nu'), [2.0, 2.0])
  # Half of Newton's step, up.
  np.testing.assert_allclose(updates, 0.5 * (1.0 - x), rtol=1e-5)

  for result in ((0.0, 0.0), (), {'loss': 0.0}, None):
    got = f'must return .*, got a {type(result).__name__}'
    with pytest.raises(TypeError, match=got):
      tx.update(x, tx.init(x), x, obj_fn=lambda _, result=result: result)


def test_maximize_does_not_negate_the_curvature_of_gauss_newton():
  inputs = jnp.array([[1.0, 2.0], [3.0, -1.0]])
  nus = []
  for maximize in (False, True):
    tx = sophia_optax.sophia_g(
      maximize=maximize,
      hessian_diagonal_fn=(
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
          likelihood='gaussian'
        )
      ),
    )
    w = jnp.ones(2)
    _, state = tx.update(w, tx.init(w), w, predict_fn=lambda w: inputs @ w)
    nus.append(optax.tree.get(state, 'nu'))
  chex.assert_trees_all_equal(*nus)
  assert jnp.all(nus[0] > 0)


def test_hyperparameters_change_between_steps_without_recompilation():
  tx = optax.inject_hyperparams(sophia_optax.sophia_g)(
    hessian_diagonal_fn=sophia_optax.squared_gradient_estimator_diag_hessian(
      1.0
    ),
    update_interval=1,
  )
  params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
  traces = []

  @jax.jit
  def step(state):
    traces.append(None)
    return tx.update(grads, state, params)

  def after(**changes):
    state = tx.init(params)
    _, state = step(state)
    for name, value in changes.items():
      state.hyperparams[name] = jnp.float32(value)
    return step(state)

  before, _ = after()
  double, _ = after(learning_rate=2e-4)
  np.testing.assert_allclose(double, 2 * before, rtol=1e-5)
  gentle, _ = after(rho=1e4)
  assert jnp.all(jnp.abs(gentle) < jnp.abs(before))
  _, state = after(b1=0.0)
  np.testing.assert_allclose(optax.tree.get(state, 'mu'), grads, rtol=1e-6)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'learning_rate': -1e-3}, r'learning_rate .* got -0\.001'),
    ({'b1': 1.0}, r'b1 .* got 1\.0'),
    ({'b2': -0.5}, r'b2 .* got -0\.5'),
    ({'rho': -0.04}, r'rho .* got -0\.04'),
    ({'weight_decay': -0.1}, r'weight_decay .* got -0\.1'),
    ({'update_interval': 0}, r'update_interval .* got 0'),
  ],
)
def test_validation(kwargs, match):
  with pytest.raises(ValueError, match=match):
    sophia_optax.sophia_g(**kwargs)


def test_learning_rate_and_weight_decay_may_be_schedules():
  tx = sophia_optax.sophia_g(
    optax.linear_schedule(0.1, 0.5, 2),
    weight_decay=optax.linear_schedule(0.5, 0.1, 2),
  )
  params = jnp.array([1.0, -2.0])
  state = tx.init(params)
  for decay in (0.1 * 0.5, 0.3 * 0.3, 0.5 * 0.1):
    # Without a gradient, only the decay acts.
    updates, state = tx.update(
      jnp.zeros(2), state, params, predict_fn=lambda p: p
    )
    np.testing.assert_allclose(updates, -decay * params, rtol=1e-6)


def test_sparse_gradient():
  tx = sophia_optax.sophia_g()
  params = {'w': jnp.eye(3)}
  grads = {'w': sparse.BCOO.fromdense(jnp.eye(3))}
  with pytest.raises(ValueError, match=r'like params.* got: .*BCOO'):
    tx.update(grads, tx.init(params), params, predict_fn=lambda p: p['w'])


def test_state_has_the_dtypes_and_the_diagnostics_asked_for():
  params = {'w': jnp.ones(3)}
  tx = sophia_optax.sophia_g(
    mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16, diagnostics=True
  )
  state = tx.init(params)
  assert optax.tree.get(state, 'mu')['w'].dtype == jnp.bfloat16
  assert optax.tree.get(state, 'nu')['w'].dtype == jnp.float16
  assert optax.tree.get(state, 'negative_fraction') == 0
  assert sophia_optax.diagnose(state)['w'].win_rate == 0


@pytest.mark.parametrize('bias_correction', [False, True])
def test_bias_correction_is_optional(bias_correction):
  tx = sophia_optax.sophia_g(
    0.1,
    b1=0.9,
    b2=0.0,
    rho=2.0,
    weight_decay=0.0,
    update_interval=1,
    hessian_diagonal_fn=optax.stateless(lambda g, p: jnp.ones_like(p)),
    bias_correction=bias_correction,
    refresh_before_update=True,
  )
  x = jnp.zeros(3)
  state, m = tx.init(x), 0.0
  for t, g in enumerate(np.random.default_rng(0).normal(size=(4, 3)), start=1):
    u, state = tx.update(jnp.float32(g), state, x)
    m = 0.9 * m + 0.1 * g
    m_hat = m / (1 - 0.9**t) if bias_correction else m
    np.testing.assert_allclose(u, -0.1 * np.clip(m_hat / 2, -1, 1), rtol=1e-5)
