"""Checks for any estimator of the Hessian diagonal.

    problem = Problem(params, extra_args, curvature)
    check_estimator(my_estimator, problem)

Each check raises an AssertionError that begins with the kind of mistake.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Problem(NamedTuple):
  """Arguments for an estimator, and the curvature that it should find.

  Attributes:
    params: A small number of parameters.
    extra_args: Extra arguments of update.
    curvature: The expected mean of the estimate, a tree like params.
    grads: The gradient, for estimators that use it.
    random: Whether estimates differ between draws.
  """

  params: Any
  extra_args: dict[str, Any]
  curvature: Any
  grads: Any = None
  random: bool = True


def check_estimator(make_estimator: Callable[[Any], Any], problem: Problem):
  """Checks an estimator on a problem. It is made from a PRNG key."""
  check_draws(make_estimator, problem)
  check_cadence(make_estimator, problem)


def _flat(tree):
  return jax.flatten_util.ravel_pytree(tree)[0]


def estimates_in_a_row(make_estimator, problem, key, number):
  """Returns estimates of successive refreshes, with the last state."""
  estimator = optax.with_extra_args_support(make_estimator(key))

  def refresh(state, _):
    estimate, new_state = estimator.update(
      problem.grads, state, problem.params, **problem.extra_args
    )
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(new_state) == types(state), 'The state changes its type.'
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(estimate) == shapes(problem.params), (
      'Not like the parameters.'
    )
    for leaf in jax.tree.leaves(estimate):
      assert jnp.finfo(leaf.dtype).bits >= 32, f'Narrow: {leaf.dtype}.'
    return new_state, _flat(estimate)

  state = estimator.init(problem.params)
  return jax.lax.scan(refresh, state, length=number)[1]


def check_draws(make_estimator, problem, number=1024):
  """Checks that draws are random and repeatable, and that their mean is right.

  If a problem has few, equally likely outcomes, or averages of such outcomes,
  the mean of the outcomes is exact. Otherwise it is the mean over the draws, to
  within five standard errors.
  """
  draw = jax.jit(
    lambda: estimates_in_a_row(
      make_estimator, problem, jax.random.PRNGKey(7), number
    )
  )
  estimates = np.array(draw(), np.float64)
  np.testing.assert_array_equal(estimates, draw(), 'Does not repeat.')
  if problem.random:
    assert (estimates[1:7] != estimates[0]).any(), (
      'Constant: seven refreshes gave the same estimate.'
    )
  outcomes = np.unique(estimates.round(4), axis=0)
  mean, tolerance = outcomes.mean(axis=0), 2e-4
  if len(outcomes) > 32:
    mean = estimates.mean(axis=0)
    tolerance = 5 * estimates.std(axis=0) / number**0.5
  wrong = np.abs(mean - _flat(problem.curvature)) > tolerance
  assert not wrong.any(), (
    f'Biased: the mean of {len(outcomes)} outcomes is {mean}, the curvature'
    f' {_flat(problem.curvature)}.'
  )


def check_replicas(
  make_estimator: Callable[[Any], Any],
  problem: Problem,
  extra_args_of: Callable[[jax.Array], dict[str, Any]],
  number: int = 512,
):
  """Checks that under `jax.shard_map` the estimate is the mean over replicas.

  Args:
    make_estimator: Makes an estimator that averages over the axis 'data'.
    problem: The problem of all replicas together.
    extra_args_of: Extra arguments of a replica, given its weight, shape ().
      The mean weight is 1, and so the mean of the curvatures is that of the
      problem if each is proportional to the weight.
    number: Number of estimates to average.
  """
  devices = jax.device_count()
  mesh = jax.make_mesh(
    (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  weights = jnp.linspace(0.5, 1.5, devices)
  weights /= weights.mean()  # It is 0.5 on one device.

  def estimates(weight):
    local = problem._replace(extra_args=extra_args_of(weight[0]))
    key = jax.random.PRNGKey(0)
    return estimates_in_a_row(make_estimator, local, key, number)

  mapped = jax.shard_map(
    estimates,
    mesh=mesh,
    in_specs=jax.sharding.PartitionSpec('data'),
    out_specs=jax.sharding.PartitionSpec(),
  )
  values = np.array(jax.jit(mapped)(weights), np.float64)
  mean, exact = values.mean(axis=0), _flat(problem.curvature)
  tolerance = 5 * values.std(axis=0) / number**0.5 + 1e-5 * np.abs(exact)
  assert np.all(np.abs(mean - exact) <= tolerance), (
    f'Replicas: the mean is {mean}, the curvature {exact}.'
  )


def check_cadence(make_estimator, problem, intervals=(1, 2, 10)):
  """Checks that the estimator runs only on steps 0, k, 2k, ..."""
  import sophia_optax  # Only this check needs it.

  ran = []
  inner = optax.with_extra_args_support(make_estimator(jax.random.PRNGKey(1)))

  def update(updates, state, params=None, **extra_args):
    jax.debug.callback(lambda: ran.append(None))
    return inner.update(updates, state, params, **extra_args)

  estimator = optax.GradientTransformationExtraArgs(inner.init, update)
  grads = problem.grads
  if grads is None:
    grads = jax.tree.map(jnp.ones_like, problem.params)

  def optimizer(k):
    return sophia_optax.scale_by_sophia(
      hessian_diagonal_fn=estimator, update_interval=k
    )

  @jax.jit
  def step(state, k):  # One program for all k.
    return optimizer(k).update(
      grads, state, problem.params, **problem.extra_args
    )[1]

  for k in intervals:
    state, steps = optimizer(k).init(problem.params), range(2 * k + 2)
    seen, due = [], [t for t in steps if t % k == 0]
    for t in steps:
      before = len(ran)
      state = step(state, k)
      jax.effects_barrier()
      seen += [t] * (len(ran) - before)
    assert seen == due, (
      f'Cadence: for k = {k} the estimator ran on steps {seen}, not on {due}.'
    )
