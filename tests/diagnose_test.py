"""Diagnostics in the state of Sophia, and of each module."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec

PARAMS = {
  'layer': {
    'kernel': jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
    'bias': jnp.linspace(0.5, 1.0, 4),
    'unused': jnp.ones(2),
  },
  'wave': jnp.array([1.0 + 2.0j, 0.5 - 1.0j], jnp.complex64),
  'step': jnp.array([3, 4]),
}


def loss_fn(params):
  """Has curvatures of both signs, also for imaginary parts."""
  layer, wave = params['layer'], params['wave']
  return (
    jnp.sum(jnp.sin(3 * layer['kernel']))
    + jnp.sum(layer['bias'] ** 4)
    + jnp.sum(wave.real**2 - wave.imag**2)
  )


def grads_of(params):
  grads = jax.grad(loss_fn, allow_int=True)(params)
  return jax.tree.map(
    lambda p, g: g.conj() if jnp.iscomplexobj(p) else g, params, grads
  )


def train(tx, num_steps, **extra_args):
  """Returns the state after some steps, all with the same gradient."""

  @jax.jit
  def step(state):
    return tx.update(
      grads_of(PARAMS), state, PARAMS, obj_fn=loss_fn, **extra_args
    )[1]

  state = tx.init(PARAMS)
  for _ in range(num_steps):
    state = step(state)
  return state


def real_parts(x):
  x = np.asarray(x)
  return (
    np.concatenate([x.real.ravel(), x.imag.ravel()])
    if (np.iscomplexobj(x))
    else x.ravel()
  )


@pytest.fixture(autouse=True)
def _fast(compile_fast):
  del compile_fast


def test_state_counts_refreshes_and_measures_when_asked():
  state = train(sophia_optax.scale_by_sophia(update_interval=2), 5)
  assert state.refresh_count == 3
  assert state.negative_fraction is None

  tx = sophia_optax.sophia(0.1, update_interval=2, diagnostics=True)
  state = train(tx, 5)
  nu = optax.tree.get(state, 'nu')
  h = np.concatenate(
    [
      real_parts(nu['layer']['kernel']),
      real_parts(nu['layer']['bias']),
      real_parts(nu['layer']['unused']),
      real_parts(nu['wave']),
    ]
  )
  assert 0 < np.mean(h < 0) < 1
  assert optax.tree.get(state, 'negative_fraction') == np.float32(
    np.mean(h < 0)
  )
  assert optax.tree.get(state, 'refresh_count') == 3
  state = train(tx, 5, may_refresh=False)
  assert optax.tree.get(state, 'refresh_count') == 0


@pytest.mark.parametrize(
  ('target', 'refresh_before_update'),
  [
    (0.4, True),
    (None, False),
    pytest.param(0.4, False, marks=pytest.mark.slow),
    pytest.param(None, True, marks=pytest.mark.slow),
  ],
)
def test_modules_against_numpy(target, refresh_before_update):
  b1, b2, eps, gamma, clip = 0.8, 0.5, 1e-3, 0.3, 0.7
  tx = sophia_optax.scale_by_sophia(
    b1=b1,
    b2=b2,
    eps=eps,
    gamma=gamma,
    clip_threshold=clip,
    update_interval=2,
    target_win_rate=target,
    refresh_before_update=refresh_before_update,
    diagnostics=True,
  )
  before, state = train(tx, 2), train(tx, 3)  # The third step refreshes.
  found = sophia_optax.diagnose(state)
  assert list(found) == ['layer', 'step', 'wave']
  used = state if refresh_before_update else before
  if target:
    assert state.gamma_factor != before.gamma_factor
    gamma *= float(used.gamma_factor)
  for name, leaves in {
    'layer': ('bias', 'kernel', 'unused'),
    'wave': None,
  }.items():
    m, h, used_h = (
      np.concatenate([real_parts(tree[name][x]) for x in leaves])
      if leaves
      else real_parts(tree[name])
      for tree in (state.mu, state.nu, used.nu)
    )
    u = m / (1 - b1**3) / np.maximum(gamma * used_h, eps)
    np.testing.assert_allclose(
      found[name],
      [np.mean(np.abs(u) < clip), np.mean(h < 0), 0, np.linalg.norm(h)],
      rtol=1e-6,
    )
  np.testing.assert_array_equal(found['step'], 0)  # Integers: no coordinates.


def test_hyperparameters_are_those_of_the_optimizer():
  # Regression: they had to be passed again. Wrong ones gave no error.
  tx = sophia_optax.sophia_g(
    rho=1.0,
    b1=0.0,
    b2=0.0,
    hessian_diagonal_fn=sophia_optax.hutchinson_estimator_diag_hessian(),
    refresh_before_update=True,
    diagnostics=True,
  )
  x = {'w': jnp.array([0.5, -0.5])}  # Newton's steps, so all win.
  loss = lambda x: jnp.sum(x['w'] ** 2)
  _, state = tx.update(jax.grad(loss)(x), tx.init(x), x, obj_fn=loss)
  assert sophia_optax.diagnose(state)['w'].win_rate == 1


def test_before_the_first_step():
  # Regression: 0 / 0 in the bias correction.
  tx = sophia_optax.sophia(0.1, diagnostics=True)
  with jax.debug_nans(True):
    found = sophia_optax.diagnose(tx.init(PARAMS))
  for module in found.values():
    np.testing.assert_array_equal(module, 0)


def test_state_is_sharded_like_the_parameters():
  # Regression: a tree of numbers per parameter was taken for one of parameters.
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  params = {'w': jnp.ones((8, 2)), 'b': jnp.ones(8)}
  sharding = jax.sharding.NamedSharding(mesh, P('data'))
  tx = sophia_optax.sophia(0.1, diagnostics=True, target_win_rate=0.3)
  shardings = optax.tree.map_params(
    tx,
    lambda _: sharding,
    tx.init(params),
    transform_non_params=lambda _: jax.sharding.NamedSharding(mesh, P()),
  )
  state = jax.jit(tx.init, out_shardings=shardings)(params)
  assert state[0].nu['w'].sharding == sharding
  assert state[0].by_leaf.shape == (2, 2)


@pytest.mark.slow
def test_state_of_nnx():
  model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))
  )
  graph, params = nnx.split(model)
  x = jnp.ones((2, 3))
  objective = lambda params: jnp.mean(nnx.merge(graph, params)(x) ** 2)
  optimizer = nnx.Optimizer(
    model, sophia_optax.sophia(0.1, diagnostics=True), wrt=nnx.Param
  )
  optimizer.update(model, jax.grad(objective)(params), obj_fn=objective)
  found = sophia_optax.diagnose(optimizer.opt_state, depth=2)
  assert list(found) == ['layers/0', 'layers/1']
  assert found['layers/1'].curvature_norm > 0


def test_figures_of_modules_agree_with_the_whole():
  tx = sophia_optax.scale_by_sophia(
    b1=0.5,
    gamma=5.0,
    update_interval=1,
    refresh_before_update=True,
    diagnostics=True,
  )
  state = train(tx, 3)
  found = sophia_optax.diagnose(state, depth=2)
  assert list(found) == [
    'layer/bias',
    'layer/kernel',
    'layer/unused',
    'step',
    'wave',
  ]
  sizes = [4, 12, 2, 0, 4]
  for name in 'win_rate', 'negative_fraction':
    parts = [getattr(module, name) for module in found.values()]
    assert 0 < np.average(parts, weights=sizes) < 1
    np.testing.assert_allclose(
      np.average(parts, weights=sizes), getattr(state, name), rtol=1e-6
    )


def test_without_clipping_all_win():
  tx = sophia_optax.scale_by_sophia(clip_threshold=None, diagnostics=True)
  assert sophia_optax.diagnose(train(tx, 1))['layer'].win_rate == 1


@pytest.mark.parametrize('name', ['mu', 'nu'])
def test_entries_that_are_not_finite(name):
  state = train(sophia_optax.scale_by_sophia(diagnostics=True), 1)
  bad = jnp.zeros(4).at[:2].set(jnp.array([jnp.nan, jnp.inf]))
  tree = getattr(state, name)
  tree = tree | {'layer': tree['layer'] | {'bias': bad}}
  found = sophia_optax.diagnose(optax.tree.set(state, **{name: tree}))
  assert found['layer'].nonfinite_fraction == np.float32(2 / 18)
  assert found['wave'].nonfinite_fraction == 0


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.chain(optax.clip(1.0), tx),
    lambda tx: optax.masked(
      tx, lambda params: {name: name == 'layer' for name in params}
    ),
    lambda tx: sophia_optax.MultiSteps(tx, 1).gradient_transformation(),
  ],
)
def test_finds_the_state_within_others(wrap):
  params = {'layer': PARAMS['layer'], 'rest': jnp.ones(3)}
  objective = lambda p: (
    jnp.sum(jnp.cos(p['layer']['kernel'])) + jnp.sum(p['layer']['bias'] ** 2)
  )
  tx = wrap(sophia_optax.sophia(0.1, gamma=1.0, b2=0.0, diagnostics=True))
  grads = jax.tree.map(jnp.ones_like, params)
  extra_args = {'obj_fn': objective, 'full_params': params}
  with jax.numpy_dtype_promotion('standard'):  # optax.MultiSteps needs it.
    _, state = tx.update(grads, tx.init(params), params, **extra_args)
  found = jax.jit(sophia_optax.diagnose)(state)
  np.testing.assert_allclose(found['layer'].negative_fraction, 12 / 18)


def test_divided_parameters_are_counted_as_one():
  mesh = jax.make_mesh(
    (8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  tx = sophia_optax.scale_by_sophia(gamma=1.0, diagnostics=True)

  def step(add, x, curvature):
    objective = lambda x: add(jnp.sum(curvature * x['w'] ** 2))
    x = {'w': x}
    state = tx.update(x, tx.init(x), x, obj_fn=objective)[1]
    return state.negative_fraction, sophia_optax.diagnose(state)

  x, curvature = jnp.linspace(0.1, 1.0, 16), jnp.linspace(-1.0, 9.0, 16)
  got = jax.jit(
    jax.shard_map(
      functools.partial(step, lambda loss: jax.lax.psum(loss, 'model')),
      mesh=mesh,
      in_specs=(P('model'), P('model')),
      out_specs=P(),
    )
  )(x, curvature)
  expected = step(lambda loss: loss, x, curvature)
  assert expected[0] == np.mean(curvature < 0) > 0
  assert expected[1]['w'].negative_fraction == expected[0]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected
  )


@pytest.mark.parametrize('kwargs', [{}, {'target_win_rate': 0.3}])
def test_more_coordinates_than_int32_counts_are_traced(kwargs):
  # Regression: the number of parameters was an int that did not fit.
  params = {'w': jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32)}
  tx = sophia_optax.sophia(0.1, diagnostics=True, **kwargs)

  def step(params):
    state = tx.init(params)
    return tx.update(
      params, state, params, obj_fn=lambda p: jnp.sum(p['w'] ** 2)
    )

  updates, _ = jax.eval_shape(step, params)
  assert updates['w'].shape == (2**16, 2**17)


@pytest.mark.parametrize('shape', [(2**32 - 1,), (2, 2**31), (2**17, 2**15)])
def test_more_coordinates_than_int32_counts(shape):
  def found():  # The arrays are constants, which XLA does not allocate.
    tx = sophia_optax.scale_by_sophia(diagnostics=True)
    leaf = jnp.broadcast_to(jnp.float32(jnp.inf), shape)
    return sophia_optax.diagnose(
      tx.init({'w': jnp.zeros(3)})._replace(mu={'w': leaf}, nu={'w': leaf})
    )['w']

  assert jax.jit(found)().nonfinite_fraction == 1


def test_errors():
  params = {'w': jnp.ones(2)}
  sophia = sophia_optax.sophia(0.1)
  with pytest.raises(
    ValueError, match=r'one SophiaState, .* a tuple that contains 0'
  ):
    sophia_optax.diagnose(optax.adam(0.1).init(params))
  with pytest.raises(ValueError, match='a tuple that contains 2'):
    sophia_optax.diagnose(optax.chain(sophia, sophia).init(params))
  with pytest.raises(ValueError, match='Pass diagnostics=True'):
    sophia_optax.diagnose(sophia.init(params))
  sophia = sophia_optax.sophia(0.1, diagnostics=True)
  with pytest.raises(ValueError, match=r'depth must be .* at least 1, got 0'):
    sophia_optax.diagnose(sophia.init(params), depth=0)
  replicas = jax.vmap(lambda _: sophia.init(params))(jnp.zeros(2))
  with pytest.raises(ValueError, match=r'one replica, .* \(2, 1, 2\)'):
    sophia_optax.diagnose(replicas)
  assert jax.vmap(sophia_optax.diagnose)(replicas)['w'].win_rate.shape == (2,)


def test_fraction_is_float32_in_double_precision_too():
  with jax.enable_x64(True):
    x = jnp.ones(3, jnp.float64)
    tx = sophia_optax.scale_by_sophia(diagnostics=True)
    _, state = tx.update(x, tx.init(x), x, obj_fn=lambda x: -jnp.sum(x**2))
  assert state.negative_fraction == 1
  assert state.negative_fraction.dtype == jnp.float32


def test_norm_is_summed_in_float32():
  tx = sophia_optax.scale_by_sophia(nu_dtype=jnp.bfloat16, diagnostics=True)
  nu = {'w': jnp.array([16.0, 1.0], jnp.bfloat16)}  # 257 has too many bits.
  found = sophia_optax.diagnose(tx.init({'w': jnp.ones(2)})._replace(nu=nu))
  np.testing.assert_allclose(found['w'].curvature_norm, 257**0.5, rtol=1e-6)


def test_norm_of_curvature_in_float16():
  # Regression: 300² is more than float16 can hold; the norm is not.
  tx = sophia_optax.scale_by_sophia(nu_dtype=jnp.float16, diagnostics=True)
  nu = {'w': jnp.array([300.0, 400.0], jnp.float16)}
  found = sophia_optax.diagnose(tx.init({'w': jnp.ones(2)})._replace(nu=nu))
  assert found['w'].curvature_norm == 500
