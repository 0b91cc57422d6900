"""γ that is adjusted to a win rate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from sophia_optax import _gamma

P = jax.sharding.PartitionSpec
TARGET = 0.3


def history(tx, params, loss_fn, num_steps, predict_fn=None):
  """Trains with a new batch for each step; returns the history of all steps."""

  def step(carry, key):
    params, state = carry
    batch = loss_fn.sample(key)
    obj_fn = lambda params: loss_fn(params, batch)
    updates, state = tx.update(
      jax.grad(obj_fn)(params),
      state,
      params,
      obj_fn=obj_fn,
      predict_fn=predict_fn and (lambda params: predict_fn(params, batch)),
    )
    observed = {
      'factor': optax.tree.get(state, 'gamma_factor'),
      'win_rate': optax.tree.get(state, 'win_rate'),
      'norm': optax.tree.norm(updates),
    }
    return (optax.apply_updates(params, updates), state), observed

  keys = jax.random.split(jax.random.PRNGKey(1), num_steps)
  with jax.numpy_dtype_promotion('standard'):  # optax's schedules need it.
    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[1])(
      params
    )


class Quadratic:
  """Curvatures over four orders of magnitude, with noisy gradients."""

  curvatures = 10 ** jnp.linspace(-2, 2, 200)
  params = 3 * jax.random.normal(jax.random.PRNGKey(0), (200,))

  def sample(self, key):
    return jax.random.normal(key, (200,)) * jnp.sqrt(self.curvatures)

  def __call__(self, x, noise):
    return jnp.sum(self.curvatures * x**2) / 2 + jnp.sum(noise * x)


class LanguageModel:
  """Predicts a character from the last three; `scale` multiplies the loss."""

  text = np.frombuffer((_gamma.__doc__ * 2).encode(), np.uint8) % 64
  tokens = jnp.asarray(text.astype(np.int32))

  def __init__(self, scale=1.0):
    self.scale = scale
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    self.params = {
      'embedding': jax.random.normal(keys[0], (64, 8)) / 3,
      'hidden': jax.random.normal(keys[1], (24, 32)) / 8,
      'output': jax.random.normal(keys[2], (32, 64)) / 8,
    }

  def sample(self, key):  # (B, 4)
    starts = jax.random.randint(key, (64, 1), 0, len(self.tokens) - 4)
    return self.tokens[starts + jnp.arange(4)]

  def predict(self, params, batch):
    x = params['embedding'][batch[:, :3]].reshape(-1, 24)
    return jnp.tanh(x @ params['hidden']) @ params['output']

  def __call__(self, params, batch):
    return (
      self.scale
      * optax.softmax_cross_entropy_with_integer_labels(
        self.predict(params, batch), batch[:, 3]
      ).mean()
    )


def sophia(gamma, **kwargs):
  rate = optax.cosine_decay_schedule(3e-3, 400)
  return sophia_optax.sophia(
    rate, b1=0.9, gamma=gamma, target_win_rate=TARGET, **kwargs
  )


def sophia_g(gamma):
  rate = optax.cosine_decay_schedule(3e-3, 400)
  return sophia_optax.sophia_g(rate, b1=0.9, rho=gamma, target_win_rate=TARGET)


# γ is right near 0.3 in all of these.
@pytest.mark.parametrize('gamma', [3e-7, 0.3, 3e5])
def test_quadratic_from_anywhere(gamma):
  problem = Quadratic()
  tx = sophia(gamma, update_interval=5)
  got = history(tx, problem.params, problem, 400)
  np.testing.assert_allclose(got['win_rate'][300:], TARGET, atol=0.1)


@pytest.mark.parametrize(
  ('factory', 'gamma'),
  [
    (sophia, 3e-7),
    (sophia_g, 3e5),
    pytest.param(sophia, 0.3, marks=pytest.mark.slow),
    pytest.param(sophia, 3e5, marks=pytest.mark.slow),
    pytest.param(sophia_g, 3e-7, marks=pytest.mark.slow),
    pytest.param(sophia_g, 0.3, marks=pytest.mark.slow),
  ],
)
def test_language_model_from_anywhere(factory, gamma):
  problem = LanguageModel()
  got = history(factory(gamma), problem.params, problem, 400, problem.predict)
  np.testing.assert_allclose(got['win_rate'][300:], TARGET, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('factory', [sophia, sophia_g])
def test_scale_of_the_loss_makes_no_difference(factory):
  settled = []
  for scale in (1.0, 1000.0):
    problem = LanguageModel(scale)
    got = history(factory(0.3), problem.params, problem, 400, problem.predict)
    settled.append(jax.tree.map(lambda x: jnp.mean(x[300:]), got))
  np.testing.assert_allclose(
    settled[0]['win_rate'], settled[1]['win_rate'], atol=0.02
  )
  np.testing.assert_allclose(settled[0]['norm'], settled[1]['norm'], rtol=0.02)


def steer(*numbers):  # factor, target, affected, of these won, missing
  return float(_gamma._steer(*map(jnp.float32, numbers)))


def test_law():
  # At the target nothing changes; far away it is a factor of 4.
  assert steer(0.02, 0.3, 1000, 300, 0) == pytest.approx(0.02)
  assert steer(0.02, 0.3, 1000, 0, 0) == pytest.approx(0.08)
  assert steer(0.02, 0.3, 1000, 1000, 0) == pytest.approx(0.005)
  # For a logistic distribution with scale 1/2, one step reaches the target.
  win_rate = lambda gamma: 1 / (1 + (gamma / 0.05) ** -2)
  gamma = steer(0.03, 0.4, 1e6, 1e6 * win_rate(0.03), 0)
  assert win_rate(gamma) == pytest.approx(0.4, rel=1e-5)
  # Of 1,000 others half win, 100 more than the target: 1,000 affected ones have
  # to win 100 less, 300.
  assert steer(0.02, 0.4, 1000, 300, -100) == pytest.approx(0.02)


@pytest.mark.parametrize(
  ('affected', 'always'), [(0.2, 0.0), (0.2, 0.8), (0.0, 0.5), (0.0, 0.0)]
)
def test_target_out_of_reach_does_not_drive_gamma_away(affected, always):
  gamma, number = 0.02, 1e6
  missing = TARGET * (1 - affected) - always
  for _ in range(200):
    won = affected / (1 + (gamma / 0.05) ** -1)
    gamma = steer(
      gamma, TARGET, number * affected, number * won, number * missing
    )
  assert 1e-3 < gamma < 1.0


def test_without_a_target_there_is_no_factor():
  state = sophia_optax.scale_by_sophia().init(jnp.ones(3))
  assert state.gamma_factor is None
  state = sophia_optax.scale_by_sophia(target_win_rate=0.2).init(jnp.ones(3))
  assert state.gamma_factor == 1


@pytest.mark.parametrize('refresh_before_update', [False, True])
def test_gamma_is_used_with_the_curvature_that_it_was_found_for(
  refresh_before_update,
):
  loss_fn = lambda x: jnp.sum(jnp.array([1.0, 2.0, 4.0]) * x**2)
  x = jnp.array([0.3, 0.4, -0.45])
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=0.5,
    update_interval=2,
    target_win_rate=TARGET,
    refresh_before_update=refresh_before_update,
  )
  grads = jax.grad(loss_fn)(x)
  first, state = tx.update(grads, tx.init(x), x, obj_fn=loss_fn)
  # m̂ / h is x, and all three win: γ is divided by 4.
  assert state.gamma_factor == 0.25
  newton = jnp.clip(x / 0.125, -1, 1)
  expected = newton if refresh_before_update else jnp.sign(x)
  np.testing.assert_allclose(first, expected, rtol=1e-6)
  assert state.win_rate == 0  # Also measured with that γ: all are clipped.
  second, state = tx.update(grads, state, x, obj_fn=loss_fn)
  np.testing.assert_allclose(second, newton, rtol=1e-6)
  assert state.gamma_factor == 0.25  # This step does not refresh.


@pytest.mark.parametrize('check_vma', [True, False])
def test_replicas_have_one_gamma(check_vma):
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  tx = sophia_optax.scale_by_sophia(
    update_interval=1,
    target_win_rate=TARGET,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(
      axis_name='data'
    ),
  )

  def train(x, data):
    loss_fn = lambda x: jnp.sum(jnp.cosh(x * data[0]))

    def step(state, _):
      grads = jax.grad(loss_fn)(jax.lax.pcast(x, 'data', to='varying'))
      grads = jax.lax.pmean(grads, 'data')
      return tx.update(grads, state, x, obj_fn=loss_fn)[1], None

    return jax.lax.scan(step, tx.init(x), length=5)[0].gamma_factor

  gamma = jax.jit(
    jax.shard_map(
      train,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=check_vma,
    )
  )(jnp.linspace(0.1, 1.0, 16), jnp.arange(8.0))
  shards = [np.asarray(s.data) for s in gamma.addressable_shards]
  assert len(shards) == 8
  assert len(set(map(float, shards))) == 1
  assert float(gamma) != pytest.approx(1.0)


def test_divided_parameters_are_counted_as_one():
  mesh = jax.make_mesh(
    (8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  tx = sophia_optax.scale_by_sophia(
    b1=0.5, update_interval=1, target_win_rate=TARGET
  )

  def train(add, x, curvature):
    loss_fn = lambda x: add(jnp.sum(curvature * x**2))

    def step(state, _):
      return tx.update(x, state, x, obj_fn=loss_fn)[1], None

    return jax.lax.scan(step, tx.init(x), length=20)[0].gamma_factor

  x, curvature = jnp.linspace(0.1, 1.0, 16), 10 ** jnp.linspace(-3, 3, 16)
  got = jax.jit(
    jax.shard_map(
      functools.partial(train, lambda loss: jax.lax.psum(loss, 'model')),
      mesh=mesh,
      in_specs=(P('model'), P('model')),
      out_specs=P(),
    )
  )(x, curvature)
  expected = train(lambda loss: loss, x, curvature)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    ({'target_win_rate': 1.0}, ValueError, r'in \(0, 1\), got 1\.0'),
    ({'target_win_rate': 0}, ValueError, r'in \(0, 1\), got 0'),
    ({'target_win_rate': 'half'}, TypeError, 'must be a number'),
    ({'gamma': 0.0}, ValueError, 'needs gamma greater than 0'),
    ({'gamma': np.float32(0)}, ValueError, 'needs gamma greater than 0'),
    ({'clip_threshold': None}, ValueError, 'and a clip_threshold, got .*=None'),
  ],
)
def test_errors(kwargs, error, match):
  with pytest.raises(error, match=match):
    sophia_optax.sophia(0.1, **({'target_win_rate': TARGET} | kwargs))


class RareRows:
  """An embedding whose rows are mostly absent from the data for some steps."""

  targets = jax.random.normal(jax.random.PRNGKey(2), (50, 4))
  curvatures = 10 ** jnp.linspace(-1, 1, 200).reshape(50, 4)

  def loss(self, x, rows, noise):
    distance = x[rows] - self.targets[rows] - noise
    return jnp.sum(self.curvatures[rows] * distance**2) / 2

  def train(self, tx, params, state, num_rows, num_steps):
    def step(carry, key):
      params, state = carry
      noise = jax.random.normal(key, (num_rows, 4))
      loss = lambda x: self.loss(x, jnp.arange(num_rows), noise)
      updates, state = tx.update(
        jax.grad(loss)(params), state, params, obj_fn=loss
      )
      seen = jnp.stack([state.win_rate, state.gamma_factor])
      return (optax.apply_updates(params, 0.01 * -updates), state), seen

    keys = jax.random.split(jax.random.PRNGKey(3), num_steps)
    return jax.jit(
      lambda *carry: jax.lax.scan(step, carry, keys)
    )(params, state)  # fmt: skip


@pytest.mark.slow
def test_recovers_from_rows_without_a_gradient():
  # Regression: rows whose m decays win at any γ, so γ fell to exactly 0.
  problem = RareRows()
  tx = sophia_optax.scale_by_sophia(b1=0.9, gamma=1.0, target_win_rate=TARGET)
  params = jnp.zeros((50, 4))
  carry, before = problem.train(tx, params, tx.init(params), 50, 500)
  np.testing.assert_allclose(before[300:, 0], TARGET, atol=0.1)
  carry, unseen = problem.train(tx, *carry, 10, 3000)
  assert unseen[-1, 0] > 0.8  # The others win,
  assert 1e-2 < unseen[-1, 1] / before[-1, 1] < 1e2  # which does not matter.
  _, after = problem.train(tx, *carry, 50, 400)
  np.testing.assert_allclose(after[300:, 0], TARGET, atol=0.1)


def test_recovers_from_all_coordinates_without_a_gradient():
  problem = RareRows()
  tx = sophia_optax.scale_by_sophia(b1=0.9, gamma=1.0, target_win_rate=TARGET)
  params = jnp.zeros((50, 4))
  carry, before = problem.train(tx, params, tx.init(params), 50, 500)
  carry, unseen = problem.train(tx, *carry, 0, 1000)
  np.testing.assert_array_equal(unseen[:, 1], before[-1, 1])
  _, after = problem.train(tx, *carry, 50, 400)
  np.testing.assert_allclose(after[300:, 0], TARGET, atol=0.1)


@pytest.mark.parametrize('c', [1.0, 100.0])
def test_coordinates_below_eps_do_not_count(c):
  # They win at any γ, also with a gradient and positive curvature.
  grads = jnp.array([0.01, 0.02, 0.05, 0.5, 2.0, 4.0] + [5e-4] * 6)
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    eps=1e-3 / c,
    clip_threshold=c,
    update_interval=1,
    target_win_rate=0.3,
    hessian_diagonal_fn=optax.stateless(lambda g, _: jnp.ones_like(g)),
  )
  step = jax.jit(lambda state: tx.update(grads, state, grads)[1])
  state = tx.init(grads)
  for _ in range(100):
    state = step(state)
  # Half win because of eps. γ is adjusted for the others alone.
  assert 0.001 < c * 0.01 * state.gamma_factor < 0.02


def test_coordinates_of_negative_curvature_do_not_count():
  # They lose at any γ, so the target can't be reached.
  x = jnp.linspace(0.1, 1.0, 10)
  curvature = jnp.where(jnp.arange(10) < 8, -1.0, 1.0)
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=1.0,
    update_interval=1,
    target_win_rate=0.5,
    hessian_diagonal_fn=optax.stateless(lambda g, _: curvature),
  )
  step = jax.jit(lambda state: tx.update(x, state, x)[1])
  state = tx.init(x)
  for _ in range(100):
    state = step(state)
  # The other two win, by little.
  assert 0.1 < state.gamma_factor < 10


def test_infinite_gradient_of_one_step():
  # Regression: γ rose to infinity, and 0 · ∞ made the updates NaN.
  tx = sophia_optax.scale_by_sophia(
    gamma=1.0, update_interval=1, target_win_rate=TARGET
  )
  x = jnp.array([0.5, -1.0, 0.0])
  loss = lambda x: jnp.sum(x**2)

  def step(state, t):
    grads = jnp.where(t == 3, jnp.inf, jax.grad(loss)(x))
    updates, state = tx.update(grads, state, x, obj_fn=loss)
    return state, (updates, state.gamma_factor)

  _, (updates, factors) = jax.jit(
    lambda s: jax.lax.scan(step, s, jnp.arange(200))
  )(tx.init(x))
  assert jnp.all(jnp.isfinite(factors))
  assert factors[2] > 0
  # From then on m is infinite, for any γ.
  np.testing.assert_array_equal(factors[3:], factors[2])
  assert jnp.all(jnp.isfinite(updates))


@pytest.mark.parametrize('won', [0, 1000])
def test_factor_is_bounded(won):
  factor = 1.0
  for _ in range(100):
    factor = steer(factor, TARGET, 1000, won, 0)
  assert factor == pytest.approx(1e10 if won == 0 else 1e-10, rel=1e-5)


def test_injected_hyperparameters_with_a_target():
  # Regressions: the state could not be donated, as two of its arrays shared a
  # buffer; `gamma` was ambiguous; a schedule of γ had no effect.
  loss = lambda x: jnp.sum(jnp.array([1.0, 2.0, 4.0]) * x**2)
  x = jnp.array([0.3, 0.4, -0.45])

  def run(**kwargs):
    tx = optax.inject_hyperparams(sophia_optax.sophia)(
      0.1, b1=0.0, b2=0.0, target_win_rate=TARGET, update_interval=2, **kwargs
    )
    step = jax.jit(
      lambda s: tx.update(jax.grad(loss)(x), s, x, obj_fn=loss),
      donate_argnums=0,
    )
    state, seen = tx.init(x), []
    for _ in range(2):
      updates, state = step(state)
      seen.append(updates)
    return seen[1], state

  updates, state = run(gamma=0.5)
  assert optax.tree.get(state, 'gamma') == 0.5
  assert optax.tree.get(state, 'gamma_factor') == 0.25  # All have won.
  np.testing.assert_allclose(updates, -0.1 * jnp.sign(x), rtol=1e-3)
  updates, state = run(gamma=lambda step: jnp.where(step == 1, 4.0, 0.5))
  assert optax.tree.get(state, 'gamma_factor') == 0.25
  np.testing.assert_allclose(updates, -0.1 * x / (4.0 * 0.25), rtol=1e-3)


def test_scheduled_gamma_is_multiplied():
  tx = sophia_optax.scale_by_sophia(
    b1=0.0,
    b2=0.0,
    gamma=lambda step: jnp.where(step == 0, 0.5, 1.5),
    target_win_rate=TARGET,
    refresh_before_update=True,
  )
  loss = lambda x: jnp.sum(x**2)
  x = jnp.array([0.1, 0.2, 0.45])
  first, state = tx.update(jax.grad(loss)(x), tx.init(x), x, obj_fn=loss)
  assert state.gamma_factor == 0.25  # All win: m / h is x, below 0.5.
  np.testing.assert_allclose(first, jnp.clip(x / 0.125, -1, 1), rtol=1e-5)
  second, _ = tx.update(jax.grad(loss)(x), state, x, obj_fn=loss)
  np.testing.assert_allclose(second, jnp.clip(x / 0.375, -1, 1), rtol=1e-5)


def test_gamma_array_of_the_user_survives_donation():
  gamma = jnp.array(0.5)
  tx = sophia_optax.scale_by_sophia(gamma=gamma, target_win_rate=TARGET)
  x = jnp.ones(2)
  loss = lambda x: jnp.sum(x**2)
  step = jax.jit(lambda s: tx.update(x, s, x, obj_fn=loss)[1], donate_argnums=0)
  step(step(tx.init(x)))
  assert gamma == 0.5
