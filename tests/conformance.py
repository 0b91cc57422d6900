"""Checks for any estimator and any implementation of `scale_by_sophia`.

    problem = Problem(params, extra_args, curvature)
    check_estimator(my_estimator, problem)
    check_scaling(my_scale_by_sophia)

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
  check_unbiased(make_estimator, problem)
  check_draws(make_estimator, problem)
  check_tree(make_estimator, problem)
  check_cadence(make_estimator, problem)


def _flat(tree):
  return jax.flatten_util.ravel_pytree(tree)[0]


def estimate_once(make_estimator, problem, key):
  """Returns the estimate of one refresh."""
  estimator = optax.with_extra_args_support(make_estimator(key))
  state = estimator.init(problem.params)
  return estimator.update(
    problem.grads, state, problem.params, **problem.extra_args
  )[0]


def check_unbiased(make_estimator, problem, num_keys=1024):
  """Checks that the mean of the estimate is the curvature.

  If a problem has few, equally likely outcomes, or averages of such outcomes,
  the mean of the outcomes is exact. Otherwise it is the mean over the keys, to
  within five standard errors.
  """
  keys = jax.random.split(jax.random.PRNGKey(0), num_keys)
  estimate = lambda key: _flat(estimate_once(make_estimator, problem, key))
  estimates = np.array(jax.jit(jax.vmap(estimate))(keys), np.float64)
  outcomes = np.unique(estimates.round(4), axis=0)
  mean, tolerance = outcomes.mean(axis=0), 2e-4
  if len(outcomes) > 32:
    mean = estimates.mean(axis=0)
    tolerance = 5 * estimates.std(axis=0) / num_keys**0.5
  wrong = np.abs(mean - _flat(problem.curvature)) > tolerance
  assert not wrong.any(), (
    f'Biased: the mean of {len(outcomes)} outcomes is {mean}, the curvature'
    f' {_flat(problem.curvature)}.'
  )


def check_replicas(
  make_estimator: Callable[[Any], Any],
  problem: Problem,
  extra_args_of: Callable[[jax.Array], dict[str, Any]],
  num_keys: int = 512,
):
  """Checks that under `jax.shard_map` the estimate is the mean over replicas.

  Args:
    make_estimator: Makes an estimator that averages over the axis 'data'.
    problem: The problem of all replicas together.
    extra_args_of: Extra arguments of a replica, given its weight, shape ().
      The mean weight is 1, and so the mean of the curvatures is that of the
      problem if each is proportional to the weight.
    num_keys: Number of estimates to average.
  """
  devices = jax.device_count()
  mesh = jax.make_mesh(
    (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  weights = jnp.linspace(0.5, 1.5, devices)
  weights /= weights.mean()  # It is 0.5 on one device.

  def estimates(weight, keys):
    local = problem._replace(extra_args=extra_args_of(weight[0]))
    return jax.lax.map(
      lambda key: _flat(estimate_once(make_estimator, local, key)), keys
    )

  data = jax.sharding.PartitionSpec('data')
  everywhere = jax.sharding.PartitionSpec()
  mapped = jax.shard_map(
    estimates, mesh=mesh, in_specs=(data, everywhere), out_specs=everywhere
  )
  keys = jax.random.split(jax.random.PRNGKey(0), num_keys)
  values = np.array(jax.jit(mapped)(weights, keys), np.float64)
  mean, exact = values.mean(axis=0), _flat(problem.curvature)
  tolerance = 5 * values.std(axis=0) / num_keys**0.5 + 1e-5 * np.abs(exact)
  assert np.all(np.abs(mean - exact) <= tolerance), (
    f'Replicas: the mean is {mean}, the curvature {exact}.'
  )


def check_draws(make_estimator, problem):
  """Checks that draws differ between refreshes and repeat from the same key."""
  estimator = optax.with_extra_args_support(
    make_estimator(jax.random.PRNGKey(7))
  )
  update = jax.jit(
    lambda state: estimator.update(
      problem.grads, state, problem.params, **problem.extra_args
    )
  )

  def draw(num_refreshes):
    state, estimates = estimator.init(problem.params), []
    for _ in range(num_refreshes):
      estimate, state = update(state)
      estimates.append(np.array(_flat(estimate)))
    return estimates

  first, *others = draw(7)
  np.testing.assert_array_equal(first, *draw(1), 'Does not repeat.')
  if problem.random:
    assert any((first != other).any() for other in others), (
      'Constant: seven refreshes gave the same estimate.'
    )


def check_tree(make_estimator, problem):
  """Checks the tree of the estimate and the type of the state."""
  estimator = optax.with_extra_args_support(
    make_estimator(jax.random.PRNGKey(0))
  )
  state = estimator.init(problem.params)
  estimate, new_state = jax.eval_shape(
    lambda s: estimator.update(
      problem.grads, s, problem.params, **problem.extra_args
    ),
    state,
  )
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(estimate) == shapes(problem.params), 'Not like the parameters.'
  for leaf in jax.tree.leaves(estimate):
    assert jnp.finfo(leaf.dtype).bits >= 32, f'Narrow: {leaf.dtype}.'
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(new_state) == types(state), 'The state changes its type.'


def check_cadence(make_estimator, problem, scaling=None, intervals=(1, 2, 10)):
  """Checks that h changes and the estimator runs only on steps 0, k, 2k, ..."""
  ran = []
  inner = optax.with_extra_args_support(make_estimator(jax.random.PRNGKey(1)))

  def update(updates, state, params=None, **extra_args):
    jax.debug.callback(lambda: ran.append(None))
    return inner.update(updates, state, params, **extra_args)

  counted = optax.GradientTransformationExtraArgs(inner.init, update)
  scaling = scaling or default_scaling
  grads = problem.grads
  if grads is None:
    grads = jax.tree.map(jnp.ones_like, problem.params)

  @jax.jit
  def step(state, k):  # One program for all k.
    tx = scaling(hessian_diagonal_fn=counted, update_interval=k)
    return tx.update(grads, state, problem.params, **problem.extra_args)[1]

  for k in intervals:
    tx = scaling(hessian_diagonal_fn=counted, update_interval=k)
    state, steps = tx.init(problem.params), range(2 * k + 2)
    seen, due = [], [t for t in steps if t % k == 0]
    for t in steps:
      before = len(ran)
      state = step(state, k)
      jax.effects_barrier()
      seen += [t] * (len(ran) - before)
    assert seen == due, (
      f'Cadence: for k = {k} the estimator ran on steps {seen}, not on {due}.'
    )


def default_scaling(**kwargs):
  import sophia_optax  # The suite itself does not need it.

  return sophia_optax.scale_by_sophia(**kwargs)


def check_scaling(scaling: Callable[..., Any]):
  """Checks updates and cadence of a transformation like `scale_by_sophia`.

  Args:
    scaling: Takes b1, b2, eps, gamma, clip_threshold, update_interval and
      hessian_diagonal_fn, steps before it refreshes, and corrects m's bias.
      update_interval is an int or an array.
  """
  for k in (1, 2, 10):
    check_formula(scaling, k)
  problem = Problem(jnp.ones(2), {}, jnp.ones(2), jnp.ones(2))
  check_cadence(lambda key: optax.identity(), problem, scaling)


def check_formula(scaling, k):
  """Compares updates with a NumPy transcript, also for negative curvature."""
  b1, b2, eps, gamma, clip = 0.9, 0.7, 1e-3, 0.5, 1.0
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(25, 6)).astype(np.float32)
  script = jnp.asarray(rng.normal(size=(25, 6)) + 0.3, jnp.float32)
  scripted = optax.GradientTransformation(
    lambda params: jnp.zeros([], jnp.int32),
    lambda g, count, params=None: (script[count], count + 1),
  )
  tx = scaling(
    b1=b1,
    b2=b2,
    eps=eps,
    gamma=gamma,
    clip_threshold=clip,
    update_interval=k,
    hessian_diagonal_fn=scripted,
  )
  params = jnp.zeros(6)
  state, m, h, refreshes = tx.init(params), 0.0, 0.0, 0
  update = jax.jit(tx.update)
  for t, g in enumerate(grads):
    updates, state = update(jnp.asarray(g), state, params)
    m = b1 * m + (1 - b1) * g
    m_hat = m / (1 - b1 ** (t + 1))
    expected = np.clip(m_hat / np.maximum(gamma * h, eps), -clip, clip)
    np.testing.assert_allclose(
      updates, expected, rtol=1e-4, atol=1e-5, err_msg=f'Formula, step {t}.'
    )
    if t % k == 0:
      h = b2 * h + (1 - b2) * np.array(script[refreshes])
      refreshes += 1
