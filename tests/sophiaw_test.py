"""sophiaw: the settings of its docstring, and which examples it takes."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

RNG = np.random.default_rng(0)
INPUTS = jnp.float32(RNG.normal(size=(64, 3)))
MASK = jnp.arange(64) % 3 > 0
W = jnp.float32(RNG.normal(size=(3, 4)))
GAUSS_NEWTON = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
HUTCHINSON = sophia_optax.hutchinson_estimator_diag_hessian


def predict(w, inputs):
  return inputs @ w


def loss_fn(w, inputs):
  return jnp.mean(jax.nn.logsumexp(predict(w, inputs), axis=-1))


def train(tx, stride=1):
  """Returns parameters and moments after two refreshes."""

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(
      jax.grad(loss_fn)(w, INPUTS),
      state,
      w,
      obj_fn=loss_fn,
      predict_fn=predict,
      batch=INPUTS[::stride],
      label_mask=MASK[::stride],
    )
    return (optax.apply_updates(w, updates), state), None

  w, (state, *_) = jax.lax.scan(step, (W, tx.init(W)), length=11)[0]
  return w, state.mu, state.nu, state.second_moment, state.gamma_factor


@pytest.mark.parametrize(
  ('curvature', 'estimator', 'gamma', 'target'),
  [
    ('gauss_newton', GAUSS_NEWTON(), 0.1, 0.3),
    ('hessian', HUTCHINSON(), 0.05, 0.45),
    (HUTCHINSON(5), HUTCHINSON(5), 0.1, 0.3),
  ],
  ids=['gauss_newton', 'hessian', 'own'],
)
def test_is_sophia_with_the_settings_of_its_docstring(
  curvature, estimator, gamma, target
):
  ours = sophia_optax.sophiaw(
    0.1,
    0.8,
    0.99,
    1e-6,
    mu_dtype=jnp.bfloat16,
    weight_decay=0.2,
    mask=lambda w: False,
    curvature=curvature,
  )
  expected = sophia_optax.sophia(
    0.1,
    b1=0.8,
    b2=0.95,
    eps=1e-6,
    weight_decay=0.2,
    weight_decay_mask=lambda w: False,
    gamma=gamma,
    target_win_rate=target,
    mu_dtype=jnp.bfloat16,
    nesterov=True,
    nu_bias_correction=True,
    adam_b2=0.99,
    hessian_diagonal_fn=sophia_optax.microbatched(estimator, 8),
  )
  chex.assert_trees_all_close(
    *jax.jit(lambda: (train(ours), train(expected, stride=4)))(), rtol=1e-6
  )


@pytest.mark.parametrize('eigenbasis', [False, True])
def test_without_curvature_it_is_nadamw(eigenbasis):
  wrap = sophia_optax.in_eigenbasis if eigenbasis else lambda tx: tx
  expected = optax.chain(
    wrap(optax.scale_by_adam(0.8, 0.99, 1e-6, nesterov=True)),
    optax.add_decayed_weights(0.2),
    optax.scale_by_learning_rate(0.1),
  )
  ours = sophia_optax.sophiaw(
    0.1,
    0.8,
    0.99,
    1e-6,
    weight_decay=0.2,
    curvature=None,
    eigenbasis=eigenbasis,
  )
  updates = []
  with jax.numpy_dtype_promotion('standard'):  # optax's Adam needs it.
    for tx in ours, expected:
      state = tx.init(W)
      for _ in range(3):
        update, state = jax.jit(tx.update)(W + 1, state, W)
      updates.append(update)
  chex.assert_trees_all_equal(*updates)


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
    (6, 0.55, 2, [[0, 2, 4]]),
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


def test_without_a_batch():
  tx = sophia_optax.sophiaw(0.1)
  arguments = {'predict_fn': lambda w: predict(w, INPUTS)}
  nu = jax.jit(
    lambda mask: optax.tree.get(
      tx.update(W, tx.init(W), W, label_mask=mask, **arguments)[1], 'nu'
    )
  )
  assert jnp.all(nu(MASK) > 0)
  np.testing.assert_array_equal(nu(MASK & False), 0)


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
    tx.update(W, tx.init(W), W)


@pytest.mark.parametrize(
  'wrong',
  [
    {'curvature': 'fisher'},
    {'curvature_fraction': 3.0},
    {'curvature_parts': 0},
  ],
)
def test_errors(wrong):
  with pytest.raises(ValueError, match=f'{next(iter(wrong))} must'):
    sophia_optax.sophiaw(0.1, **wrong)


def test_options_that_decide_shapes_are_no_arrays():
  for make, name in (
    (sophia_optax.sophiaw, 'curvature_fraction'),
    (
      lambda _, **kwargs: sophia_optax.in_eigenbasis(
        optax.identity(), **kwargs
      ),
      'block_size',
    ),
  ):
    with pytest.raises(TypeError, match=f'{name} must.*static_args'):
      make(0.1, **{name: jnp.float32(0.25)})


def test_sharded_examples_stay_where_they_are():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  by_example = jax.NamedSharding(mesh, jax.P('data'))
  batch = jax.device_put(jnp.tile(INPUTS, (4, 1)), by_example)
  tx = sophia_optax.sophiaw(0.02)

  def step(state, batch):
    return tx.update(W, state, W, refresh=True, batch=batch,
                     predict_fn=predict)  # fmt: skip

  text = jax.jit(step).lower(tx.init(W), batch).compile().as_text()
  assert 'all-reduce' in text
  for moving in ('collective-permute', 'all-gather', 'all-to-all'):
    assert moving not in text
