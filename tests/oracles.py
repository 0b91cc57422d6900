"""Exact curvature from dense matrices, and an estimate to compare with it."""

import functools
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

# Fisher information of one prediction: (B, C) outputs -> (B, C, C).
FISHER = {
  'categorical': lambda z: _fisher_of_classes(np.exp(z)),
  'bernoulli': lambda z: (1 / (2 + np.exp(z) + np.exp(-z)))[..., None],
  'gaussian': lambda z: np.ones((*z.shape, 1)),
}


def _fisher_of_classes(p):
  p = p / p.sum(axis=-1, keepdims=True)
  return p[:, :, None] * np.eye(p.shape[-1]) - p[:, :, None] * p[:, None, :]


def flat(tree):
  return jax.flatten_util.ravel_pytree(tree)[0]


def first(estimator, params, **extra_args):
  """Returns the estimate of the first update."""
  state = estimator.init(params)
  return estimator.update(None, state, params, **extra_args)[0]


def estimate(estimator, params, **extra_args):
  """Returns the estimate of the first update, compiled as one program."""
  return jax.jit(lambda params: first(estimator, params, **extra_args))(params)


def temporary_bytes(fn, *args):
  """Returns the memory that the compiled function needs beside its results."""
  compiled = jax.jit(fn).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def hessian(loss, params):
  """Returns the Hessian with respect to the parameters in one vector."""
  vector, unravel = jax.flatten_util.ravel_pytree(params)
  return np.array(jax.jit(jax.hessian(lambda x: loss(unravel(x))))(vector))


def outputs_and_jacobian(predict, params, classes=1):
  """Returns outputs, (B, C), and their Jacobian, (B, C, P)."""
  vector, unravel = jax.flatten_util.ravel_pytree(params)

  def twice(x):
    outputs = predict(unravel(x)).reshape(-1, classes)
    return outputs, outputs

  jacobian, outputs = jax.jit(jax.jacobian(twice, has_aux=True))(vector)
  return np.array(outputs), np.array(jacobian)


def gauss_newton(jacobian, fisher, mask=True):
  """Returns diag(Σ Jᵀ F J) / B, over the B predictions in the mask."""
  mask = np.broadcast_to(mask, jacobian.shape[:1])
  each = np.einsum('bcp,bcd,bdp->bp', jacobian, fisher, jacobian)
  return mask @ each / max(mask.sum(), 1)


# A network with few enough parameters for all sign vectors.

INPUTS = np.array(jax.random.normal(jax.random.PRNGKey(4), (64, 2)))
LABELS = np.sum(INPUTS, axis=1) + INPUTS[:, 0] * INPUTS[:, 1] > 0
NETWORK = {
  'a': jnp.array([[0.9, -0.3], [0.4, 0.7]]),
  'c': jnp.array([[-0.6, 0.5], [0.8, 1.1]]),
}


def network_loss(params, dtype):
  """Two layers with activations and cast weights of this dtype."""
  a, c = params['a'].astype(dtype), params['c'].astype(dtype)
  logits = jnp.tanh(INPUTS.astype(dtype) @ a) @ c
  logits = logits.astype(params['a'].dtype)
  picked = jnp.where(LABELS, logits[:, 1], logits[:, 0])
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@functools.cache
def all_signs():
  """Returns a key for each of the 256 probes of the network."""
  keys = jax.random.split(jax.random.PRNGKey(5), 4000)

  @jax.jit
  @jax.vmap
  def signs(key):
    return flat(
      optax.tree.random_like(
        jax.random.split(key)[1], NETWORK, jax.random.rademacher
      )
    )

  drawn = np.array(signs(keys))
  key_of = {tuple(v): k for v, k in zip(drawn, np.array(keys), strict=True)}
  assert set(key_of) == set(itertools.product([-1.0, 1.0], repeat=8))
  return np.array(list(key_of.values()))
