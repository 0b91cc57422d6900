"""jit with sharded arrays and no axis name gives the results of one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec
AxisType = jax.sharding.AxisType
AXIS_TYPES = {
  'auto': (AxisType.Auto, AxisType.Auto),
  'explicit': (AxisType.Explicit, AxisType.Explicit),
}
# (w1, w2, batch, hidden, outputs). An explicit mesh needs the last two if a
# product sums over a divided axis.
LAYOUTS = {
  'data': (P(), P(), P(('data', 'model')), P(('data', 'model')), None),
  'fsdp': (
    P('model'),
    P('model'),
    P(('data', 'model')),
    P(('data', 'model')),
    P(('data', 'model')),
  ),
  'tensor': (
    P(None, 'model'),
    P('model'),
    P('data'),
    P('data', 'model'),
    P('data'),
  ),
  'vocabulary': (
    P(),
    P(None, 'model'),
    P('data'),
    P('data'),
    P('data', 'model'),
  ),
}
NUM_CLASSES = 12
KEYS = {'typed': jax.random.key, 'raw': jax.random.PRNGKey}
RNG = np.random.default_rng(0)
PARAMS = {
  'w1': jnp.float32(RNG.normal(0, 1 / 4, (16, 32))),
  'w2': jnp.float32(RNG.normal(0, 1 / 6, (32, NUM_CLASSES))),
}
BATCH = {
  'x': jnp.float32(RNG.normal(size=(64, 16))),
  'y': jnp.int32(RNG.integers(0, NUM_CLASSES, 64)),
}
ESTIMATORS = {
  'hutchinson': sophia_optax.hutchinson_estimator_diag_hessian,
  'gauss_newton': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}


mostly_auto = pytest.mark.parametrize(
  'axis_types', ['auto', pytest.param('explicit', marks=pytest.mark.slow)]
)


def make_mesh(axis_types):
  return jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=AXIS_TYPES[axis_types]
  )


def place(tree, specs, mesh):
  return jax.tree.map(
    lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s)),
    tree,
    specs,
  )


def train(estimator, params, batch, matmuls=(jnp.matmul, jnp.matmul)):
  """Takes three steps; returns initial and final parameters and states."""
  tx = sophia_optax.sophia(
    0.01, update_interval=2, hessian_diagonal_fn=estimator
  )

  def predict_fn(params, batch):  # (B, 12)
    hidden = jnp.tanh(matmuls[0](batch['x'], params['w1']))
    return matmuls[1](hidden, params['w2'])

  def obj_fn(params, batch):
    logits = predict_fn(params, batch)
    labels = jax.nn.one_hot(batch['y'], NUM_CLASSES)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return jnp.mean(log_normalizer - jnp.sum(logits * labels, axis=-1))

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(obj_fn)(params, batch)
    updates, state = tx.update(
      grads, state, params, obj_fn=obj_fn, predict_fn=predict_fn, batch=batch
    )
    return optax.apply_updates(params, updates), state

  before = (params, tx.init(params))
  after = before
  for _ in range(3):
    after = step(*after, batch)
  return before, after


def make_estimator(name, key_type, num_microbatches):
  estimator = ESTIMATORS[name](KEYS[key_type](0))
  if num_microbatches > 1:
    estimator = sophia_optax.microbatched(estimator, num_microbatches)
  return estimator


@functools.cache
def one_device(*arguments):
  return train(make_estimator(*arguments), PARAMS, BATCH)[1]


def comparable(tree):
  """Returns key data for typed keys, which can't be subtracted."""
  return jax.tree.map(
    lambda x: (
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    ),
    tree,
  )


@pytest.mark.usefixtures('compile_fast')
@pytest.mark.parametrize('axis_types', AXIS_TYPES)
@pytest.mark.parametrize(
  ('layout', 'estimator'),
  [
    ('fsdp', ('gauss_newton', 'raw', 1)),
    ('tensor', ('hutchinson', 'typed', 2)),
    ('vocabulary', ('gauss_newton', 'raw', 1)),
    *(
      pytest.param(*combination, marks=pytest.mark.slow)
      for combination in [
        ('data', ('hutchinson', 'raw', 1)),
        ('data', ('gauss_newton', 'typed', 2)),
        ('fsdp', ('hutchinson', 'typed', 2)),
        ('tensor', ('gauss_newton', 'typed', 2)),
      ]
    ),
  ],
)
def test_equals_one_device(layout, estimator, axis_types):
  w1, w2, rows, hidden, outputs = LAYOUTS[layout]
  mesh = make_mesh(axis_types)
  with jax.set_mesh(mesh):
    matmuls = [
      functools.partial(jnp.matmul, out_sharding=spec)
      for spec in (hidden, outputs)
    ]
    before, after = train(
      make_estimator(*estimator),
      place(PARAMS, {'w1': w1, 'w2': w2}, mesh),
      place(BATCH, {'x': rows, 'y': rows}, mesh),
      matmuls if axis_types == 'explicit' else (jnp.matmul, jnp.matmul),
    )
  # Moments are sharded like the parameters.
  params, (state, *_) = before
  for tree in (state.mu, state.nu):
    for x, p in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
      assert x.sharding.is_equivalent_to(p.sharding, x.ndim)
  for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    assert jax.typeof(old) == jax.typeof(new)
    assert old.sharding.is_equivalent_to(new.sharding, old.ndim)

  chex.assert_trees_all_close(
    comparable(jax.device_get(after)),
    comparable(jax.device_get(one_device(*estimator))),
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.usefixtures('compile_fast')
@mostly_auto
@pytest.mark.parametrize(
  'layout',
  [
    pytest.param('data', marks=pytest.mark.slow),
    pytest.param('fsdp', marks=pytest.mark.slow),
    'tensor',
    'vocabulary',
  ],
)
@pytest.mark.parametrize(
  'shape', [(64, 16), pytest.param((8, 8, 16), marks=pytest.mark.slow)]
)
def test_outputs_in_chunks_equal_one_device(shape, layout, axis_types):
  w1, w2, rows, hidden, outputs = LAYOUTS[layout]
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    num_chunks=2
  )
  inputs = BATCH['x'].reshape(shape)

  def update(params, inputs, matmuls=(jnp.matmul, jnp.matmul)):
    return estimator.update(
      None,
      estimator.init(params),
      params,
      predict_fn=lambda p, x: jnp.tanh(matmuls[0](x, p['w1'])),
      head_fn=lambda p, hidden: matmuls[1](hidden, p['w2']),
      batch=inputs,
    )[0]

  def spread(spec):  # Over the first and the last axis.
    first, *last = spec or (None,)
    return P(first, *[None] * (len(shape) - 1 - len(last)), *last)

  mesh = make_mesh(axis_types)
  with jax.set_mesh(mesh):
    matmuls = [
      functools.partial(jnp.matmul, out_sharding=spread(spec))
      for spec in (hidden, outputs or rows)
    ]
    estimate = jax.jit(
      functools.partial(update, matmuls=matmuls)
      if axis_types == 'explicit'
      else update
    )(
      place(PARAMS, {'w1': w1, 'w2': w2}, mesh),
      place(inputs, spread(rows), mesh),
    )
  chex.assert_trees_all_close(
    jax.device_get(estimate), update(PARAMS, inputs), rtol=1e-4, atol=1e-6
  )


SHAPE = (48, 80)


@pytest.mark.parametrize('axis_types', AXIS_TYPES)
@pytest.mark.parametrize(
  'num_samples', [1, pytest.param(2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  'distribution', ['rademacher', pytest.param('normal', marks=pytest.mark.slow)]
)
def test_no_probe_of_full_size(distribution, num_samples, axis_types):
  """A loss that needs no array of full size finds none in the program."""
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(
    distribution=distribution, num_samples=num_samples
  )

  def program(spec):
    mesh = make_mesh(axis_types)
    with jax.set_mesh(mesh):
      sharding = jax.sharding.NamedSharding(mesh, spec)
      w = jax.device_put(jnp.ones(SHAPE), sharding)
      update = lambda state, w: estimator.update(
        None, state, w, obj_fn=lambda w: jnp.sum(w**2) ** 2
      )[0]
      return (
        jax.jit(update, out_shardings=sharding)
        .lower(estimator.init(w), w)
        .compile()
        .as_text()
      )

  def full_size(text):
    return re.findall(r'\[48,80\]|\[3840\]|\[1920\]', text)

  assert full_size(program(P()))  # Replicated: it has them.
  assert not full_size(program(P(None, 'model')))
  assert not full_size(program(P('data', 'model')))


@mostly_auto
def test_no_logits_of_full_size(axis_types):
  """Labels are drawn without gathering logits that are divided by class."""
  estimator = make_estimator('gauss_newton', 'raw', 1)
  mesh = make_mesh(axis_types)
  num_classes = 4000
  with jax.set_mesh(mesh):
    sharding = jax.sharding.NamedSharding(mesh, P('data', 'model'))
    logits = jax.device_put(jnp.ones((6, num_classes)), sharding)
    update = lambda state, w: estimator.update(
      None, state, w, predict_fn=lambda w: w
    )[0]
    text = (
      jax.jit(update, out_shardings=sharding)
      .lower(estimator.init(logits), logits)
      .compile()
      .as_text()
    )
  assert re.findall(r'f32\[3,1000\]', text)  # The shard of one device.
  assert not re.findall(r'\[[36],4000\]|\[6,1000\]', text)


@mostly_auto
@pytest.mark.parametrize(
  ('rows', 'classes', 'here'),
  [(P(('data', 'model')), P(), '2,4000'), (P('data'), P('model'), '8,1000')],
)
def test_every_device_has_a_part_of_each_chunk(rows, classes, here, axis_types):
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    num_chunks=4
  )
  mesh = make_mesh(axis_types)
  weights = P(None, *classes)

  def head_fn(w, hidden):
    if axis_types == 'auto':
      return hidden @ w
    return jnp.matmul(hidden, w, out_sharding=P(*rows, *classes))

  with jax.set_mesh(mesh):
    w = place(jnp.ones((5, 4000)), weights, mesh)
    hidden = place(jnp.ones((64, 5)), rows, mesh)
    update = lambda state, w, hidden: estimator.update(
      None, state, w, predict_fn=lambda w: hidden, head_fn=head_fn
    )[0]
    text = (
      jax.jit(update, out_shardings=jax.sharding.NamedSharding(mesh, weights))
      .lower(estimator.init(w), w, hidden)
      .compile()
      .as_text()
    )
  sizes = set(re.findall(r'\[(\d+,(?:1000|4000))\]', text))
  assert sizes == {here, f'5,{here.split(",")[1]}'}  # Logits and weights.


def test_sampler_without_a_sharding():
  # Regression: a mesh with explicit axes passed out_sharding to the sampler.
  def make_draw(theta, loss, *, random_like, **extra_args):
    del loss, extra_args
    return lambda key: random_like(
      key, theta, lambda key, shape, dtype: jax.random.normal(key, shape, dtype)
    )

  estimator = sophia_optax.sampled_estimator(make_draw)
  w = jnp.ones((8, 4))
  update = lambda w: estimator.update(
    None, estimator.init(w), w, obj_fn=lambda w: w.sum()
  )[0]
  expected = jax.jit(update)(w)
  with jax.set_mesh(make_mesh('explicit')):
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), P('data', 'model'))
    got = jax.jit(update)(jax.device_put(w, sharding))
  assert got.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
