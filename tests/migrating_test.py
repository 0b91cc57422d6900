"""Each row of the table in docs/migrating.md, against a NumPy transcript."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'migrating.md'
STEPS = 40
# Tokens of the curvature batch, and a bs that is another number.
SETTINGS = {
  'lr': 0.01,
  'b1': 0.9,
  'b2': 0.8,
  'eps': 1e-3,
  'wd': 0.1,
  'k': 4,
  'B': 6,
  'bs': 15,
}


def calls():
  """The first and last cell of each row of the page's first table."""
  text = PAGE.read_text()
  start = text.index('| implementation |')
  rows = text[start : text.index('\n\n', start)].splitlines()[2:]
  cells = [[c.strip() for c in row.strip('|').split(' | ')] for row in rows]
  return {name: call.strip('`') for name, _, call in cells}


def clip(x):
  return np.clip(x, -1, 1)


class Transcript:
  """One implementation: what a step does with g and a curvature batch's ĝ."""

  def __init__(self, gamma):
    self.gamma, self.m, self.h, self.t = gamma, 0.0, 0.0, 0
    self.__dict__.update(SETTINGS)

  def average(self, g):
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.t += 1

  def corrected(self):
    return self.m / (1 - self.b1**self.t)

  def refresh(self, estimate):
    if (self.t - 1) % self.k == 0:
      self.h = self.b2 * self.h + (1 - self.b2) * estimate

  def move(self, theta, u):
    return theta - self.lr * (u + self.wd * theta)


class OptaxContrib(Transcript):  # And Levanter, with other probes.
  def step(self, theta, g, estimate):
    self.average(g)
    u = clip(self.corrected() / np.maximum(self.gamma * self.h, self.eps))
    self.refresh(estimate)
    return self.move(theta, u)


class Paper(Transcript):
  def step(self, theta, g, estimate):
    self.average(g)
    self.refresh(estimate)
    theta = theta - self.lr * self.wd * theta
    return theta - self.lr * clip(
      self.m / np.maximum(self.gamma * self.h, self.eps)
    )


class PyTorch(Transcript):
  def step(self, theta, g, curvature_gradient):
    self.average(g)
    ratio = np.abs(self.m) / (self.gamma * self.bs * self.h + 1e-15)
    u = np.sign(self.m) * np.minimum(ratio, 1)
    self.refresh(curvature_gradient**2)
    return self.move(theta, u)


class Zeta(Transcript):
  def step(self, theta, g, curvature_gradient):
    del curvature_gradient  # This implementation has only one batch.
    self.h = self.b2 * self.h + (1 - self.b2) * g**2
    self.average(g)
    self.average(g)
    ratio = np.abs(self.m) / (self.gamma * self.bs * self.h + 1e-15)
    return self.move(theta, np.sign(self.m) * np.minimum(ratio, 1))


class AuthorsJax(Transcript):
  def step(self, theta, g, curvature_gradient):
    self.average(g)
    self.refresh(curvature_gradient**2)
    return self.move(
      theta, clip(self.m / np.maximum(self.gamma * self.h, self.eps))
    )


# Transcript, its gamma or rho, and how the estimator here turns what the
# transcript is given into an estimate.
ROWS = {
  '`optax.contrib.sophia`': (OptaxContrib, 0.5, lambda h: h),
  'Levanter': (OptaxContrib, 0.5, lambda h: h),
  'Paper, Algorithm 3': (Paper, 0.3, lambda h: h),
  'PyTorch `SophiaG`': (PyTorch, 0.04, lambda g: SETTINGS['B'] * g**2),
  'Zeta `SophiaG`': (Zeta, 0.01, None),
  "Authors' JAX (older Levanter)": (
    AuthorsJax,
    0.7,
    lambda g: SETTINGS['B'] * g**2,
  ),
}


def test_every_row_has_a_test():
  assert list(calls()) == list(ROWS)


@pytest.mark.parametrize('name', ROWS)
def test_row(name):
  transcript, gamma, to_estimate = ROWS[name]
  rng = np.random.default_rng(0)
  theta = rng.normal(size=8)
  gradients = rng.normal(size=(STEPS, 8))
  curvature = rng.normal(size=(STEPS, 8)) + 0.5
  estimates = to_estimate and jnp.asarray(to_estimate(curvature), jnp.float32)

  def estimate(updates, state, params=None, *, step, **extra_args):
    del updates, params, extra_args
    return estimates[step], state

  names = {
    name: getattr(sophia_optax, name)
    for name in re.findall(r'\w+', calls()[name])
    if hasattr(sophia_optax, name)
  }
  tx = eval(  # The code on the page is tested.
    calls()[name],
    names
    | SETTINGS
    | {
      'gamma': gamma,
      'rho': gamma,
      'estimator': optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), estimate
      ),
    },
  )
  params = jnp.asarray(theta, jnp.float32)
  state, other = tx.init(params), transcript(gamma)
  update = jax.jit(lambda g, s, p, t: tx.update(g, s, p, step=t))
  for t in range(STEPS):
    g = jnp.asarray(gradients[t], jnp.float32)
    updates, state = update(g, state, params, t)
    params = optax.apply_updates(params, updates)
    theta = other.step(theta, gradients[t], curvature[t])
    np.testing.assert_allclose(params, theta, rtol=2e-5, atol=2e-6)
  # Some are clipped and some are not, so that the curvature has an effect.
  assert 0 < optax.tree.get(state, 'win_rate') < 1
