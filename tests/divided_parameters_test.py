"""Parameters that are divided over a different axis than the batch."""

import functools

import chex
from devices import ESTIMATORS
from devices import INPUTS
from devices import map_grid
from devices import predict
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import sophia_optax

RNG = np.random.default_rng(1)
TP_PARAMS = {
  'w1': jnp.float32(RNG.normal(size=(3, 4))),
  'w2': jnp.float32(RNG.normal(size=4)),
  'b': jnp.array(0.2),
}
TP_SPECS = {'w1': P(None, 'model'), 'w2': P('model'), 'b': P()}


def dense_predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w1']) @ params['w2'] + params['b']


def tp_predict(params, inputs):  # Each device has some of the hidden units.
  hidden = jnp.tanh(inputs @ params['w1'])
  return jax.lax.psum(hidden @ params['w2'], 'model') + params['b']


@pytest.mark.parametrize(
  'name', [pytest.param('hutchinson', marks=pytest.mark.slow), 'gauss_newton']
)
def test_divided_parameters_have_an_unbiased_estimate(name):
  estimator = ESTIMATORS[name](num_samples=4000, axis_name='data')
  inputs = INPUTS.reshape(-1, 3)

  def update(params, inputs):
    return estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=lambda p: jnp.mean(tp_predict(p, inputs) ** 2) / 2,
      predict_fn=lambda p: tp_predict(p, inputs),
    )[0]

  got = map_grid(
    update, TP_PARAMS, inputs, specs=(TP_SPECS, P('data')), out_specs=TP_SPECS
  )
  flat, unravel = jax.flatten_util.ravel_pytree(TP_PARAMS)
  if name == 'hutchinson':
    loss = lambda x: jnp.mean(dense_predict(unravel(x), inputs) ** 2) / 2
    exact = jnp.diag(jax.jit(jax.hessian(loss))(flat))
  else:
    outputs = lambda x: dense_predict(unravel(x), inputs)
    jacobian = jax.jit(jax.jacobian(outputs))(flat)
    exact = jnp.mean(jacobian**2, axis=0)
  chex.assert_trees_all_close(
    jax.flatten_util.ravel_pytree(got)[0], exact, rtol=0.1, atol=0.02
  )


def test_parts_of_one_array_have_independent_probes():
  # The Hessian is all ones. With the same probe for all four parts, the
  # estimate would be 4 on average.
  estimator = ESTIMATORS['hutchinson'](num_samples=2000, axis_name='data')

  def update(x):
    return estimator.update(
      None,
      estimator.init(x),
      x,
      obj_fn=lambda x: jax.lax.psum(jnp.sum(x), 'model') ** 2 / 2,
    )[0]

  got = map_grid(update, jnp.ones(8), specs=P('model'), out_specs=P('model'))
  # 4,000 probes, each with variance 7.
  np.testing.assert_allclose(got, 1.0, atol=5 * (7 / 4000) ** 0.5)


@pytest.mark.slow
def test_batch_divided_over_the_axis_of_the_parameters():
  # FSDP: weights are gathered, and the loss is averaged over their axis.
  def gather(params):
    return params | {'w': jax.lax.all_gather(params['w'], 'model', tiled=True)}

  params = {'w': jnp.array([0.5, -1.0, 0.3, 0.8]), 'b': jnp.array(0.2)}
  specs = {'w': P('model'), 'b': P()}
  inputs = jax.random.normal(jax.random.PRNGKey(5), (32, 4))
  estimators = [
    ESTIMATORS['hutchinson'](num_samples=4000, axis_name='data'),
    ESTIMATORS['gauss_newton'](num_samples=4000, axis_name='data'),
  ]

  def update(params, inputs):
    def loss(params):
      local = jnp.mean(predict(gather(params), inputs) ** 2) / 2
      return jax.lax.pmean(local, 'model')

    extra = {'obj_fn': loss, 'predict_fn': lambda p: predict(gather(p), inputs)}
    return [
      e.update(None, e.init(params), params, **extra)[0] for e in estimators
    ]

  hutchinson, gauss_newton = map_grid(
    update,
    params,
    inputs,
    specs=(specs, P(('data', 'model'))),
    out_specs=[specs, specs],
  )
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  model = lambda x: predict(unravel(x), inputs)
  loss = lambda x: jnp.mean(model(x) ** 2) / 2
  hessian = jax.jit(jax.hessian(loss))(flat)
  exact = {
    'hutchinson': jnp.diag(hessian),
    'gauss_newton': jnp.mean(jax.jit(jax.jacobian(model))(flat) ** 2, axis=0),
  }
  got = {
    'hutchinson': jax.flatten_util.ravel_pytree(hutchinson)[0],
    'gauss_newton': jax.flatten_util.ravel_pytree(gauss_newton)[0],
  }
  chex.assert_trees_all_close(got, exact, rtol=0.1, atol=0.02)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_divided_parameters_need_check_vma(name):
  estimator = ESTIMATORS[name](axis_name='data')

  def update(params, inputs):
    return estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=lambda p: jnp.mean(tp_predict(p, inputs) ** 2),
      predict_fn=lambda p: tp_predict(p, inputs),
    )[0]

  with pytest.raises(ValueError, match=r"\['model'\].* check_vma=True"):
    map_grid(
      update,
      TP_PARAMS,
      INPUTS.reshape(-1, 3),
      specs=(TP_SPECS, P('data')),
      out_specs=TP_SPECS,
      check_vma=False,
    )


def test_loss_that_differs_along_the_axis_of_the_parameters():
  # Derivatives with respect to b, which is replicated, would be sums.
  estimator = ESTIMATORS['hutchinson'](axis_name='data')
  update = lambda params: estimator.update(
    None,
    estimator.init(params),
    params,
    obj_fn=lambda p: jnp.sum(p['w'] ** 2) + p['b'] ** 2,
  )[0]
  specs = {'w': P('model'), 'b': P()}
  with pytest.raises(ValueError, match=r"the same along the axes \['model'\]"):
    map_grid(
      update,
      {'w': jnp.ones(4), 'b': jnp.array(1.0)},
      specs=(specs,),
      out_specs=specs,
    )


@pytest.mark.parametrize('name', ESTIMATORS)
def test_axis_of_one_device_divides_nothing(name):
  estimator = ESTIMATORS[name](axis_name='data')

  def update(params, inputs):
    return estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=lambda p: jnp.mean(dense_predict(p, inputs) ** 2),
      predict_fn=lambda p: dense_predict(p, inputs),
    )[0]

  def run(shape, axes):
    mesh = jax.make_mesh(
      shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    return jax.jit(
      jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(P(), P('data')),
        out_specs=P(),
        check_vma=False,
      )
    )(TP_PARAMS, INPUTS.reshape(-1, 3))

  chex.assert_trees_all_close(
    run((8, 1), ('data', 'model')), run((8,), ('data',)), rtol=1e-6
  )


@pytest.mark.parametrize('poisoned', [False, True])
def test_training_divided_parameters_equals_one_device(poisoned):
  # The Hessian is diagonal, so estimates are exact for any probe. A NaN in the
  # curvature of one device is counted on all.
  curvature = jnp.arange(1.0, 9.0).at[6].set(jnp.nan if poisoned else 7.0)
  tx = sophia_optax.sophia(
    0.01,
    update_interval=1,
    gamma=0.1,
    b1=0.5,
    hessian_diagonal_fn=(ESTIMATORS['hutchinson'](axis_name='data')),
  )
  alone = sophia_optax.sophia(0.01, update_interval=1, gamma=0.1, b1=0.5)
  start = jnp.linspace(-0.3, 0.5, 8)

  def train(tx, x, curvature, obj_fn):
    def step(carry, _):
      x, state = carry
      updates, state = tx.update(x, state, x, obj_fn=obj_fn(curvature))
      return (optax.apply_updates(x, updates), state), None

    (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=10)
    state = state[0]
    return x, state.nu, state.win_rate, state.nonfinite_count

  got = map_grid(
    lambda x, c: train(
      tx, x, c, lambda c: lambda x: jax.lax.psum(jnp.sum(c * x**2), 'model')
    ),
    start,
    curvature,
    specs=(P('model'), P('model')),
    out_specs=(P('model'), P('model'), P(), P()),
  )
  expected = train(
    alone, start, curvature, lambda c: lambda x: jnp.sum(c * x**2)
  )
  chex.assert_trees_all_close(got, expected, rtol=1e-5)
  assert got[3] == (10 if poisoned else 0)
  assert 0 < got[2] < 1


@pytest.mark.parametrize(
  'target', [pytest.param(None, marks=pytest.mark.slow), 0.3]
)
def test_parameters_divided_over_two_axes(target):
  # Sums over shards must be over both.
  axes = ('data', 'model')
  curvature = jnp.arange(1.0, 17.0).at[9].set(jnp.nan)
  start = jnp.linspace(-0.3, 0.5, 16)
  tx = sophia_optax.scale_by_sophia(
    b1=0.5,
    gamma=0.1,
    update_interval=1,
    target_win_rate=target,
    diagnostics=True,
  )

  def train(total, x, curvature):
    obj_fn = lambda x: total(jnp.sum(curvature * x**2))
    step = lambda state, _: (tx.update(x, state, x, obj_fn=obj_fn)[1], None)
    state, _ = jax.lax.scan(step, tx.init(x), length=5)
    return (
      state.win_rate,
      state.negative_fraction,
      state.nonfinite_count,
      state.gamma_factor,
      sophia_optax.diagnose(state),
    )

  got = map_grid(
    functools.partial(train, lambda loss: jax.lax.psum(loss, axes)),
    start,
    curvature,
    specs=(P(axes), P(axes)),
    out_specs=P(),
  )
  expected = train(lambda loss: loss, start, curvature)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)
  assert got[2] == 5
  assert 0 < got[0] < 1


def test_predictions_divided_over_two_axes():
  axes = ('data', 'model')
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, means: jnp.ones_like(means)
  )

  def update(x, inputs):
    return estimator.update(
      None, estimator.init(x), x, predict_fn=lambda x: x * inputs
    )[0]

  x, inputs = jnp.zeros(16), jnp.arange(1.0, 17.0)
  got = map_grid(update, x, inputs, specs=(P(axes), P(axes)), out_specs=P(axes))
  np.testing.assert_allclose(got, update(x, inputs), rtol=1e-5)
  np.testing.assert_allclose(got, 16 * (inputs / 16) ** 2, rtol=1e-5)


def test_parts_of_masked_predictions_divided_over_two_axes():
  # Parts are weighted by the predictions that count on all devices.
  axes = ('data', 'model')
  estimator = sophia_optax.microbatched(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
      likelihood=lambda key, means: jnp.ones_like(means)
    ),
    2,
  )

  def update(w, x, mask):
    return estimator.update(
      None,
      estimator.init(w),
      w,
      predict_fn=lambda w, x: w * x,
      batch=x,
      label_mask=mask,
    )[0]

  args = jnp.float32(1), jnp.arange(1.0, 33.0), jnp.arange(32) % 5 > 1
  got = map_grid(update, *args, specs=(P(), P(axes), P(axes)), out_specs=P())
  np.testing.assert_allclose(got, update(*args), rtol=1e-5)
