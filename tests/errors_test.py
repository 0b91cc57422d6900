"""Errors for bad input: what was needed, what was given, how to fix it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

PARAMS = {'w': jnp.ones(3), 'b': jnp.zeros(2)}


def loss_fn(params):
  return jnp.sum(params['w'] ** 2)


HYPERPARAMETERS = [
  ({'b1': 1.0}, ValueError, r'b1 must be a number in \[0, 1\), got 1.0'),
  ({'b1': -0.1}, ValueError, 'b1 must'),
  ({'b1': float('nan')}, ValueError, 'b1 must'),
  ({'b2': 1.5}, ValueError, 'b2 must'),
  ({'b2': '0.9'}, TypeError, "b2 must be a number .* got '0.9'"),
  ({'eps': 0.0}, ValueError, 'eps must be a number greater than 0, .* got 0.0'),
  # XLA flushes this to 0, and 0 / 0 is NaN where the gradient is 0.
  ({'eps': 1e-39}, ValueError, 'smallest normal float32.*got 1e-39'),
  ({'gamma': None}, TypeError, 'gamma must be a finite .* or a schedule'),
  ({'clip_threshold': 0}, ValueError, 'clip_threshold must'),
  ({'clip_threshold': -1.0}, ValueError, 'clip_threshold must'),
  ({'gamma': -0.01}, ValueError, 'gamma must be .* number of at least 0'),
  ({'gamma': float('inf')}, ValueError, 'must be a finite number .* got inf'),
  ({'mu_dtype': jnp.int32}, TypeError, 'mu_dtype must be a real floating'),
  ({'nu_dtype': 'complex64'}, TypeError, 'nu_dtype must be a real floating'),
  ({'update_interval': 0}, ValueError, 'whole and at least 1, got 0'),
  ({'update_interval': 2.5}, ValueError, 'update_interval must'),
  ({'print_win_rate_every_n_steps': -1}, ValueError, 'print_win_rate'),
  ({'hessian_diagonal_fn': 3}, TypeError, 'with init and update, got 3'),
  ({'hessian_diagonal_fn': optax.identity}, TypeError, 'Call the factory'),
]


@pytest.mark.parametrize(('kwargs', 'error', 'match'), HYPERPARAMETERS)
def test_hyperparameters(kwargs, error, match):
  with pytest.raises(error, match=match):
    sophia_optax.scale_by_sophia(**kwargs)
  with pytest.raises(error, match=match):
    sophia_optax.sophia(1e-3, **kwargs)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    ({'num_samples': 0}, ValueError, 'num_samples must'),
    ({'num_samples': 1.5}, ValueError, 'num_samples must'),
    ({'num_samples': jnp.array(2)}, TypeError, 'must be a Python number'),
    (
      {'distribution': 'gauss'},
      ValueError,
      r"one of \['normal', 'rademacher'\], got 'gauss'",
    ),
    (
      {'hvp': 'reverse'},
      ValueError,
      r"\['finite_difference', 'forward_over_reverse', 'reverse_over_reverse'\]"
      ", got 'reverse'",
    ),
  ],
)
def test_estimator_arguments(kwargs, error, match):
  with pytest.raises(error, match=match):
    sophia_optax.hutchinson_estimator_diag_hessian(**kwargs)


@pytest.mark.parametrize(
  'factory', [sophia_optax.sophia, sophia_optax.sophia_g]
)
@pytest.mark.parametrize(
  ('name', 'wrong'), [('max_update_rms', 0), ('adam_b2', 1.0)]
)
def test_limits_of_the_size_of_an_update(factory, name, wrong):
  with pytest.raises(ValueError, match=rf'{name} must .* got {wrong}'):
    factory(1e-3, **{name: wrong})
  with pytest.raises(TypeError, match=rf"{name} must .* got '0.3'"):
    factory(1e-3, **{name: '0.3'})


@pytest.mark.parametrize('seed', [1.5, 'seed'])
def test_seed(seed):
  estimator = sophia_optax.hutchinson_estimator_diag_hessian(seed)
  with pytest.raises(TypeError, match=r'random_seed must .*jax\.random\.key'):
    estimator.init(PARAMS)


def test_arrays_do_what_numbers_do():
  def train(b1, eps, update_interval):
    tx = sophia_optax.scale_by_sophia(
      b1=b1, eps=eps, update_interval=update_interval, clip_threshold=None
    )
    state = tx.init(PARAMS)
    for scale in range(1, 5):
      grads = optax.tree.scale(scale, PARAMS)
      updates, state = tx.update(grads, state, PARAMS, obj_fn=loss_fn)
    return updates, state

  arrays = train(jnp.float32(0.9), np.array(0.1), jnp.int32(3))
  chex.assert_trees_all_close(arrays, train(0.9, 0.1, 3))


OBJECTIVES = [
  (None, ValueError, 'needs obj_fn, got None. Pass it to update'),
  (3, TypeError, r'not callable\nobj_fn was called as obj_fn\(params\)'),
  (lambda p: p['w'], TypeError, r'float32 of shape \(3,\). Reduce it'),
  (lambda p: (loss_fn(p), 1), TypeError, r'got a tuple.*has_aux=True'),
  (lambda p: jnp.sum(p['w']).astype(int), TypeError, 'got int32 .* cast it'),
  (lambda p: jnp.sum(p['w']).astype(complex), TypeError, 'got complex64'),
  (lambda p: 'loss', TypeError, 'got a str'),
  (lambda p: None, TypeError, 'got a NoneType'),
  (lambda: 0.0, TypeError, r'0 positional(?s:.*)called as obj_fn\(params\)'),
  (lambda p, batch: 0.0, TypeError, "missing .* argument: 'batch'"),
  (functools.partial(lambda p, q: 0.0), TypeError, 'bind them with a lambda'),
]


@pytest.mark.parametrize(('obj_fn', 'error', 'match'), OBJECTIVES)
def test_objective(obj_fn, error, match):
  tx = sophia_optax.sophia(0.1)
  state = tx.init(PARAMS)
  extra = {} if obj_fn is None else {'obj_fn': obj_fn}
  before = jax.tree.map(np.array, state)
  with pytest.raises(error, match=match):
    tx.update(PARAMS, state, PARAMS, **extra)
  with pytest.raises(error, match=match):
    jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **extra))(state)
  chex.assert_trees_all_equal(before, state)


def test_objective_of_one_argument_with_a_batch():
  tx = sophia_optax.sophia(0.1)
  with pytest.raises(TypeError, match=r'called as obj_fn\(params, batch\)'):
    tx.update(
      PARAMS, tx.init(PARAMS), PARAMS, obj_fn=lambda p: 0.0, batch=jnp.ones(3)
    )


@pytest.mark.parametrize(
  'part',
  [
    sophia_optax.sophia(0.1),
    sophia_optax.scale_by_sophia(),
    sophia_optax.hutchinson_estimator_diag_hessian(),
  ],
)
def test_missing_params(part):
  with pytest.raises(ValueError, match='needs params, got None'):
    part.update(PARAMS, part.init(PARAMS), obj_fn=loss_fn)


def returning(estimate):
  return optax.GradientTransformation(
    lambda params: optax.EmptyState(), lambda g, s, p=None: (estimate, s)
  )


@pytest.mark.parametrize(
  ('estimate', 'match'),
  [
    ({'w': jnp.ones(3)}, "like params. Needed: .*'b'.*, got: "),
    ({'w': jnp.ones(3), 'b': jnp.ones(3)}, r"\['b'\] has shape \(3,\)"),
    (jnp.ones(3), 'Hessian diagonal estimate must be a tree like params'),
  ],
)
def test_estimate_unlike_params(estimate, match):
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=returning(estimate))
  with pytest.raises(ValueError, match=match):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_gradient_unlike_params():
  tx = sophia_optax.sophia(0.1)
  with pytest.raises(ValueError, match='The gradient must be a tree like'):
    tx.update({'w': jnp.ones(3)}, tx.init(PARAMS), PARAMS, obj_fn=loss_fn)


@pytest.mark.parametrize(
  ('param', 'grad'),
  [('complex64', 'float32'), ('float32', 'complex64'), ('float32', 'int32')],
)
def test_gradient_of_another_kind(param, grad):
  tx = sophia_optax.sophia(0.1)
  x = jnp.ones(2, param)
  with pytest.raises(TypeError, match=f'got {grad} for a parameter in {param}'):
    tx.update(jnp.ones(2, grad), tx.init(x), x, obj_fn=jnp.sum)


def predict_fn(params):
  return jnp.ones((4, 3)) * params['w']


GAUSS_NEWTON = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
PREDICTIONS = [
  ({}, ValueError, 'needs predict_fn, got None. Pass it to update'),
  ({'obj_fn': loss_fn}, ValueError, 'needs predict_fn, got only obj_fn'),
  ({'predict_fn': 3}, TypeError, 'not callable\npredict_fn was called as'),
  ({'predict_fn': lambda: 0.0}, TypeError, r'as predict_fn\(params\)'),
  (
    {'predict_fn': lambda p: (predict_fn(p), 1)},
    TypeError,
    'got a tuple. If it returns .* has_aux=True',
  ),
  (
    {'predict_fn': lambda p: jnp.argmax(predict_fn(p), -1)},
    TypeError,
    'logits or means, got int32',
  ),
  ({'predict_fn': lambda p: None}, TypeError, 'got a NoneType'),
  ({'predict_fn': loss_fn}, TypeError, r'at least 1 axes .* got shape \(\)'),
  (
    {'predict_fn': predict_fn, 'label_mask': jnp.ones(3, bool)},
    ValueError,
    r'the shape \(4,\) of the predictions, got shape \(3,\)',
  ),
  (
    {'predict_fn': predict_fn, 'label_mask': jnp.ones((4, 3), bool)},
    ValueError,
    'without an axis of classes',
  ),
  (
    {'predict_fn': predict_fn, 'label_mask': jnp.ones((4, 1), bool)},
    ValueError,
    'without an axis of classes',
  ),
]


@pytest.mark.parametrize(('extra', 'error', 'match'), PREDICTIONS)
def test_predictions(extra, error, match):
  tx = sophia_optax.sophia_g()
  state = tx.init(PARAMS)
  with pytest.raises(error, match=match):
    jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **extra))(state)


@pytest.mark.parametrize('likelihood', ['poisson', 3, None])
def test_unknown_likelihood(likelihood):
  with pytest.raises(
    ValueError, match=r"one of \['bernoulli', 'categorical', 'gaussian'\]"
  ):
    GAUSS_NEWTON(likelihood=likelihood)


@pytest.mark.parametrize(
  'make',
  [
    lambda: GAUSS_NEWTON(num_samples=0),
    lambda: sophia_optax.microbatched(GAUSS_NEWTON(), 0),
    lambda: sophia_optax.squared_gradient_estimator_diag_hessian(0),
    lambda: sophia_optax.likelihoods.gaussian(scale=-1.0),
  ],
)
def test_numbers_of_estimators(make):
  with pytest.raises(ValueError, match='must be a number'):
    make()


@pytest.mark.parametrize(
  ('extra', 'match'),
  [
    ({}, 'needs batch, got None'),
    ({'batch': jnp.ones((10, 2))}, r'10 examples .* 4 does not divide'),
    ({'batch': {'x': jnp.ones(8), 'y': jnp.ones(4)}}, 'same leading axis'),
    ({'batch': {'x': jnp.ones(8), 'rate': 0.1}}, 'same leading axis'),
    ({'batch': {'rate': 0.1}}, 'same leading axis'),
    (
      {'batch': jnp.ones(8), 'label_mask': jnp.ones(6, bool)},
      r'shape \(8,\) of the predictions, got shape \(6,\)',
    ),
  ],
)
def test_batches_that_do_not_split(extra, match):
  estimator = sophia_optax.microbatched(GAUSS_NEWTON(), 4)
  with pytest.raises(ValueError, match=match):
    estimator.update(
      None,
      estimator.init(PARAMS),
      PARAMS,
      predict_fn=lambda p, batch: predict_fn(p),
      **extra,
    )


def test_squared_gradient_without_params():
  estimator = sophia_optax.squared_gradient_estimator_diag_hessian(2)
  with pytest.raises(ValueError, match='needs params, got None'):
    estimator.update(PARAMS, estimator.init(PARAMS))


@pytest.mark.parametrize(
  'factory', [sophia_optax.sophia, sophia_optax.sophia_g]
)
@pytest.mark.parametrize('name', ['learning_rate', 'weight_decay'])
def test_numbers_or_schedules(factory, name):
  numbers = {'learning_rate': 0.1, name: None}
  with pytest.raises(TypeError, match=f'{name} must be a finite .*, got None'):
    factory(**numbers)


@pytest.mark.parametrize(
  'tx', [sophia_optax.sophia(0.1), sophia_optax.scale_by_sophia()]
)
def test_state_and_params_in_the_wrong_order(tx):
  with pytest.raises(ValueError, match=r'update\(grads, state, params\)'):
    tx.update(PARAMS, PARAMS, tx.init(PARAMS), obj_fn=loss_fn)
  restored = jax.tree.leaves(tx.init(PARAMS))  # Without the structure.
  with pytest.raises(ValueError, match='structure that init returns'):
    tx.update(PARAMS, restored, PARAMS, obj_fn=loss_fn)


def test_state_that_only_contains_the_state_of_sophia():
  tx = sophia_optax.scale_by_sophia()
  state = (tx.init(PARAMS), optax.EmptyState())
  with pytest.raises(ValueError, match='be a SophiaState, got a tuple'):
    tx.update(PARAMS, state, PARAMS, obj_fn=loss_fn)


def test_likelihood_that_was_not_called():
  with pytest.raises(TypeError, match=r'pass likelihoods\.gaussian\(\)'):
    GAUSS_NEWTON(likelihood=sophia_optax.likelihoods.gaussian)
