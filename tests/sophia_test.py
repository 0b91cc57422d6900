"""Sophia: formula, cadence, dtypes, bad values, win rate, printing."""

import functools

import chex
import equinox
from equinox import internal as equinox_internal
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')


def scripted(estimates):
  """An estimator that returns these in turn. Its state counts the calls."""
  return optax.GradientTransformation(
    lambda params: jnp.zeros([], jnp.int32),
    lambda g, n, params=None: (jax.tree.map(lambda e: e[n], estimates), n + 1),
  )


def run(tx, grads, params):
  """Returns parameters, updates and states after each step, stacked."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, updates, state)

  carry = params, tx.init(params)
  return jax.jit(lambda *args: jax.lax.scan(step, *args)[1])(carry, grads)


def steered(factor, target, counted, affected, won):
  """Returns the next factor of γ, from conditions of each coordinate."""
  number = affected.sum()
  if number == 0:
    return factor
  others = (won & counted & ~affected).sum()
  goal = np.clip((target * counted.sum() - others) / number, 0.1, 0.9)
  with np.errstate(divide='ignore'):
    logit = lambda p: np.log(p) - np.log(1 - p)
    step = 0.5 * (logit(goal) - logit((won & affected).sum() / number))
  return np.clip(
    factor * np.exp(np.clip(step, *np.log([0.25, 4]))), 1e-10, 1e10
  )


def transcript(
  grads,
  estimates,
  *,
  learning_rate,
  b1,
  b2,
  eps,
  weight_decay,
  gamma,
  clip_threshold,
  update_interval,
  bias_correction=True,
  nu_bias_correction=False,
  nesterov=False,
  adam_b2=None,
  refresh_before_update=False,
  target_win_rate=None,
):
  """Algorithm 3 of the paper and its extensions, in float64.

  Yields θ, h, v, the win rate and the factor of γ after each step.
  """
  scheduled = lambda x, t: x(t - 1) if callable(x) else x
  correct = lambda x, t: x / (1 - b1**t) if bias_correction else x
  clip = np.inf if clip_threshold is None else clip_threshold
  theta = m = h = v = np.zeros(grads.shape[1:])
  n, factor, win_rate = 0, 1.0, 0.0
  for t, g in enumerate(grads, start=1):
    m = b1 * m + (1 - b1) * g
    m_hat = correct(m, t)
    if nesterov:
      m_hat = b1 * correct(m, t + 1) + (1 - b1) * correct(g, t)

    def scaled(h, n, factor, t=t):
      h_hat = h / (1 - b2**n) if nu_bias_correction and n else h
      return scheduled(gamma, t) * factor * h_hat

    old = h, n, factor
    if due := (t - 1) % update_interval == 0:
      h, n = b2 * h + (1 - b2) * estimates[n], n + 1
      if target_win_rate is not None:
        bound = clip * np.maximum(scaled(h, n, factor), eps)
        affected = (g != 0) & (h > 0) & (np.abs(m) >= clip * eps)
        won = np.abs(m_hat) < bound
        factor = steered(factor, target_win_rate, g != 0, affected, won)
    used = scaled(*((h, n, factor) if refresh_before_update else old))
    if due:
      win_rate = np.mean(np.abs(m_hat) < clip * np.maximum(used, eps))
    limit = 0.0 * g
    if adam_b2 is not None:
      v = adam_b2 * v + (1 - adam_b2) * g**2
      limit = np.sqrt(v / (1 - adam_b2**t))
    bounds = np.stack([used, limit, np.full_like(g, eps)])
    u = np.clip(m_hat / bounds.max(axis=0), -clip, clip)
    rate, decay = scheduled(learning_rate, t), scheduled(weight_decay, t)
    theta = theta - rate * (u + decay * theta)
    yield theta, h, v, win_rate, factor


DEFAULTS = {
  'learning_rate': 0.01,
  'b1': 0.9,
  'b2': 0.8,
  'eps': 1e-2,
  'weight_decay': 0.1,
  'gamma': 0.5,
  'clip_threshold': 0.7,
  'update_interval': 3,
}
FIRST = {'refresh_before_update': True}
SCHEDULE = jnp.linspace(0.5, 3.5, 30).__getitem__
CASES = {
  'defaults': {},
  'every_step': {'update_interval': 1, 'nu_bias_correction': True, **FIRST},
  'stale_h_corrected': {'bias_correction': False, 'nu_bias_correction': True},
  'nesterov': {'bias_correction': False, 'nesterov': True, **FIRST},
  'nesterov_adam': {'nesterov': True, 'adam_b2': 0.8, 'clip_threshold': 0.4},
  'adam': {'adam_b2': 0.6, 'bias_correction': False, **FIRST},
  'steered': {
    'target_win_rate': 0.4,
    'nesterov': True,
    'nu_bias_correction': True,
  },
  'steered_adam': {
    'target_win_rate': 0.6,
    'adam_b2': 0.8,
    'nesterov': True,
    **FIRST,
  },
  'steered_schedule': {'target_win_rate': 0.3, 'gamma': SCHEDULE, **FIRST},
  'no_clipping': {'clip_threshold': None},
  'sign_momentum': {'gamma': 0.0, 'eps': 1e-7},
  'schedules': {
    'gamma': SCHEDULE,
    'learning_rate': SCHEDULE,
    'weight_decay': SCHEDULE,
  },
}


def coordinates(tree):
  """Returns real and imaginary parts of each step: (steps, 48)."""
  real, z = tree
  return np.concatenate([real, z.real, z.imag], axis=-1)


def leaves(x):
  """Returns 24 real and 12 complex parameters with these coordinates."""
  x = jnp.asarray(x)
  return x[..., :24], jax.lax.complex(x[..., 24:36], x[..., 36:])


@pytest.mark.parametrize('name', CASES)
def test_algorithm_3_in_numpy(name):
  settings = DEFAULTS | CASES[name]
  rng = np.random.default_rng(0)
  scale = np.tile([1.0, 0.01, 1e-4], 16)  # The smallest are below c ε.
  grads = np.float32(scale * rng.normal(size=(30, 48)))
  grads[:, ::5] *= rng.integers(0, 2, size=(30, 10))
  estimates = np.float32(scale * (5 * rng.normal(size=(30, 48)) + 4))
  expected = list(transcript(grads, estimates, **settings))

  tx = sophia_optax.sophia(
    **settings, hessian_diagonal_fn=scripted(leaves(estimates))
  )
  # optax's decay with a schedule promotes complex parameters.
  promotion = 'standard' if name == 'schedules' else 'strict'
  with jax.numpy_dtype_promotion(promotion):
    params, _, (state, *_) = run(tx, leaves(grads), leaves(np.zeros(48)))
  theta, h, v, win_rate, factor = map(np.stack, zip(*expected, strict=True))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
  close(coordinates(params), theta)
  close(coordinates(state.nu), h)
  close(state.win_rate, win_rate)
  if 'target_win_rate' in settings:
    close(state.gamma_factor, factor)
    assert len(np.unique(factor)) > 5
  if 'adam_b2' in settings:
    close(coordinates(state.second_moment), v)
  k = settings['update_interval']
  np.testing.assert_array_equal(state.count, np.arange(30) + 1)
  np.testing.assert_array_equal(state.refresh_count, np.arange(30) // k + 1)
  assert state.hessian_fn_state[-1] == state.refresh_count[-1]
  if name not in ('no_clipping', 'sign_momentum'):
    assert 0 < win_rate.mean() < 1


def test_every_keyword_of_sophia_g_reaches_sophia():
  grads, estimates = jnp.float32(
    np.random.default_rng(0).normal(size=(2, 4, 9))
  )
  shared = {
    'learning_rate': 0.3,
    'b1': 0.8,
    'b2': 0.7,
    'weight_decay': 0.2,
    'weight_decay_mask': lambda params: False,
    'update_interval': 2,
    'hessian_diagonal_fn': scripted(estimates),
    'mu_dtype': jnp.float16,
    'nu_dtype': jnp.bfloat16,
    'bias_correction': True,
    'nu_bias_correction': True,
    'nesterov': True,
    'adam_b2': 0.9,
    'target_win_rate': 0.4,
  }
  chex.assert_trees_all_equal(
    run(sophia_optax.sophia_g(rho=2.0, **shared), grads, grads[0]),
    run(sophia_optax.sophia(gamma=2.0, eps=1e-15, **shared), grads, grads[0]),
  )


# Kinds and dtypes of leaves.

LEAVES = {
  'f32': jnp.ones(2),
  'bf16': jnp.ones(2, jnp.bfloat16),
  'f16': jnp.ones([], jnp.float16),
  'int': jnp.array([3, -4]),
  'bool': jnp.array(True),
  'complex': jnp.array([1.0 + 2.0j]),
  'none': None,
  'empty': jnp.zeros((0, 3)),
}


@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
def test_dtypes_of_state_and_update(dtype):
  tx = sophia_optax.sophia(
    0.1, mu_dtype=dtype, nu_dtype=dtype, hessian_diagonal_fn=optax.identity()
  )
  state = tx.init(LEAVES)
  updates, new_state = jax.jit(tx.update)(LEAVES, state, LEAVES)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, LEAVES)
  np.testing.assert_array_equal(updates['int'], 0)
  real = {'f32', 'bf16', 'f16', 'empty'}
  for name in LEAVES.keys() - {'none'}:
    own = LEAVES[name].dtype
    widened = jnp.float32 if name in real else own
    assert state[0].mu[name].dtype == (dtype if dtype and name in real else own)
    assert state[0].nu[name].dtype == (
      dtype if dtype and name in real else widened
    )


def test_gradients_wider_than_the_parameters():
  params = jnp.ones(2, jnp.bfloat16)
  tx = sophia_optax.scale_by_sophia(hessian_diagonal_fn=optax.identity())
  updates, state = jax.eval_shape(
    tx.update, jnp.ones(2), tx.init(params), params
  )
  assert updates.dtype == jnp.float32
  assert state.mu.dtype == jnp.bfloat16


def test_x64():
  with jax.enable_x64(True):
    params = {'f64': jnp.ones(2), 'f32': jnp.ones(2, jnp.float32)}
    numbers = {'b1': 0.9, 'b2': 0.99, 'gamma': 0.01, 'clip_threshold': 10.0}
    tx = sophia_optax.scale_by_sophia(
      eps=1.0,
      adam_b2=0.5,
      diagnostics=True,
      hessian_diagonal_fn=optax.identity(),
      **{name: jnp.array(value) for name, value in numbers.items()},
    )
    grads = jax.tree.map(lambda x: -3 * x, params)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state.nu, params)
  np.testing.assert_allclose(new_state.nu['f64'], -0.03, rtol=1e-14)
  # After one gradient, m̂ equals it up to round-off.
  np.testing.assert_allclose(updates['f64'], -1.0, rtol=1e-14)


def test_squares_are_in_float32():
  # The squares of 300 and of 1e-4 are not numbers in float16.
  params = jnp.array([300.0, 1e-4], jnp.float16)
  tx = sophia_optax.scale_by_sophia(
    0.9,
    adam_b2=0.8,
    hessian_diagonal_fn=optax.stateless(lambda g, _: jnp.zeros_like(g)),
    eps=1e-20,
  )
  _, updates, state = run(tx, jnp.stack([params, -params]), params)
  square = np.square(np.float32(params))
  np.testing.assert_allclose(
    state.second_moment[1], (1 - 0.8**2) * square, rtol=1e-5
  )
  # m̂ = -0.01 g / 0.19, and v̂ is g².
  np.testing.assert_allclose(np.float32(updates[1]), -0.01 / 0.19, rtol=2e-2)
  assert updates.dtype == jnp.float16


# Weight decay.


@pytest.mark.parametrize(
  'mask',
  [
    None,
    {'w': True, 'steps': True},
    lambda tree: jax.tree.map(lambda _: True, tree),
    # Regression: the function got a tree without the integers.
    lambda tree: {name: leaf.ndim < 3 for name, leaf in tree.items()},
  ],
)
def test_integer_parameters_do_not_decay(mask):
  # float32 can't represent this integer.
  params = {'w': jnp.ones(2), 'steps': jnp.array(2**24 + 1)}
  tx = sophia_optax.sophia(
    0.1,
    weight_decay=0.5,
    weight_decay_mask=mask,
    hessian_diagonal_fn=optax.identity(),
  )
  grads = optax.tree.zeros_like(params)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], -0.05)
  chex.assert_trees_all_equal(updates['steps'], jnp.array(0))


class CallableMask(equinox.Module):
  """A tree of booleans that is callable, as Equinox's models are."""

  w: bool
  b: bool

  def __call__(self):
    raise AssertionError('This tree is the mask.')


@pytest.mark.parametrize(
  'mask', [lambda params: CallableMask(True, False), CallableMask(True, False)]
)
def test_masks_in_equinox(mask):
  params = CallableMask(jnp.ones(2), jnp.ones(3))
  tx = sophia_optax.sophia(
    0.1,
    weight_decay=0.5,
    weight_decay_mask=mask,
    hessian_diagonal_fn=optax.identity(),
  )
  # As Optimistix does it, so that hyperparameters can be arrays.
  tx = equinox_internal.closure_to_pytree(tx)
  tx = equinox.combine(*equinox.partition(tx, equinox.is_array))
  updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
  np.testing.assert_allclose(updates.w, -0.05)
  np.testing.assert_array_equal(updates.b, 0.0)


# Estimates that do not fit.


def test_the_average_and_not_the_estimate_must_fit_nu_dtype():
  # Regression: the estimate was cast to nu_dtype before it was averaged.
  tx = sophia_optax.scale_by_sophia(
    b2=0.75,
    nu_dtype=jnp.float16,
    update_interval=1,
    hessian_diagonal_fn=scripted(jnp.array([[1e5, 1.0], [1e6, 1.0]])),
  )
  _, _, state = run(tx, jnp.ones((2, 2)), jnp.ones(2))
  assert state.nu.dtype == jnp.float16
  np.testing.assert_allclose(
    np.float32(state.nu), [[25_000, 0.25], [25_000, 0.4375]], rtol=1e-3
  )
  np.testing.assert_array_equal(state.nonfinite_count, [0, 1])


# Numbers.


def test_update_interval_in_float32_with_parameters_in_bfloat16():
  # Regression: the count was cast to the dtype of the parameters. In bfloat16
  # there were 582 refreshes in 3,000 steps in place of 300. And a schedule
  # computes 9.999999 where it means 10.
  x = jnp.ones(2, jnp.bfloat16)

  @jax.jit
  def num_refreshes(update_interval):
    tx = sophia_optax.scale_by_sophia(
      update_interval=update_interval, hessian_diagonal_fn=optax.identity()
    )
    return run(tx, jnp.ones((3000, 2), x.dtype), x)[-1].refresh_count[-1]

  assert num_refreshes(jnp.nextafter(jnp.float32(10), 0.0)) == 300


# Win rate.


def test_coordinate_at_the_threshold_does_not_win():
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=1.0,
    refresh_before_update=True,
    hessian_diagonal_fn=optax.stateless(lambda g, _: jnp.ones_like(g)),
  )
  _, _, state = run(tx, jnp.array([[1.0, 0.5]]), jnp.ones(2))
  assert state.win_rate == 0.5


@pytest.mark.parametrize(
  ('injected', 'n', 'rates'),
  [(False, 1, [0.0, 1.0, 1.0]), (True, 2, [1.0]), (True, 0, [])],
)
def test_printed_win_rate(capsys, injected, n, rates):
  factory = sophia_optax.scale_by_sophia
  if injected:
    factory = optax.inject_hyperparams(factory)
  # The first update is clipped everywhere. The curvature after it is large.
  tx = factory(
    gamma=1000.0,
    hessian_diagonal_fn=optax.identity(),
    verbose=True,
    print_win_rate_every_n_steps=n,
  )
  jax.block_until_ready(run(tx, jnp.ones((3, 2)), jnp.ones(2)))
  jax.effects_barrier()
  lines = [f'Sophia optimizer win rate: {rate}' for rate in rates]
  assert capsys.readouterr().out.splitlines() == lines


def test_no_print_costs_nothing():
  x = jnp.ones(2)

  def program(**kwargs):
    tx = sophia_optax.sophia(
      0.1, hessian_diagonal_fn=optax.identity(), **kwargs
    )
    return jax.jit(tx.update).lower(x, tx.init(x), x).as_text()

  silent = program()
  assert program(verbose=True) == silent
  assert program(print_win_rate_every_n_steps=2) == silent
  assert program(verbose=True, print_win_rate_every_n_steps=2) != silent
