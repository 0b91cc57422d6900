"""Compares Sophia-G with a transcript of PyTorch's SophiaG."""

import chex
import jax
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

  def draw(*shape):
    """Returns arrays whose last axis is real and imaginary part."""
    return {
      'decayed': rng.normal(size=(*shape, 3, 2)),
      'not_decayed': rng.normal(size=(*shape, 4)),
      'complex': rng.normal(size=(*shape, 2, 2)),  # PyTorch's view_as_real.
    }

  def to_jax(tree):
    parts = jax.tree.map(jnp.float32, tree)
    join = lambda x: jax.lax.complex(x[..., 0], x[..., 1])
    return parts | {'complex': join(parts['complex'])}

  params, grads, curvature = draw(), draw(100), draw(100)
  mask = {name: name != 'not_decayed' for name in params}
  groups = {
    name: SophiaG(lr, betas, rho, decay * mask[name], maximize, bs)
    for name in params
  }
  tx = sophia_optax.sophia_g(
    lr,
    *betas,
    rho,
    decay,
    weight_decay_mask=mask,
    update_interval=k,
    maximize=maximize,
    hessian_diagonal_fn=curvature_gradients(bs),
  )
  carry = to_jax(params), tx.init(to_jax(params))

  @jax.jit
  def train(carry, grads, curvature):
    def step(carry, gradients):
      params, state = carry
      g, c = gradients
      updates, state = tx.update(g, state, params, curvature_grads=c)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(step, carry, (grads, curvature))

  (_, state), history = train(carry, to_jax(grads), to_jax(curvature))
  assert 0.02 < optax.tree.get(state, 'win_rate') < 0.98
  expected = []
  for t in range(100):
    for name, group in groups.items():
      params[name] = group.step(params[name], grads[name][t])
      if t % k == 0:
        group.update_hessian(curvature[name][t])
    expected.append(dict(params))
  expected = jax.tree.map(lambda *x: np.stack(x), *expected)
  chex.assert_trees_all_close(history, to_jax(expected), rtol=1e-5, atol=1e-6)


def test_eps():
  x = jnp.ones(1)
  tx = sophia_optax.sophia_g(0.1, weight_decay=0.0)
  grads = jnp.full(1, 1e-9)  # Larger than eps, and h is 0: a sign update.
  updates, _ = tx.update(grads, tx.init(x), x, refresh=False)
  np.testing.assert_allclose(updates, -0.1, rtol=1e-6)


def test_maximize_negates_the_objective():
  # A maximum at 1, where the curvature is -2.
  objective = lambda x: -jnp.sum((x - 1.0) ** 2)
  x, results = jnp.array([0.6, 1.2]), []
  for name, fn, aux in (
    ('obj_fn', objective, False),
    ('obj_fn', lambda x: (objective(x), 'aux'), True),
    ('value_fn', objective, False),  # As line searches call it.
  ):
    tx = sophia_optax.sophia_g(
      0.5,
      b2=0.0,
      weight_decay=0.0,
      maximize=True,
      bias_correction=True,
      hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
        has_aux=aux
      ),
    )
    step = lambda state, tx=tx, extra={name: fn}: tx.update(
      jax.grad(objective)(x), state, x, **extra
    )
    results.append(jax.jit(lambda s, step=step: step(step(s)[1]))(tx.init(x)))
  chex.assert_trees_all_equal(*results)
  updates, state = results[0]
  np.testing.assert_allclose(optax.tree.get(state, 'nu'), [2.0, 2.0])
  # Newton's step divided by rho, upwards and clipped.
  np.testing.assert_allclose(updates, [0.5, -0.5], rtol=1e-5)


def test_maximize_does_not_negate_the_curvature_of_gauss_newton():
  inputs, w = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.ones(2)
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood='gaussian'
  )

  def nu(maximize):
    tx = sophia_optax.sophia_g(maximize=maximize, hessian_diagonal_fn=estimator)
    _, state = tx.update(w, tx.init(w), w, predict_fn=lambda w: inputs @ w)
    return optax.tree.get(state, 'nu')

  nus = jax.jit(lambda: (nu(False), nu(True)))()
  chex.assert_trees_all_equal(*nus)
  assert jnp.all(nus[0] > 0)
