"""Exact curvature from dense matrices, and an estimate to compare with it."""

import jax
import jax.flatten_util
import numpy as np

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
