"""Estimates that are averaged over devices, against the dense Hessian."""

import functools
import re

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec
INPUTS = jax.random.normal(jax.random.PRNGKey(0), (8, 4, 3))
PARAMS = {'w': jnp.array([0.5, -1.0, 0.3]), 'b': jnp.array(0.2)}


def predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w'] + params['b'])


def loss_fn(params, inputs):
  return jnp.mean(predict(params, inputs) ** 2)


def mesh():
  return jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


def pmapped(fn):
  """Maps fn(replicated, shard); returns what each device has."""
  mapped = jax.pmap(fn, axis_name='data', in_axes=(None, 0))
  return lambda replicated: mapped(replicated, INPUTS)


def shard_mapped(fn, check_vma):
  # The output is declared replicated: with check_vma it is proven to be.
  mapped = jax.jit(
    jax.shard_map(
      lambda replicated, shard: fn(replicated, shard[0]),
      mesh=mesh(),
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=check_vma,
    )
  )

  def run(replicated):
    every_device = lambda x: jnp.stack(
      [jnp.asarray(np.array(s.data)) for s in x.addressable_shards]
    )
    return jax.tree.map(every_device, mapped(replicated, INPUTS))

  return run


MAPS = {
  'pmap': pmapped,
  'shard_map': functools.partial(shard_mapped, check_vma=True),
  'shard_map_unchecked': functools.partial(shard_mapped, check_vma=False),
}
ESTIMATORS = {
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian,
  'gauss_newton': functools.partial(
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
    likelihood='gaussian',
  ),
}


def extra_args(shard):
  return {
    'obj_fn': lambda p: loss_fn(p, shard),
    'predict_fn': lambda p: predict(p, shard),
  }


def one_draw(name, key, params, shard):
  """One estimate, written out: a probe, or the labels of a Gaussian."""
  if name == 'hutchinson':
    loss = lambda p: loss_fn(p, shard)
    probe = optax.tree.random_like(key, params, jax.random.rademacher)
    _, hvp = jax.jvp(jax.grad(loss), (params,), (probe,))
    return optax.tree.mul(probe, hvp)
  means, vjp = jax.vjp(lambda p: predict(p, shard), params)
  labels = means + jax.random.normal(key, means.shape)
  (grads,) = vjp((means - labels) / len(means))  # Of the mean of the losses.
  return jax.tree.map(lambda g: len(means) * g**2, grads)


@pytest.mark.parametrize('num_samples', [1, 3])
@pytest.mark.parametrize('map_name', MAPS)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_is_the_mean_of_the_replicas_estimates(name, map_name, num_samples):
  estimator = ESTIMATORS[name](axis_name='data', num_samples=num_samples)
  state = estimator.init(PARAMS)

  def update(state, shard):
    return estimator.update(None, state, PARAMS, **extra_args(shard))

  every_estimate, every_state = MAPS[map_name](update)(state)

  key, subkey = jax.random.split(state.key)
  draws = []
  for device in range(8):
    keys = [jax.random.fold_in(subkey, device)]
    if num_samples > 1:
      keys = jax.random.split(keys[0], num_samples)
    draws += [one_draw(name, k, PARAMS, INPUTS[device]) for k in keys]
  expected = jax.tree.map(lambda *x: sum(x) / len(draws), *draws)
  for device in range(8):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x, d=device: x[d], every_estimate),
      jax.tree.map(lambda x: x[0], every_estimate),
    )
    np.testing.assert_array_equal(every_state.key[device], key)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], every_estimate),
    expected,
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('name', ESTIMATORS)
def test_several_axes(name, check_vma):
  estimator = ESTIMATORS[name](axis_name=('data', 'model'))
  state = estimator.init(PARAMS)
  got = map_grid(
    lambda state, shard: estimator.update(
      None, state, PARAMS, **extra_args(shard[0])
    )[0],
    state,
    INPUTS,
    specs=(P(), P(('data', 'model'))),
    out_specs=P(),
    check_vma=check_vma,
  )
  _, subkey = jax.random.split(state.key)
  draws = []
  for row in range(2):
    for column in range(4):
      key = jax.random.fold_in(jax.random.fold_in(subkey, row), column)
      draws.append(one_draw(name, key, PARAMS, INPUTS[4 * row + column]))
  expected = jax.tree.map(lambda *x: sum(x) / 8, *draws)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('map_name', MAPS)
def test_mean_is_the_dense_diagonal(map_name):
  # The diagonal Hessian of this loss makes each Rademacher estimate exact, so a
  # factor of the number of devices could not hide in the noise.
  def update(params, shard):
    scale = jnp.mean(shard)
    estimator = sophia_optax.hutchinson_estimator_diag_hessian(axis_name='data')
    return estimator.update(
      None,
      estimator.init(params),
      params,
      obj_fn=lambda p: scale * (jnp.sum(p['w'] ** 3) + p['b'] ** 2),
    )[0]

  estimates = MAPS[map_name](update)(PARAMS)
  scale = jnp.mean(INPUTS)
  expected = {'w': 6 * PARAMS['w'] * scale, 'b': 2 * scale}
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], estimates), expected, rtol=1e-4
    )


def by_hand(name):
  """Averages on one device what eight draw, with the keys that they have."""

  def update(grads, key, params=None):
    del grads
    key, subkey = jax.random.split(key)
    draws = [
      one_draw(name, jax.random.fold_in(subkey, d), params, INPUTS[d])
      for d in range(8)
    ]
    return jax.tree.map(lambda *x: sum(x) / 8, *draws), key

  return optax.GradientTransformation(
    lambda params: jax.random.PRNGKey(3), update
  )


def train(estimator, params, grad_fn, **extra):
  tx = sophia_optax.sophia(
    0.01, update_interval=2, gamma=0.5, hessian_diagonal_fn=estimator
  )

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad_fn(params), state, params, **extra)
    win_rate = state[0].win_rate
    return (optax.apply_updates(params, updates), state), win_rate

  carry = (params, tx.init(params))
  (params, state), win_rates = jax.lax.scan(step, carry, length=200)
  return {
    'params': params,
    'mu': state[0].mu,
    'nu': state[0].nu,
    'key': jax.tree.leaves(state[0].hessian_fn_state),
    'win_rates': win_rates,
  }


@pytest.mark.parametrize('map_name', MAPS)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_replicas_stay_equal(name, map_name):
  estimator = ESTIMATORS[name](jax.random.PRNGKey(3), axis_name='data')

  def train_replica(params, shard):
    def grad_fn(params):
      params = jax.lax.pcast(params, 'data', to='varying')
      return jax.lax.pmean(jax.grad(loss_fn)(params, shard), 'data')

    return train(estimator, params, grad_fn, **extra_args(shard))

  got = MAPS[map_name](train_replica)(PARAMS)
  for leaf in jax.tree.leaves(got):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))

  grad_fn = jax.grad(lambda p: loss_fn(p, INPUTS.reshape(-1, 3)))
  expected = jax.jit(lambda p: train(by_hand(name), p, grad_fn))(PARAMS)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), expected, rtol=1e-4, atol=1e-5
  )
  # Neither sign updates nor Newton steps all the time.
  assert 0.1 < jnp.mean(expected['win_rates']) < 0.9


@pytest.mark.parametrize('name', ESTIMATORS)
def test_axis_that_is_not_there(name):
  estimator = ESTIMATORS[name](axis_name='batch')
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  with pytest.raises(ValueError, match=r"got 'batch'; .* here are \(\)"):
    update(PARAMS, INPUTS[0])
  with pytest.raises(ValueError, match=r"got 'batch'; .* are \('data',\)"):
    MAPS['shard_map'](update)(PARAMS)


def test_loss_that_was_averaged_already():
  estimator = ESTIMATORS['hutchinson'](axis_name='data')
  update = lambda params, shard: estimator.update(
    None,
    estimator.init(params),
    params,
    obj_fn=lambda p: jax.lax.pmean(loss_fn(p, shard), 'data'),
  )[0]
  with pytest.raises(ValueError, match=r"the same on all of \['data'\]"):
    MAPS['shard_map'](update)(PARAMS)


def test_axis_name_that_was_forgotten():
  estimator = ESTIMATORS['hutchinson']()
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  with pytest.raises(ValueError, match=r"\['data'\], .* Pass .* axis_name"):
    MAPS['shard_map'](update)(PARAMS)


def test_predictions_of_all_replicas_are_one_estimate_without_axis_name():
  # With check_vma derivatives are sums over the replicas: B is of all of them.
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, means: jnp.ones_like(means)
  )
  update = lambda params, shard: estimator.update(
    None, estimator.init(params), params, **extra_args(shard)
  )[0]
  alone = update(PARAMS, INPUTS.reshape(-1, 3))
  got = MAPS['shard_map'](update)(PARAMS)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], got), alone, rtol=1e-5
  )


# What is sent.


def collectives(text):
  """The collectives of a compiled program, by the computation they are in."""
  found = {}
  for computation in re.split(r'\n(?=%|ENTRY)', text):
    name = computation.split(' ', 1)[0]
    ops = re.findall(
      r'= .* (all-reduce|all-gather|reduce-scatter|all-to-all'
      r'|collective-permute)(?:-start)?\(',
      computation,
    )
    if ops:
      found[name] = ops
  return found


def compiled(update, *args, in_specs):
  mapped = jax.jit(
    jax.shard_map(update, mesh=mesh(), in_specs=in_specs, out_specs=P())
  )
  return mapped.lower(*args).compile().as_text()


@pytest.mark.parametrize('name', ESTIMATORS)
def test_one_all_reduce_in_a_refresh_and_none_in_other_steps(name):
  estimator = sophia_optax.microbatched(
    ESTIMATORS[name](axis_name='data', num_samples=3), 2
  )
  tx = sophia_optax.sophia(0.01, hessian_diagonal_fn=estimator)
  state = tx.init(PARAMS)

  def update(params, state, shard):  # Gradients are given: they need their own.
    return tx.update(
      params,
      state,
      params,
      obj_fn=loss_fn,
      predict_fn=predict,
      batch=shard[0],
    )

  text = compiled(update, PARAMS, state, INPUTS, in_specs=(P(), P(), P('data')))
  found = collectives(text)
  assert list(found.values()) == [['all-reduce']]
  # In a branch of the conditional, so not in the loop over the parts.
  (branches,) = re.findall(r'conditional\(.*branch_computations={(.*?)}', text)
  assert set(found) < set(branches.split(', '))


@pytest.mark.parametrize('map_name', MAPS)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_microbatches_of_replicas(name, map_name):
  num_microbatches = 2
  estimator = sophia_optax.microbatched(
    ESTIMATORS[name](jax.random.PRNGKey(3), axis_name='data'),
    num_microbatches,
  )
  update = lambda params, shard: estimator.update(
    None,
    estimator.init(params),
    params,
    obj_fn=loss_fn,
    predict_fn=predict,
    batch=shard,
  )
  got, state = MAPS[map_name](update)(PARAMS)

  key, draws = jax.random.PRNGKey(3), []
  for part in range(num_microbatches):
    key, subkey = jax.random.split(key)
    draws += [
      one_draw(
        name,
        jax.random.fold_in(subkey, d),
        PARAMS,
        INPUTS[d, part::num_microbatches],
      )
      for d in range(8)
    ]
  expected = jax.tree.map(lambda *x: sum(x) / len(draws), *draws)
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], got),
      expected,
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_array_equal(state.key[device], key)


# An estimator of one's own, averaged.


def own_estimator(cast, shard):
  """The diagonal of a loss whose Hessian is diagonal."""

  def update(grads, state, params=None):
    del grads
    params = cast(params)
    ones = optax.tree.ones_like(params)
    scale = jnp.mean(shard)
    loss = lambda p: scale * (jnp.sum(p['w'] ** 3) + p['b'] ** 2)
    return jax.jvp(jax.grad(loss), (params,), (ones,))[1], state

  return optax.GradientTransformation(lambda p: optax.EmptyState(), update)


def own(params):
  return jax.lax.pcast(params, 'data', to='varying')


@pytest.mark.parametrize('map_name', MAPS)
def test_average_over_replicas(map_name):
  def update(params, shard):
    estimator = optax.chain(
      own_estimator(own, shard), sophia_optax.average_over_replicas('data')
    )
    return estimator.update(params, estimator.init(params), params)[0]

  got = MAPS[map_name](update)(PARAMS)
  scale = jnp.mean(INPUTS)
  expected = {'w': 6 * PARAMS['w'] * scale, 'b': 2 * scale}
  for device in range(8):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, d=device: x[d], got), expected, rtol=1e-4
    )


def test_average_over_replicas_of_a_sum_over_replicas():
  def update(params, shard):
    estimator = optax.chain(
      own_estimator(lambda p: p, shard),
      sophia_optax.average_over_replicas('data'),
    )
    return estimator.update(params, estimator.init(params), params)[0]

  with pytest.raises(ValueError, match=r'pcast\(params, .data., to="varying"'):
    MAPS['shard_map'](update)(PARAMS)


def test_average_over_an_axis_that_is_not_there():
  average = sophia_optax.average_over_replicas('batch')
  with pytest.raises(ValueError, match=r"got 'batch'; .* here are \(\)"):
    average.update(PARAMS, average.init(PARAMS))


def test_estimate_that_was_not_averaged():
  def update(params, shard):
    tx = sophia_optax.sophia(
      0.01, hessian_diagonal_fn=own_estimator(own, shard)
    )
    return tx.update(params, tx.init(params), params)[0]

  with pytest.raises(ValueError, match=r"differs along \['data'\]"):
    MAPS['shard_map'](update)(PARAMS)


# Parameters that are themselves divided, over another axis than the data.


TP_PARAMS = {
  'w1': jax.random.normal(jax.random.PRNGKey(1), (3, 4)),
  'w2': jax.random.normal(jax.random.PRNGKey(2), (4,)),
  'b': jnp.array(0.2),
}
TP_SPECS = {'w1': P(None, 'model'), 'w2': P('model'), 'b': P()}


def dense_predict(params, inputs):  # inputs: (N, 3)
  return jnp.tanh(inputs @ params['w1']) @ params['w2'] + params['b']


def tp_predict(params, inputs):  # Each device has some of the hidden units.
  hidden = jnp.tanh(inputs @ params['w1'])
  return jax.lax.psum(hidden @ params['w2'], 'model') + params['b']


def grid():
  return jax.make_mesh(
    (2, 4),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def map_grid(fn, *args, specs, out_specs, check_vma=True):
  return jax.jit(
    jax.shard_map(
      fn,
      mesh=grid(),
      in_specs=specs,
      out_specs=out_specs,
      check_vma=check_vma,
    )
  )(*args)


@pytest.mark.parametrize('name', ESTIMATORS)
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
    update,
    TP_PARAMS,
    inputs,
    specs=(TP_SPECS, P('data')),
    out_specs=TP_SPECS,
  )
  flat, unravel = jax.flatten_util.ravel_pytree(TP_PARAMS)
  if name == 'hutchinson':
    loss = lambda x: jnp.mean(dense_predict(unravel(x), inputs) ** 2) / 2
    exact = jnp.diag(jax.hessian(loss)(flat))
  else:
    jacobian = jax.jacobian(lambda x: dense_predict(unravel(x), inputs))(flat)
    exact = jnp.mean(jacobian**2, axis=0)
  chex.assert_trees_all_close(
    jax.flatten_util.ravel_pytree(got)[0], exact, rtol=0.1, atol=0.02
  )


def test_parts_of_one_array_have_probes_of_their_own():
  # The Hessian is all ones. With one probe for all four parts, which is what
  # this is about, the estimate would be 4 on average.
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


def test_batch_divided_over_the_axis_of_the_parameters():
  # FSDP: weights are gathered to be used, the loss is averaged over their axis.
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

    extra = {
      'obj_fn': loss,
      'predict_fn': lambda p: predict(gather(p), inputs),
    }
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
  hessian = jax.hessian(lambda x: jnp.mean(model(x) ** 2) / 2)(flat)
  exact = {
    'hutchinson': jnp.diag(hessian),
    'gauss_newton': jnp.mean(jax.jacobian(model)(flat) ** 2, axis=0),
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


@pytest.mark.parametrize('poisoned', [False, True])
def test_training_divided_parameters_equals_one_device(poisoned):
  # Diagonal Hessian, so the probes do not matter and all is exact. One NaN in
  # the curvature, on one device, counts everywhere.
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
      tx,
      x,
      c,
      lambda c: lambda x: jax.lax.psum(jnp.sum(c * x**2), 'model'),
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
