"""Figures of each module, from the state of Sophia."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

PARAMS = {
  'layer': {
    'kernel': jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
    'bias': jnp.linspace(0.5, 1.0, 4),
    'unused': jnp.zeros(2),
  },
  'wave': jnp.array([1.0 + 2.0j, 0.5 - 1.0j], jnp.complex64),
  'step': jnp.array([3, 4]),
}


def scale_by_sophia(**kwargs):
  return sophia_optax.scale_by_sophia(
    diagnostics=True, hessian_diagonal_fn=optax.identity(), **kwargs
  )


def coordinates(tree, module):
  """Returns real and imaginary parts in a module, without integers."""
  for key in filter(None, module.split('/')):
    tree = tree[key]
  leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(tree)]
  parts = [x.real for x in leaves if x.dtype != np.int32]
  parts += [x.imag for x in leaves if np.iscomplexobj(x)]
  return np.concatenate([np.zeros(0), *parts])


@pytest.mark.parametrize(
  ('target', 'refresh_before_update'), [(0.4, True), (None, False)]
)
def test_in_numpy(target, refresh_before_update):
  b1, eps, gamma, clip = 0.8, 1e-3, 2.0, 0.9
  tx = scale_by_sophia(
    b1=b1,
    b2=0.5,
    eps=eps,
    gamma=gamma,
    clip_threshold=clip,
    update_interval=2,
    target_win_rate=target,
    refresh_before_update=refresh_before_update,
  )
  step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS)[1])
  before = step(step(tx.init(PARAMS)))
  state = step(before)  # The third step refreshes.
  used = state if refresh_before_update else before
  if target:
    assert state.gamma_factor != before.gamma_factor
    gamma *= float(used.gamma_factor)

  def expected(module):
    trees = state.mu, state.nu, used.nu
    m, h, used_h = (coordinates(t, module) for t in trees)
    u = m / (1 - b1**3) / np.maximum(gamma * used_h, eps)
    if not m.size:
      return np.zeros(4)
    return [np.mean(np.abs(u) < clip), np.mean(h < 0), 0, np.linalg.norm(h)]

  whole = expected('')
  assert 0 < whole[0] < 1
  assert 0 < whole[1] < 1
  np.testing.assert_allclose(state.win_rate, whole[0], rtol=1e-6)
  found = jax.jit(
    lambda state: [sophia_optax.diagnose(state, depth=d) for d in range(3)]
  )(state)
  assert list(map(list, found)) == [
    [''],
    ['layer', 'step', 'wave'],
    ['layer/bias', 'layer/kernel', 'layer/unused', 'step', 'wave'],
  ]
  for name, module in [pair for figures in found for pair in figures.items()]:
    np.testing.assert_allclose(module, expected(name), rtol=1e-6)


def test_before_the_first_step():
  # Regression: 0 / 0 in the bias correction.
  with jax.debug_nans(True):
    found = sophia_optax.diagnose(scale_by_sophia().init(PARAMS))
  for module in found.values():
    np.testing.assert_array_equal(module, 0)


@pytest.mark.parametrize('name', ['mu', 'nu'])
def test_entries_that_are_not_finite(name):
  state = scale_by_sophia().init(PARAMS)
  bad = jnp.zeros(4).at[:2].set(jnp.array([jnp.nan, jnp.inf]))
  tree = getattr(state, name)
  tree = tree | {'layer': tree['layer'] | {'bias': bad}}
  found = sophia_optax.diagnose(state._replace(**{name: tree}))
  assert found['layer'].nonfinite_fraction == np.float32(2 / 18)
  assert found['wave'].nonfinite_fraction == 0


@pytest.mark.parametrize(
  ('dtype', 'entries'),
  [
    ('bfloat16', [16, 1]),  # 257 has too many bits.
    # Regression: 300² is more than float16 can hold; the norm is not.
    ('float16', [300, 400]),
    ('float64', [3, 4]),
  ],
)
def test_figures_are_in_float32(dtype, entries):
  with jax.enable_x64(dtype == 'float64'):
    state = scale_by_sophia().init({'w': jnp.ones(2)})
    nu = {'w': jnp.array(entries, dtype)}
    found = sophia_optax.diagnose(state._replace(nu=nu))['w']
  assert all(figure.dtype == jnp.float32 for figure in found)
  norm = np.linalg.norm(np.float64(entries))
  np.testing.assert_allclose(found.curvature_norm, norm, rtol=1e-6)


@pytest.mark.parametrize('shape', [(2**32 - 1,), (2, 2**31), (2**17, 2**15)])
def test_more_coordinates_than_int32_counts(shape):
  def found():  # The arrays are constants, which XLA does not allocate.
    leaf = jnp.broadcast_to(jnp.float32(jnp.inf), shape)
    state = scale_by_sophia().init({'w': jnp.zeros(3)})
    state = state._replace(mu={'w': leaf}, nu={'w': leaf})
    return sophia_optax.diagnose(state)['w']

  assert jax.jit(found)().nonfinite_fraction == 1


@pytest.mark.parametrize(
  ('wrap', 'names'),
  [
    (lambda tx: optax.chain(optax.clip(1.0), tx), ['layer', 'step', 'wave']),
    (
      lambda tx: optax.masked(
        tx, {'layer': True, 'step': False, 'wave': False}
      ),
      ['layer'],
    ),
    (lambda tx: sophia_optax.MultiSteps(tx, 2), ['layer', 'step', 'wave']),
  ],
)
def test_finds_the_state_within_others(wrap, names):
  state = wrap(sophia_optax.sophia(0.1, diagnostics=True)).init(PARAMS)
  assert list(jax.eval_shape(sophia_optax.diagnose, state)) == names


def test_modules_of_nnx():
  def diagnose():
    model = nnx.Sequential(
      nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(
      model, sophia_optax.sophia(0.1, diagnostics=True), wrt=nnx.Param
    )
    return sophia_optax.diagnose(optimizer.opt_state, depth=2)

  assert list(jax.eval_shape(diagnose)) == ['layers/0', 'layers/1']


def test_errors():
  params = {'w': jnp.ones(2)}
  blind, tx = (
    sophia_optax.sophia(0.1),
    sophia_optax.sophia(0.1, diagnostics=True),
  )
  replicas = jax.vmap(lambda _: tx.init(params))(jnp.zeros(2))
  for state in (optax.adam(0.1).init(params), blind.init(params), replicas):
    with pytest.raises(ValueError, match=r'one replica, .* diagnostics=True'):
      sophia_optax.diagnose(state)
  with pytest.raises(KeyError):
    sophia_optax.diagnose(optax.chain(tx, tx).init(params))
  with pytest.raises(ValueError, match=r'depth must be .* got -1'):
    sophia_optax.diagnose(tx.init(params), depth=-1)
  found = jax.eval_shape(jax.vmap(sophia_optax.diagnose), replicas)
  assert found['w'].win_rate.shape == (2,)
