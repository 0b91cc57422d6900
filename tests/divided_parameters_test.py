"""Parameters that are divided over a different axis than the batch."""

import chex
from devices import ESTIMATORS
from devices import INPUTS
from devices import map_grid
from devices import ONES
from devices import predict
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

HUTCHINSON = ESTIMATORS['hutchinson']
BATCH = INPUTS.reshape(-1, 3)
PARAMS = {
  'w1': jnp.float32(np.random.default_rng(1).normal(size=(3, 4))),
  'w2': jnp.array([0.9, -0.4, 1.3, 0.2]),
  'b': jnp.array(0.2),
}
SPECS = {'w1': P(None, 'model'), 'w2': P('model'), 'b': P()}


def dense_predict(params, inputs, total=lambda x: x):  # inputs: (N, 3)
  hidden = jnp.tanh(inputs @ params['w1'])
  return total(hidden @ params['w2']) + params['b']


def tensor_parallel(params, inputs):  # Each device has some hidden units.
  return dense_predict(params, inputs, lambda x: jax.lax.psum(x, 'model'))


def gathered(params, inputs):  # FSDP: weights are gathered.
  gather = lambda x: jax.lax.all_gather(x, 'model', tiled=True)
  return predict(params | {'w': gather(params['w'])}, inputs)


# Model, the same on one device, parameters, their specs, axes of the batch.
LAYOUTS = {
  'tensor': (tensor_parallel, dense_predict, PARAMS, SPECS, 'data'),
  'fsdp': (
    gathered,
    predict,
    {'w': jnp.array([0.5, -1.0, 0.3, 0.8]), 'b': jnp.array(0.2)},
    {'w': P('model'), 'b': P()},
    ('data', 'model'),
  ),
}


@pytest.mark.parametrize(
  'layout', ['tensor', pytest.param('fsdp', marks=pytest.mark.slow)]
)
def test_divided_parameters_have_an_unbiased_estimate(layout):
  model, dense, params, specs, axes = LAYOUTS[layout]
  width = 3 if layout == 'tensor' else 4
  inputs = np.random.default_rng(5).normal(size=(32, width)).astype(np.float32)

  def update(params, inputs):
    def loss(params):
      mean = jnp.mean(model(params, inputs) ** 2) / 2
      return jax.lax.pmean(mean, 'model') if 'model' in axes else mean

    extra = {'obj_fn': loss, 'predict_fn': lambda p: model(p, inputs)}
    estimators = [
      make(num_samples=2000, axis_name='data') for make in ESTIMATORS.values()
    ]
    return [oracles.first(e, params, **extra) for e in estimators]

  hutchinson, gauss_newton = map_grid(
    update, params, inputs, specs=(specs, P(axes)), out_specs=[specs, specs]
  )
  loss = lambda p: jnp.mean(dense(p, inputs) ** 2) / 2
  hessian = oracles.hessian(loss, params)
  z, jacobian = oracles.outputs_and_jacobian(lambda p: dense(p, inputs), params)
  fisher = oracles.FISHER['gaussian'](z)
  for got, exact in [
    (hutchinson, np.diag(hessian)),
    (gauss_newton, oracles.gauss_newton(jacobian, fisher)),
  ]:
    vector = oracles.flat(jax.device_get(got))
    np.testing.assert_allclose(vector, exact, rtol=0.15, atol=0.03)


def test_parts_of_one_array_have_independent_probes():
  # The Hessian is all ones. With the same probe for all four parts, the
  # estimate would be 4 on average.
  estimator = HUTCHINSON(num_samples=2000, axis_name='data')
  got = map_grid(
    lambda x: oracles.first(
      estimator, x, obj_fn=lambda x: jax.lax.psum(jnp.sum(x), 'model') ** 2 / 2
    ),
    jnp.ones(8),
    specs=P('model'),
    out_specs=P('model'),
  )
  # 4,000 probes, each with variance 7.
  np.testing.assert_allclose(got, 1.0, atol=5 * (7 / 4000) ** 0.5)


@pytest.mark.parametrize(
  ('axes', 'axis_name', 'target'),
  [(('model',), 'data', None), (('data', 'model'), None, 0.3)],
)
def test_training_equals_one_device(axes, axis_name, target):
  # The Hessian is diagonal, so estimates are exact for any probe. A NaN in the
  # curvature of one device is counted on all.
  curvature = jnp.arange(1.0, 17.0).at[9].set(jnp.nan)
  start = jnp.linspace(-0.3, 0.5, 16)

  def train(total, axis_name, x, curvature):
    tx = sophia_optax.scale_by_sophia(
      b1=0.5,
      gamma=0.1,
      update_interval=1,
      target_win_rate=target,
      diagnostics=True,
      hessian_diagonal_fn=HUTCHINSON(axis_name=axis_name),
    )
    obj_fn = lambda x: total(jnp.sum(curvature * x**2))

    def step(carry, _):
      x, state = carry
      updates, state = tx.update(x, state, x, obj_fn=obj_fn)
      return (optax.apply_updates(x, -0.01 * updates), state), None

    (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=10)
    return (x, state.nu), (
      state.win_rate,
      state.gamma_factor,
      state.nonfinite_count,
      sophia_optax.diagnose(state),
    )

  got = map_grid(
    lambda *args: train(lambda x: jax.lax.psum(x, axes), axis_name, *args),
    start,
    curvature,
    specs=P(axes),
    out_specs=(P(axes), P()),
  )
  expected = jax.jit(lambda *args: train(lambda x: x, None, *args))(
    start, curvature
  )
  chex.assert_trees_all_close(
    jax.device_get(got), jax.device_get(expected), rtol=1e-5
  )
  win_rate, _, nonfinite_count, _ = got[1]
  assert nonfinite_count == 10
  assert 0 < win_rate < 1


def test_predictions_divided_over_two_axes():
  axes = ('data', 'model')
  estimator = ONES()
  x, inputs = jnp.zeros(16), jnp.arange(1.0, 17.0)
  got = map_grid(
    lambda x, inputs: oracles.first(
      estimator, x, predict_fn=lambda x: x * inputs
    ),
    x,
    inputs,
    specs=P(axes),
    out_specs=P(axes),
  )
  np.testing.assert_allclose(got, np.array(inputs) ** 2 / 16, rtol=1e-5)


def test_parts_of_masked_predictions_divided_over_two_axes():
  # Parts are weighted by the predictions that count on all devices.
  axes = ('data', 'model')
  estimator = sophia_optax.microbatched(ONES(), 2)

  def update(w, x, mask):
    return oracles.first(
      estimator, w, predict_fn=lambda w, x: w * x, batch=x, label_mask=mask
    )

  x = np.arange(1, 33, dtype=np.float32)
  args = np.float32(1), x, x % 5 > 1
  got = map_grid(update, *args, specs=(P(), P(axes), P(axes)), out_specs=P())
  # On each device, one example is in the first part and one in the second:
  # (Σ x)²/B of a part, weighted with its share of all B.
  parts = [np.where(x % 5 > 1, x, 0)[m::2].sum() for m in range(2)]
  expected = np.sum(np.square(parts)) / np.sum(x % 5 > 1)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_axis_of_one_device_divides_nothing():
  estimator = ESTIMATORS['gauss_newton'](axis_name='data')
  update = lambda params, inputs: oracles.first(
    estimator, params, predict_fn=lambda p: dense_predict(p, inputs)
  )

  def run(*axes):
    sizes = (8, 1)[: len(axes)]
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    mapped = jax.shard_map(
      update,
      mesh=jax.make_mesh(sizes, axes, axis_types=types),
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=False,
    )
    return jax.device_get(jax.jit(mapped)(PARAMS, BATCH))

  chex.assert_trees_all_close(run('data', 'model'), run('data'), rtol=1e-6)


@pytest.mark.parametrize(
  ('model', 'check_vma', 'match'),
  [
    (tensor_parallel, False, r"\['model'\].* check_vma=True"),
    # Derivatives with respect to b, which is replicated, would be sums.
    (dense_predict, True, r"the same along the axes \['model'\]"),
  ],
)
def test_errors(model, check_vma, match):
  estimator = HUTCHINSON(axis_name='data')
  with pytest.raises(ValueError, match=match):
    map_grid(
      lambda params, inputs: oracles.first(
        estimator, params, obj_fn=lambda p: jnp.mean(model(p, inputs) ** 2)
      ),
      PARAMS,
      BATCH,
      specs=(SPECS, P('data')),
      out_specs=SPECS,
      check_vma=check_vma,
    )
