"""The optimizer with AdamW's arguments."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

INPUTS = jnp.float32(np.random.default_rng(0).normal(size=(64, 3)))
BATCH = {'x': INPUTS, 'y': jnp.argmax(INPUTS, axis=-1)}
PARAMS = {'w': jnp.eye(3) / 2, 'b': jnp.zeros(3)}
CURVATURES = {
  'gauss_newton': (
    sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
    0.1,
    0.3,
  ),
  'hessian': (sophia_optax.hutchinson_estimator_diag_hessian, 0.05, 0.45),
}


def predict_fn(params, batch):
  return batch['x'] @ params['w'] + params['b']


def loss_fn(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(
    predict_fn(params, batch), batch['y']
  ).mean()


FUNCTIONS = {'obj_fn': loss_fn, 'predict_fn': predict_fn}


def train(tx, num_steps=12, **extra_args):
  @jax.jit
  def step(params, state):
    grads = jax.grad(loss_fn)(params, BATCH)
    updates, state = tx.update(grads, state, params, **FUNCTIONS, **extra_args)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(num_steps):
    params, state = step(params, state)
  return params, state


@pytest.mark.parametrize('curvature', CURVATURES)
def test_equals_sophia_on_every_fourth_example_in_parts(curvature):
  make_estimator, gamma, target = CURVATURES[curvature]
  mask = {'w': True, 'b': False}
  short = sophia_optax.sophiaw(
    0.02, 0.8, 0.9, 1e-6, weight_decay=0.1, mask=mask, curvature=curvature
  )
  long = sophia_optax.sophia(
    0.02,
    0.8,
    0.95,
    1e-6,
    0.1,
    mask,
    gamma,
    hessian_diagonal_fn=sophia_optax.microbatched(make_estimator(), 8),
    nesterov=True,
    nu_bias_correction=True,
    adam_b2=0.9,
    target_win_rate=target,
  )
  quarter = jax.tree.map(lambda x: x[::4], BATCH)
  chex.assert_trees_all_close(
    train(short, batch=BATCH), train(long, batch=quarter), rtol=1e-6
  )


def test_arguments_are_adamws():
  adamw = inspect.signature(optax.adamw).parameters
  ours = inspect.signature(sophia_optax.sophiaw).parameters
  shared = [name for name in adamw if name in ours]
  assert list(ours)[:4] == list(adamw)[:4]
  assert {'mu_dtype', 'weight_decay', 'mask'} < set(shared)
  for name in shared:
    assert ours[name].default == adamw[name].default


@pytest.mark.parametrize(
  ('size', 'fraction', 'max_parts', 'seen'),
  [
    (64, 0.25, 8, [range(4 * m, 64, 32) for m in range(8)]),
    (24, 0.25, 4, [range(4 * m, 24, 12) for m in range(3)]),
    (10, 0.25, 8, [[0], [4], [8]]),
    (6, 0.5, 2, [[0, 2, 4]]),
    (4, 1.0, 8, [[0], [1], [2], [3]]),
  ],
)
def test_examples_of_each_part(size, fraction, max_parts, seen):
  parts = []

  def update(updates, state, params=None, *, batch, **extra_args):
    del updates, extra_args
    jax.debug.callback(lambda x: parts.append(x.tolist()), batch, ordered=True)
    return jax.tree.map(jnp.ones_like, params), state

  tx = sophia_optax.sophiaw(
    0.1,
    curvature=optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
    ),
    curvature_fraction=fraction,
    curvature_parts=max_parts,
  )
  w = jnp.ones(2)
  tx.update(w, tx.init(w), w, batch=jnp.arange(size))
  jax.effects_barrier()
  assert parts == [list(part) for part in seen]


def test_label_mask_goes_with_its_examples():
  estimator = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
    likelihood=lambda key, z: jnp.ones_like(z)
  )
  tx = sophia_optax.sophiaw(0.1, curvature=estimator, curvature_parts=1)
  x = jnp.arange(16.0)
  _, state = tx.update(
    jnp.array(1.0),
    tx.init(jnp.array(1.0)),
    jnp.array(1.0),
    predict_fn=lambda w, x: w * x,
    batch=x,
    label_mask=x < 7,
  )
  # The examples 0 and 4 count: B ĝ² = (0 + 4)² / 2, of which h gets 5 %.
  np.testing.assert_allclose(optax.tree.get(state, 'nu'), 0.05 * 8, rtol=1e-6)


def test_without_a_batch_the_function_has_its_own():
  params, _ = train(sophia_optax.sophiaw(0.02, 0.9, 0.95), batch=BATCH)
  tx = sophia_optax.sophiaw(0.02, 0.9, 0.95)
  grads = jax.grad(loss_fn)(params, BATCH)
  updates, state = tx.update(
    grads, tx.init(params), params, predict_fn=lambda p: predict_fn(p, BATCH)
  )
  assert optax.tree.get(state, 'refresh_count') == 1
  assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize(
  ('curvature', 'line'),
  [
    ('gauss_newton', r'predict_fn=predict_fn, batch=batch\)'),
    ('hessian', r'obj_fn=loss_fn, batch=batch\)'),
  ],
)
def test_the_first_error_has_the_line_to_write(curvature, line):
  tx = sophia_optax.sophiaw(0.1, curvature=curvature)
  with pytest.raises(
    ValueError, match=rf'update\(grads, state, params, {line}'
  ):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
  'wrong',
  [
    {'curvature': 'fisher'},
    {'curvature_fraction': 2.5},
    {'curvature_fraction': -0.25},
    {'curvature_parts': 0},
  ],
)
def test_wrong_arguments(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    sophia_optax.sophiaw(0.1, **wrong)


def test_sharded_examples_stay_where_they_are():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  by_example = jax.NamedSharding(mesh, jax.P('data'))
  batch = jax.device_put(
    {'x': jnp.tile(INPUTS, (4, 1)), 'y': jnp.tile(BATCH['y'], 4)}, by_example
  )
  tx = sophia_optax.sophiaw(0.02)

  def step(state, batch):
    return tx.update(PARAMS, state, PARAMS, refresh=True, batch=batch,
                     predict_fn=predict_fn)  # fmt: skip

  text = jax.jit(step).lower(tx.init(PARAMS), batch).compile().as_text()
  assert 'all-reduce' in text
  for moving in ('collective-permute', 'all-gather', 'all-to-all'):
    assert moving not in text
