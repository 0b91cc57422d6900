"""Sophia: formula, cadence, dtypes, bad values, win rate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax


def loss_fn(params):
  return jnp.sum(params['w'] ** 2) + jnp.sum(params['b'] ** 4)


@pytest.fixture(name='params')
def _params():
  return {'w': jnp.linspace(-2.0, 2.5, 6).reshape(2, 3), 'b': jnp.ones(2)}


def scripted(estimates):
  """An estimator that returns these in turn. Its state counts the calls."""
  estimates = jax.tree.map(lambda *x: jnp.stack(x), *estimates)

  def update(grads, count, params=None, **extra_args):
    del grads, params, extra_args
    return jax.tree.map(lambda e: e[count], estimates), count + 1

  return optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros([], jnp.int32), update
  )


def run(tx, grads, params):
  """Returns updates and states of one step for each gradient."""
  update, state, seen = jax.jit(tx.update), tx.init(params), []
  for g in grads:
    updates, state = update(g, state, params)
    seen.append((updates, state))
  return seen


@pytest.mark.parametrize('refresh_first', [False, True])
@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize('k', [1, 3])
def test_algorithm_3_in_numpy(k, bias_correction, refresh_first):
  b1, b2, gamma, eps, clip, lr, decay = 0.9, 0.8, 0.5, 1e-3, 0.7, 0.01, 0.1
  rng = np.random.default_rng(0)
  steps, shape = 50, (3, 4)
  grads = rng.normal(size=(steps, *shape)).astype(np.float32)
  estimates = rng.normal(size=(steps, *shape)).astype(np.float32) + 0.5

  tx = sophia_optax.sophia(
    lr,
    b1,
    b2,
    eps,
    decay,
    gamma=gamma,
    clip_threshold=clip,
    update_interval=k,
    hessian_diagonal_fn=scripted(list(jnp.asarray(estimates))),
    bias_correction=bias_correction,
    refresh_before_update=refresh_first,
  )
  theta = rng.normal(size=shape)
  params = jnp.asarray(theta, jnp.float32)
  state = tx.init(params)
  update = jax.jit(tx.update)
  m, h, refreshes = np.zeros(shape), np.zeros(shape), 0
  for t in range(1, steps + 1):
    updates, state = update(jnp.asarray(grads[t - 1]), state, params)
    params = optax.apply_updates(params, updates)

    # Paper, Algorithm 3, in float64.
    m = b1 * m + (1 - b1) * grads[t - 1]
    m_hat = m / (1 - b1**t) if bias_correction else m
    refreshed = h
    if (t - 1) % k == 0:
      refreshed = b2 * h + (1 - b2) * estimates[refreshes]
      refreshes += 1
    used = refreshed if refresh_first else h
    ratio = m_hat / np.maximum(gamma * used, eps)
    theta = theta - lr * decay * theta - lr * np.clip(ratio, -clip, clip)
    h = refreshed

    np.testing.assert_allclose(params, theta, rtol=2e-5, atol=2e-6)
    sophia_state = state[0]
    np.testing.assert_allclose(sophia_state.nu, h, rtol=2e-5, atol=2e-6)
    if (t - 1) % k == 0:
      np.testing.assert_allclose(
        sophia_state.win_rate, np.mean(np.abs(ratio) < clip), atol=1e-6
      )
  assert sophia_state.hessian_fn_state == refreshes == -(-steps // k)


@pytest.mark.parametrize('refresh_first', [False, True])
@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize(
  ('nesterov', 'nu_bias_correction'),
  [(True, False), (False, True), (True, True)],
)
def test_nesterov_and_bias_correction_of_h_in_numpy(
  nesterov, nu_bias_correction, bias_correction, refresh_first
):
  b1, b2, gamma, eps, clip, k = 0.9, 0.8, 0.5, 1e-3, 0.7, 3
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(20, 6)).astype(np.float32)
  estimates = rng.normal(size=(20, 6)).astype(np.float32) + 0.5
  tx = sophia_optax.scale_by_sophia(
    b1,
    b2,
    eps,
    gamma,
    clip,
    k,
    scripted(list(jnp.asarray(estimates))),
    bias_correction=bias_correction,
    nu_bias_correction=nu_bias_correction,
    nesterov=nesterov,
    refresh_before_update=refresh_first,
  )
  correct = lambda x, b, t: x / (1 - b**t) if bias_correction else x
  m, h, n = 0.0, 0.0, 0
  seen = run(tx, list(jnp.asarray(grads)), jnp.zeros(6))
  for t, (updates, state) in enumerate(seen, start=1):
    g = grads[t - 1]
    m = b1 * m + (1 - b1) * g
    m_hat = correct(m, b1, t)
    if nesterov:
      m_hat = b1 * correct(m, b1, t + 1) + (1 - b1) * correct(g, b1, t)
    old_h, old_n = h, n
    if due := t % k == 1:
      h = b2 * h + (1 - b2) * estimates[n]
      n += 1
    used_h, used_n = (h, n) if refresh_first else (old_h, old_n)
    h_hat = (
      used_h / (1 - b2**used_n) if nu_bias_correction and used_n else used_h
    )
    ratio = m_hat / np.maximum(gamma * h_hat, eps)
    np.testing.assert_allclose(
      updates, np.clip(ratio, -clip, clip), rtol=1e-4, atol=1e-5
    )
    if due:
      win_rate = np.mean(np.abs(ratio) < clip)
      np.testing.assert_allclose(state.win_rate, win_rate, rtol=1e-6)


def test_nesterov_is_that_of_optax():
  # Both divide by 1: here h is 0 and ε is 1, and in NAdam b2 is 0 and |g| is 1.
  signs = jnp.array([1.0, -1.0, 1.0, 1.0, -1.0])
  ours = sophia_optax.scale_by_sophia(
    0.9,
    eps=1.0,
    clip_threshold=None,
    hessian_diagonal_fn=scripted([jnp.zeros(1)]),
    nesterov=True,
  )
  theirs = optax.scale_by_adam(0.9, 0.0, eps=0.0, nesterov=True)
  state = theirs.init(jnp.zeros(1))
  seen = run(ours, signs[:, None], jnp.zeros(1))
  with jax.numpy_dtype_promotion('standard'):  # optax's needs it.
    for g, (updates, _) in zip(signs, seen, strict=True):
      expected, state = theirs.update(g[None], state)
      np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'factory', [sophia_optax.sophia, sophia_optax.sophia_g]
)
def test_max_update_rms_in_numpy(factory):
  params = {
    'over': jnp.array([1.0, -2.0, 3.0]),
    'under': jnp.array([0.5]),
    'complex': jnp.array([1.0 + 1.0j]),
    'integer': jnp.array([3]),
    'empty': jnp.zeros(0),
  }
  # With c = 1 and no curvature: ±1, 1e-3 / 1e-2, ±1 ± i, nothing, nothing.
  grads = params | {'under': jnp.array([1e-3])}
  estimator = optax.stateless(
    lambda g, p: {
      name: jnp.full_like(x, 0.05 if name == 'under' else 0)
      for name, x in p.items()
    }
  )
  update = {}
  for limit in None, 0.3:
    tx = factory(
      2.0,
      b1=0.0,
      weight_decay=0.1,
      hessian_diagonal_fn=estimator,
      refresh_before_update=True,
      max_update_rms=limit,
      **(
        {'gamma': 20.0, 'b2': 0.0}
        if factory is sophia_optax.sophia
        else {'rho': 20.0, 'b2': 0.0}
      ),
    )
    with jax.numpy_dtype_promotion('standard'):  # For optax, complex / real.
      update[limit], state = tx.update(grads, tx.init(params), params)
    assert optax.tree.get(state, 'refresh_count') == 1
  for name in ('over', 'under', 'complex'):
    decay = -2.0 * 0.1 * np.asarray(params[name])
    u = (np.asarray(update[None][name]) - decay) / -2.0
    rms = np.sqrt(np.mean(np.abs(u) ** 2))
    assert (rms > 0.3) == (name != 'under')
    np.testing.assert_allclose(
      update[0.3][name], decay - 2.0 * u * min(1, 0.3 / rms), rtol=1e-5
    )
  np.testing.assert_array_equal(
    optax.apply_updates(params, update[0.3])['integer'], params['integer']
  )


def test_target_win_rate_is_that_of_the_update_with_nesterov_and_corrected_h():
  # All ratios of the update are between the target's quantiles, so the factor
  # settles where the reported win rate, which is that of the update, meets it.
  key = jax.random.PRNGKey(0)
  curvature = 10 ** jnp.linspace(-2, 2, 400)
  tx = sophia_optax.scale_by_sophia(
    b1=0.9,
    b2=0.99,
    gamma=1.0,
    update_interval=1,
    target_win_rate=0.3,
    nesterov=True,
    nu_bias_correction=True,
    refresh_before_update=True,
    hessian_diagonal_fn=optax.stateless(lambda g, _: curvature),
  )

  def step(state, key):
    grads = curvature * jax.random.normal(key, (400,))
    updates, state = tx.update(grads, state, grads)
    won = jnp.mean((jnp.abs(updates) < 1).astype(jnp.float32))
    return state, (won, state.win_rate)

  keys = jax.random.split(key, 60)
  _, (won, reported) = jax.lax.scan(step, tx.init(curvature), keys)
  np.testing.assert_allclose(won, reported, rtol=1e-5)
  np.testing.assert_allclose(won[20:], 0.3, atol=0.1)


def test_state_and_update_dtypes():
  params = {
    'f32': jnp.ones(2),
    'bf16': jnp.ones(2, jnp.bfloat16),
    'f16': jnp.ones([], jnp.float16),
    'int': jnp.array([3, -4]),
    'bool': jnp.array(True),
    'complex': jnp.array([1.0 + 2.0j]),
    'none': None,
    'empty': jnp.zeros((0, 3)),
  }

  def loss(p):
    real = [p['f32'], p['bf16'], p['f16'], p['complex'].real, p['complex'].imag]
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in real)

  grads = jax.grad(loss, allow_int=True)(params)
  for mu_dtype, nu_dtype in [(None, None), (jnp.bfloat16, jnp.bfloat16)]:
    tx = sophia_optax.sophia(0.1, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    state = tx.init(params)
    updates, new_state = jax.jit(
      lambda g, s, p, tx=tx: tx.update(g, s, p, obj_fn=loss)
    )(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal(updates['int'], jnp.array([0, 0]))
    chex.assert_trees_all_equal(
      optax.apply_updates(params, updates)['int'], params['int']
    )
    dtypes = lambda tree: {k: v.dtype for k, v in tree.items() if k != 'none'}
    real = {'f32', 'bf16', 'f16', 'empty'}
    for moment, dtype, default in [
      (state[0].mu, mu_dtype, params),
      (state[0].nu, nu_dtype, {k: jnp.float32(0) for k in real}),
    ]:
      for k, actual in dtypes(moment).items():
        expected = params[k].dtype
        if k in real:
          expected = dtype or default[k].dtype
        assert actual == expected, k


def test_x64():
  with jax.enable_x64(True):
    params = {'f64': jnp.ones(2), 'f32': jnp.ones(2, jnp.float32)}
    loss = lambda p: (
      jnp.sum(p['f64'] ** 3) + jnp.sum(p['f32'] ** 2).astype(jnp.float64)
    )
    numbers = {'b1': 0.9, 'b2': 0.99, 'gamma': 0.01, 'clip_threshold': 1.0}
    tx = sophia_optax.scale_by_sophia(
      **{name: jnp.array(value) for name, value in numbers.items()}
    )
    state = tx.init(params)
    step = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p), s, p, obj_fn=loss))
    updates, new_state = step(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    nu = optax.tree.get(new_state, 'nu')
    chex.assert_trees_all_equal_shapes_and_dtypes(nu, params)
    np.testing.assert_allclose(nu['f64'], 0.06, rtol=1e-12)

    # After one gradient, m̂ equals it up to round-off.
    tx = sophia_optax.scale_by_sophia(eps=1.0, clip_threshold=None)
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(updates['f64'], 3.0, rtol=1e-14)


@pytest.mark.parametrize('params', [{}, [], jnp.array(2.0), 2.0], ids=str)
def test_trees_of_every_size(params):
  loss = lambda p: sum((x**2 for x in jax.tree.leaves(p)), jnp.zeros([]))
  tx = sophia_optax.sophia(0.1, weight_decay=0.0)
  updates, state = tx.update(
    jax.grad(loss)(params), tx.init(params), params, obj_fn=loss
  )
  chex.assert_trees_all_close(
    updates, jax.tree.map(lambda _: jnp.float32(-0.1), params)
  )
  assert jnp.isfinite(optax.tree.get(state, 'win_rate'))


def test_gradients_wider_than_the_parameters():
  params = jnp.ones(2, jnp.bfloat16)
  tx = sophia_optax.scale_by_sophia(hessian_diagonal_fn=optax.identity())
  updates, state = tx.update(jnp.ones(2), tx.init(params), params)
  assert updates.dtype == jnp.float32
  assert state.mu.dtype == jnp.bfloat16


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nonfinite_entries_never_enter_nu(bad):
  first, second = jnp.array([1.0, 2.0]), jnp.array([3.0, bad])
  tx = sophia_optax.scale_by_sophia(
    b2=0.5,
    update_interval=1,
    hessian_diagonal_fn=scripted([first, second, first]),
  )
  states = [s for _, s in run(tx, [jnp.ones(2)] * 3, jnp.ones(2))]
  np.testing.assert_allclose(states[0].nu, [0.5, 1.0])
  np.testing.assert_allclose(states[1].nu, [1.75, 1.0])
  np.testing.assert_allclose(states[2].nu, [1.375, 1.5])
  assert [int(s.nonfinite_count) for s in states] == [0, 1, 1]
  assert [int(s.refresh_count) for s in states] == [1, 2, 3]


def test_average_that_overflows_nu_dtype_is_ignored():
  tx = sophia_optax.scale_by_sophia(
    b2=0.0,
    nu_dtype=jnp.float16,
    update_interval=1,
    hessian_diagonal_fn=scripted([jnp.array([1.0, 1e6])]),
  )
  ((_, state),) = run(tx, [jnp.ones(2)], jnp.ones(2))
  np.testing.assert_allclose(state.nu, [1.0, 0.0])
  assert state.nonfinite_count == 1


def test_average_fits_nu_dtype_although_the_estimate_does_not():
  # Regression: the estimate was cast to nu_dtype before it was averaged.
  tx = sophia_optax.scale_by_sophia(
    b2=0.75,
    nu_dtype=jnp.float16,
    hessian_diagonal_fn=scripted([jnp.array(1e5)]),
  )
  ((_, state),) = run(tx, [jnp.ones([])], jnp.ones([]))
  np.testing.assert_allclose(state.nu, 25_000, rtol=1e-3)
  assert state.nu.dtype == jnp.float16
  assert state.nonfinite_count == 0


def test_real_and_imaginary_parts_are_separate():
  # Curvature 2 along the real axis, 200 along the imaginary one.
  loss = lambda z: jnp.sum(z.real**2 + 100 * z.imag**2)
  z = jnp.array([0.25 + 0.5j, -3.0 + 0.001j])
  tx = sophia_optax.scale_by_sophia(
    b1=0.0, b2=0.0, gamma=1.0, refresh_before_update=True
  )
  grads = jnp.conj(jax.grad(loss)(z))
  updates, state = tx.update(grads, tx.init(z), z, obj_fn=loss)
  np.testing.assert_allclose(state.nu, [2 + 200j] * 2, rtol=1e-5)
  np.testing.assert_allclose(updates, [0.25 + 0.5j, -1 + 0.001j], rtol=1e-5)
  assert state.win_rate == 0.75


def test_complex_quadratic_converges():
  target = jnp.array([1.0 - 2.0j, -0.5 + 3.0j])
  # The cross term couples real and imaginary parts.
  loss = lambda z: jnp.sum(
    jnp.abs(z - target) ** 2 + (z - target).real * (z - target).imag
  )
  tx = sophia_optax.sophia(
    optax.linear_schedule(0.3, 0.0, 200), b1=0.9, weight_decay=0.0, gamma=1.0
  )

  def step(carry, _):
    z, state = carry
    grads = jnp.conj(jax.grad(loss)(z))
    updates, state = tx.update(grads, state, z, obj_fn=loss)
    return (optax.apply_updates(z, updates), state), None

  z = jnp.zeros(2, jnp.complex64)
  (z, _), _ = jax.lax.scan(step, (z, tx.init(z)), length=200)
  np.testing.assert_allclose(z, target, atol=1e-2)


def test_win_rate_is_measured_on_refresh_steps(params):
  tx = sophia_optax.sophia(0.01, b2=0.0, gamma=1.0, update_interval=3)
  update = jax.jit(
    lambda s, p: tx.update(jax.grad(loss_fn)(p), s, p, obj_fn=loss_fn)
  )
  state, rates = tx.init(params), []
  assert optax.tree.get(state, 'win_rate') == 0
  for _ in range(9):
    updates, state = update(state, params)
    params = optax.apply_updates(params, updates)
    rates.append(float(optax.tree.get(state, 'win_rate')))
  assert rates[0] == rates[1] == rates[2] == 0  # Sign updates: h was zero.
  assert rates[3] == rates[4] == rates[5] > 0
  assert optax.tree.get(state, 'win_rate').dtype == jnp.float32


def test_coordinate_at_the_threshold_does_not_win():
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=1.0,
    refresh_before_update=True,
    hessian_diagonal_fn=scripted([jnp.ones(2)]),
  )
  ((_, state),) = run(tx, [jnp.array([1.0, 0.5])], jnp.ones(2))
  assert state.win_rate == 0.5


def test_win_rate_without_clipping_is_one():
  tx = sophia_optax.scale_by_sophia(
    clip_threshold=None, hessian_diagonal_fn=optax.identity()
  )
  ((_, state),) = run(tx, [jnp.ones(2)], jnp.ones(2))
  assert state.win_rate == 1


@pytest.mark.parametrize('injected', [False, True])
@pytest.mark.parametrize('n', [0, 2])
def test_printed_win_rate(params, capsys, n, injected):
  factory = sophia_optax.scale_by_sophia
  if injected:
    factory = optax.inject_hyperparams(factory)
  tx = factory(b2=0.0, gamma=1.0, verbose=True, print_win_rate_every_n_steps=n)
  state = tx.init(params)
  step = jax.jit(
    lambda s: tx.update(jax.grad(loss_fn)(params), s, params, obj_fn=loss_fn)
  )
  for _ in range(5):
    _, state = step(state)
  jax.effects_barrier()
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == (2 if n else 0)
  for line in printed:
    prefix, rate = line.split(': ')
    assert prefix == 'Sophia optimizer win rate'
    assert 0 < float(rate) < 1


def test_printed_win_rate_is_that_of_the_update(capsys):
  # The first update is clipped everywhere, the curvature after it is large.
  tx = sophia_optax.scale_by_sophia(
    gamma=1000.0,
    hessian_diagonal_fn=optax.identity(),
    verbose=True,
    print_win_rate_every_n_steps=1,
  )
  run(tx, [jnp.ones(2)] * 2, jnp.ones(2))
  jax.effects_barrier()
  rates = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
  assert rates == ['0.0', '1.0']


@pytest.mark.parametrize(
  'factory',
  [sophia_optax.scale_by_sophia, functools.partial(sophia_optax.sophia, 0.1)],
)
def test_no_print_costs_nothing(params, factory):
  def program(**kwargs):
    tx = factory(**kwargs)
    update = lambda s: tx.update(params, s, params, obj_fn=loss_fn)
    return jax.jit(update).lower(tx.init(params)).as_text()

  silent = program()
  assert program(verbose=True) == silent
  assert program(print_win_rate_every_n_steps=2) == silent
  assert program(verbose=True, print_win_rate_every_n_steps=2) != silent


def test_gamma_zero_is_sign_momentum():
  tx = sophia_optax.scale_by_sophia(
    gamma=0.0, hessian_diagonal_fn=optax.identity()
  )
  seen = run(tx, [jnp.array([1e-3, -5.0, 0.0])] * 3, jnp.ones(3))
  for updates, _ in seen:
    np.testing.assert_allclose(updates, [1.0, -1.0, 0.0])


def test_hyperparameters_may_be_of_any_numeric_type():
  results = []
  for number in (int, float, np.float64, np.array, jnp.array):
    tx = sophia_optax.scale_by_sophia(
      b1=number(0),
      b2=number(0),
      eps=number(1),
      gamma=number(2),
      clip_threshold=number(1),
      update_interval=number(2),
      hessian_diagonal_fn=optax.identity(),
    )
    grads = [jnp.array([0.5, -3.0, 0.1])] * 3
    results.append(run(tx, grads, jnp.ones(3)))
  chex.assert_trees_all_equal(*results)


def test_negative_curvature_takes_the_full_step():
  tx = sophia_optax.scale_by_sophia(
    b2=0.0,
    refresh_before_update=True,
    hessian_diagonal_fn=scripted([jnp.array([-5.0, 5.0])]),
    gamma=1.0,
  )
  ((updates, _),) = run(tx, [jnp.array([0.1, 0.1])], jnp.ones(2))
  np.testing.assert_allclose(updates, [1.0, 0.02], rtol=1e-5)


def test_integer_parameters_do_not_decay():
  # float32 can't represent this integer.
  params = {'w': jnp.ones(2), 'steps': jnp.array(2**24 + 1)}
  for mask in (
    None,
    {'w': True, 'steps': True},
    lambda tree: jax.tree.map(lambda _: True, tree),
    # Regression: the function got a tree without the integers.
    lambda tree: {name: leaf.ndim < 3 for name, leaf in tree.items()},
  ):
    tx = sophia_optax.sophia(
      0.1,
      weight_decay=0.5,
      weight_decay_mask=mask,
      hessian_diagonal_fn=optax.identity(),
    )
    grads = {'w': jnp.zeros(2), 'steps': jnp.array(0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], -0.05)
    chex.assert_trees_all_equal(updates['steps'], jnp.array(0))


@pytest.mark.parametrize('name', ['sophia', 'sophia_g'])
def test_gamma_may_be_a_schedule_of_the_step(name):
  # The curvature is 2, m is 2 x, so the update is x / gamma.
  loss_fn = lambda x: jnp.sum(x**2)
  x = jnp.array([0.3])
  factory = {
    'sophia': lambda gamma: sophia_optax.sophia(
      1.0,
      b1=0.0,
      b2=0.0,
      weight_decay=0.0,
      gamma=gamma,
      refresh_before_update=True,
    ),
    'sophia_g': lambda rho: sophia_optax.sophia_g(
      1.0,
      b1=0.0,
      b2=0.0,
      rho=rho,
      weight_decay=0.0,
      refresh_before_update=True,
      hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(),
    ),
  }[name]
  gammas = jnp.array([1.0, 2.0, 4.0])
  tx = factory(lambda step: gammas[step])
  state = tx.init(x)
  for gamma in gammas:
    updates, state = tx.update(jax.grad(loss_fn)(x), state, x, obj_fn=loss_fn)
    np.testing.assert_allclose(updates, -x / gamma, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('k', [10, 10.0, lambda step: 10.0 + 0.0 * step])
def test_injected_update_interval(dtype, k):
  # Regression: the count was cast to the dtype of the parameters. In bfloat16
  # there were 582 refreshes in 3,000 steps in place of 300.
  x = jnp.ones(2, dtype)
  tx = optax.inject_hyperparams(sophia_optax.scale_by_sophia)(
    update_interval=k, hessian_diagonal_fn=optax.identity()
  )

  def step(state, _):
    return tx.update(x, state, x)[1], None

  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    state, _ = jax.lax.scan(step, tx.init(x), length=3000)
  assert optax.tree.get(state, 'refresh_count') == 300


def test_update_interval_that_was_rounded():
  # A schedule computes 2.9999998 in float32 where it means 3.
  tx = sophia_optax.scale_by_sophia(
    update_interval=jnp.nextafter(jnp.float32(3), 0.0),
    hessian_diagonal_fn=optax.identity(),
  )
  *_, (_, state) = run(tx, [jnp.ones(2)] * 6, jnp.ones(2))
  assert state.refresh_count == 2


@pytest.mark.parametrize(
  'make',
  [
    sophia_optax.hutchinson_estimator_diag_hessian,
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
  ],
)
@pytest.mark.parametrize('key', [jax.random.key(3), jax.random.PRNGKey(3), 3])
def test_key_keeps_its_kind(make, key):
  estimator = make(key)
  state = estimator.init(jnp.ones(2))
  typed = jax.random.key(3)
  is_typed = jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
  assert is_typed == (getattr(key, 'dtype', None) == typed.dtype)
  got = jax.random.key_data(state.key) if is_typed else state.key
  np.testing.assert_array_equal(got, jax.random.key_data(typed))
