"""jit with sharded arrays and no axis name gives the results of one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sophia_optax

P = jax.sharding.PartitionSpec
AxisType = jax.sharding.AxisType
AXIS_TYPES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}
BOTH = ('data', 'model')
# (w1, w2, batch, hidden, outputs). An explicit mesh needs the last two if a
# product sums over a divided axis.
LAYOUTS = {
  'data': (P(), P(), P(BOTH), P(BOTH), P(BOTH)),
  'fsdp': (P('model'), P('model'), P(BOTH), P(BOTH), P(BOTH)),
  'tensor': (P(None, 'model'), P('model'), P('data'), P(*BOTH), P('data')),
  'vocabulary': (P(), P(None, 'model'), P('data'), P('data'), P(*BOTH)),
}
NUM_CLASSES = 12
RNG = np.random.default_rng(0)
PARAMS = {
  'w1': jnp.float32(RNG.normal(0, 1 / 4, (16, 32))),
  'w2': jnp.float32(RNG.normal(0, 1 / 6, (32, NUM_CLASSES))),
}
BATCH = {
  'x': jnp.float32(RNG.normal(size=(64, 16))),
  'y': jnp.int32(RNG.integers(0, NUM_CLASSES, 64)),
}
hutchinson = sophia_optax.hutchinson_estimator_diag_hessian
gauss_newton = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
ESTIMATORS = {
  'difference': hutchinson(hvp='finite_difference'),
  'probe of parts': sophia_optax.microbatched(hutchinson(jax.random.key(0)), 2),
  'labels': gauss_newton(jax.random.PRNGKey(0)),
  'labels in chunks': gauss_newton(num_chunks=2),
  'labels of parts': sophia_optax.microbatched(
    gauss_newton(jax.random.key(0)), 2
  ),
}
PLAIN = (jnp.matmul, jnp.matmul)


def make_mesh(axis_types):
  types = (AXIS_TYPES[axis_types],) * 2
  return jax.make_mesh((2, 4), BOTH, axis_types=types)


def place(tree, specs, mesh):
  return jax.tree.map(
    lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s)),
    tree,
    specs,
  )


def matmuls_of(axis_types, *specs):
  if axis_types == 'auto':
    return PLAIN
  return [functools.partial(jnp.matmul, out_sharding=spec) for spec in specs]


def train(name, params, batch, matmuls=PLAIN):
  """Takes three steps; returns initial and final parameters and states."""
  tx = sophia_optax.sophia(
    0.01, update_interval=2, hessian_diagonal_fn=ESTIMATORS[name]
  )

  def hidden_fn(params, batch):  # (B, 32)
    return jnp.tanh(matmuls[0](batch['x'], params['w1']))

  def head_fn(params, hidden):  # (B, 12)
    return matmuls[1](hidden, params['w2'])

  def predict_fn(params, batch):
    return head_fn(params, hidden_fn(params, batch))

  def obj_fn(params, batch):
    logits = predict_fn(params, batch)
    labels = jax.nn.one_hot(batch['y'], NUM_CLASSES)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return jnp.mean(log_normalizer - jnp.sum(logits * labels, axis=-1))

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(obj_fn)(params, batch)
    fns = {'obj_fn': obj_fn, 'predict_fn': predict_fn}
    if name == 'labels in chunks':
      fns |= {'predict_fn': hidden_fn, 'head_fn': head_fn}
    updates, state = tx.update(grads, state, params, batch=batch, **fns)
    return optax.apply_updates(params, updates), state

  before = after = (params, tx.init(params))
  for _ in range(3):
    after = step(*after, batch)
  return before, after


@functools.cache
def one_device(name):
  return train(name, PARAMS, BATCH)[1]


def comparable(tree):
  """Returns key data for typed keys, which can't be subtracted."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if is_key(x) else x, jax.device_get(tree)
  )


@pytest.mark.usefixtures('compile_fast')
@pytest.mark.parametrize(
  ('layout', 'name', 'axis_types'),
  [
    ('fsdp', 'labels', 'explicit'),
    ('tensor', 'probe of parts', 'auto'),
    ('vocabulary', 'labels in chunks', 'auto'),
    *(
      pytest.param(*row, marks=pytest.mark.slow)
      for row in [
        ('data', 'labels of parts', 'explicit'),
        ('fsdp', 'difference', 'auto'),
        ('tensor', 'difference', 'explicit'),
        ('tensor', 'labels in chunks', 'explicit'),
        ('vocabulary', 'labels', 'explicit'),
      ]
    ),
  ],
)
def test_equals_one_device(layout, name, axis_types):
  w1, w2, rows, *activations = LAYOUTS[layout]
  mesh = make_mesh(axis_types)
  with jax.set_mesh(mesh):
    before, after = train(
      name,
      place(PARAMS, {'w1': w1, 'w2': w2}, mesh),
      place(BATCH, {'x': rows, 'y': rows}, mesh),
      matmuls_of(axis_types, *activations),
    )
  # Moments are sharded like the parameters.
  params, (state, *_) = before
  for tree in (state.mu, state.nu):
    for x, p in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
      assert x.sharding.is_equivalent_to(p.sharding, x.ndim)
  for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    assert jax.typeof(old) == jax.typeof(new)
    assert old.sharding.is_equivalent_to(new.sharding, old.ndim)
  # The quotient of differences magnifies round-off.
  rtol = 1e-2 if name == 'difference' else 1e-4
  chex.assert_trees_all_close(
    comparable(after), comparable(one_device(name)), rtol=rtol, atol=1e-6
  )


# What is in the compiled programs.


def program(estimator, shape, spec, mesh, batch=None, **extra_args):
  """Returns the HLO of one estimate, which is divided like the parameters."""
  w = place(jnp.ones(shape), spec, mesh)
  update = lambda w, batch: oracles.first(
    estimator, w, batch=batch, **extra_args
  )
  step = jax.jit(update, out_shardings=w.sharding)
  return step.lower(w, batch).compile().as_text()


@pytest.mark.parametrize(
  ('distribution', 'num_samples', 'axis_types'),
  [
    ('rademacher', 1, 'explicit'),
    pytest.param('normal', 2, 'auto', marks=pytest.mark.slow),
  ],
)
def test_no_probe_of_full_size(distribution, num_samples, axis_types):
  """A loss that needs no array of full size finds none in the program."""
  estimator = hutchinson(distribution=distribution, num_samples=num_samples)
  mesh = make_mesh(axis_types)

  def full_size(spec):
    with jax.set_mesh(mesh):
      text = program(
        estimator, (48, 80), spec, mesh, obj_fn=lambda w: jnp.sum(w**2) ** 2
      )
    return re.findall(r'\[48,80\]|\[3840\]|\[1920\]', text)

  assert full_size(P())  # Replicated: it has them.
  assert not full_size(P(*BOTH))


@pytest.mark.parametrize(
  'axis_types', ['auto', pytest.param('explicit', marks=pytest.mark.slow)]
)
def test_no_logits_of_full_size(axis_types):
  """Labels are drawn without gathering logits that are divided by class."""
  mesh = make_mesh(axis_types)
  with jax.set_mesh(mesh):
    text = program(
      ESTIMATORS['labels'], (6, 4000), P(*BOTH), mesh, predict_fn=lambda w: w
    )
  assert re.findall(r'f32\[3,1000\]', text)  # The shard of one device.
  assert not re.findall(r'\[[36],4000\]|\[6,1000\]', text)


@pytest.mark.parametrize(
  ('rows', 'classes', 'here', 'axis_types'),
  [
    (P(BOTH), P(None), '2,4000', 'auto'),
    (P('data'), P('model'), '8,1000', 'explicit'),
  ],
)
def test_every_device_has_a_part_of_each_chunk(rows, classes, here, axis_types):
  mesh = make_mesh(axis_types)
  (matmul, _) = matmuls_of(axis_types, P(*rows, *classes), None)
  with jax.set_mesh(mesh):
    text = program(
      gauss_newton(num_chunks=4),
      (5, 4000),
      P(None, *classes),
      mesh,
      predict_fn=lambda w, hidden: hidden,
      head_fn=lambda w, hidden: matmul(hidden, w),
      batch=place(jnp.ones((64, 5)), rows, mesh),
    )
  sizes = set(re.findall(r'\[(\d+,(?:1000|4000))\]', text))
  assert sizes == {here, f'5,{here.split(",")[1]}'}  # Logits and weights.


def test_sampler_without_a_sharding():
  # Regression: a mesh with explicit axes passed out_sharding to the sampler.
  def make_draw(theta, loss, tools, /, **extra_args):
    sampler = lambda key, shape, dtype: jax.random.normal(key, shape, dtype)
    return lambda key: tools.random_like(key, theta, sampler)

  estimator = sophia_optax.sampled_estimator(make_draw)
  w = jnp.ones((8, 4))
  update = lambda w: oracles.first(estimator, w, obj_fn=lambda w: w.sum())
  expected = jax.jit(update)(w)
  with jax.set_mesh(make_mesh('explicit')):
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), P(*BOTH))
    got = jax.jit(update)(jax.device_put(w, sharding))
  assert got.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
