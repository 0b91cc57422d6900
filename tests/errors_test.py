"""Errors for bad input: what was needed, what was given, how to fix it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

PARAMS = {'w': jnp.ones(3), 'b': jnp.zeros(2)}
GAUSS_NEWTON = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
HUTCHINSON = sophia_optax.hutchinson_estimator_diag_hessian
SOPHIA_G = sophia_optax.sophia_g
ESTIMATOR = {'hessian_diagonal_fn': optax.identity()}


def loss_fn(params):
  return jnp.sum(params['w'] ** 2)


def predict_fn(params):
  return jnp.ones((4, 3)) * params['w']


HYPERPARAMETERS = [
  ({'b1': 1.0}, r'b1 must be a number in \[0, 1\), got 1.0'),
  ({'b1': -0.1}, 'b1 must'),
  ({'b1': float('nan')}, 'b1 must'),
  ({'b2': np.float32(1.5)}, 'b2 must'),
  ({'adam_b2': 1.0}, 'adam_b2 must'),
  # 0.999 in bfloat16 is 1.
  ({'b2': jnp.bfloat16(0.999)}, 'b2 must .* hyperparam_dtype=jnp.float32'),
  ({'eps': 0.0}, 'eps must be a number greater than 0, .* got 0.0'),
  # XLA flushes this to 0, and 0 / 0 is NaN where the gradient is 0.
  ({'eps': 1e-39}, 'smallest normal float32.*got 1e-39'),
  ({'clip_threshold': 0}, 'clip_threshold must'),
  ({'gamma': -0.01}, 'gamma must be .* number of at least 0'),
  ({'gamma': float('inf')}, 'must be a finite number .* got inf'),
  ({'update_interval': 0}, 'whole number of at least 1, got 0'),
  ({'update_interval': 2.5}, 'update_interval must'),
  ({'print_win_rate_every_n_steps': -1}, 'print_win_rate'),
  ({'target_win_rate': 1.0}, r'in \(0, 1\), got 1\.0'),
  ({'target_win_rate': 0}, r'in \(0, 1\), got 0'),
  ({'target_win_rate': 0.3, 'gamma': 0.0}, 'needs gamma greater than 0'),
  ({'target_win_rate': 0.3, 'gamma': np.float32(0)}, 'needs gamma greater'),
  ({'target_win_rate': 0.3, 'clip_threshold': None}, 'and a clip_threshold'),
]


@pytest.mark.parametrize(('kwargs', 'match'), HYPERPARAMETERS, ids=str)
def test_hyperparameters(kwargs, match):
  with pytest.raises(ValueError, match=match):
    sophia_optax.scale_by_sophia(**kwargs)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: sophia_optax.sophia(np.nan), 'learning_rate must .* got nan'),
    (
      lambda: sophia_optax.sophia(0.1, weight_decay=np.inf),
      'weight_decay must',
    ),
    (lambda: SOPHIA_G(learning_rate=-1e-3), r'learning_rate .* got -0\.001'),
    (lambda: SOPHIA_G(rho=-0.04), r'rho .* got -0\.04'),
    (lambda: SOPHIA_G(weight_decay=-0.1), r'weight_decay .* got -0\.1'),
    (lambda: HUTCHINSON(num_samples=0), 'num_samples must'),
    (lambda: HUTCHINSON(num_samples=1.5), 'num_samples must'),
    (
      lambda: HUTCHINSON(distribution='gauss'),
      r"one of \['normal', 'rademacher'\], got 'gauss'",
    ),
    (
      lambda: HUTCHINSON(hvp='reverse'),
      "'reverse_over_reverse'.*got 'reverse'",
    ),
    (
      lambda: GAUSS_NEWTON(likelihood='poisson'),
      r"one of \['bernoulli', 'categorical', 'gaussian'\], got 'poisson'",
    ),
    (lambda: GAUSS_NEWTON(num_chunks=0), 'num_chunks must'),
    (lambda: sophia_optax.microbatched(GAUSS_NEWTON(), 0), 'num_microbatches'),
    (
      lambda: sophia_optax.squared_gradient_estimator_diag_hessian(0),
      'batch_size must',
    ),
    (lambda: sophia_optax.likelihoods.gaussian(scale=-1.0), 'scale must'),
  ],
)
def test_arguments_of_factories(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize(
  ('estimator', 'extra', 'error', 'match'),
  [
    (HUTCHINSON(), {}, ValueError, 'needs obj_fn, got None. Pass it to update'),
    (
      GAUSS_NEWTON(),
      {'obj_fn': loss_fn},
      ValueError,
      'needs predict_fn, got only obj_fn',
    ),
    (
      HUTCHINSON(),
      {'obj_fn': lambda p: (loss_fn(p), 1)},
      TypeError,
      r'obj_fn must return \(value, aux\) if has_aux=True',
    ),
    (
      GAUSS_NEWTON(has_aux=True),
      {'predict_fn': predict_fn},
      TypeError,
      r'predict_fn must return \(value, aux\) if has_aux=True',
    ),
  ],
)
def test_functions_of_the_user(estimator, extra, error, match):
  tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=estimator)
  with pytest.raises(error, match=match):
    jax.eval_shape(
      lambda s: tx.update(PARAMS, s, PARAMS, **extra), tx.init(PARAMS)
    )


@pytest.mark.parametrize('shape', [(3,), (4, 3), (4, 1)])
def test_label_mask_unlike_predictions(shape):
  estimator = GAUSS_NEWTON()
  with pytest.raises(ValueError, match='broadcast'):
    jax.eval_shape(
      lambda s: estimator.update(
        None, s, PARAMS, predict_fn=predict_fn, label_mask=jnp.ones(shape, bool)
      ),
      estimator.init(PARAMS),
    )


@pytest.mark.parametrize(
  'part',
  [
    sophia_optax.scale_by_sophia(),
    HUTCHINSON(),
    sophia_optax.microbatched(HUTCHINSON(), 2),
    sophia_optax.squared_gradient_estimator_diag_hessian(2),
  ],
)
def test_missing_params(part):
  with pytest.raises(ValueError, match='needs params, got None'):
    part.update(PARAMS, part.init(PARAMS), obj_fn=loss_fn)


@pytest.mark.parametrize(
  ('tree', 'match'),
  [
    ({'w': jnp.ones(3)}, 'b'),
    ({'w': jnp.ones(3), 'b': jnp.ones(3)}, r"\['b'\] has shape \(3,\)"),
    (jnp.ones(3), 'dict'),
  ],
)
def test_trees_unlike_params(tree, match):
  def update(grads, estimate):
    estimator = optax.stateless(lambda g, p: estimate)
    tx = sophia_optax.sophia(0.1, hessian_diagonal_fn=estimator)
    return tx.update(grads, tx.init(PARAMS), PARAMS)

  for trees in ((tree, PARAMS), (PARAMS, tree)):
    with pytest.raises((ValueError, TypeError), match=match):
      update(*trees)


@pytest.mark.parametrize(
  ('param', 'grad'),
  [('complex64', 'float32'), ('float32', 'complex64'), ('float32', 'int32')],
)
def test_gradient_of_another_kind(param, grad):
  tx = sophia_optax.sophia(0.1, **ESTIMATOR)
  x = jnp.ones(2, param)
  with pytest.raises(TypeError, match=f'got {grad} for a parameter in {param}'):
    tx.update(jnp.ones(2, grad), tx.init(x), x)


@pytest.mark.parametrize(
  'option', [{'adam_b2': 0.9}, {'target_win_rate': 0.3}, {'diagnostics': True}]
)
def test_options_that_do_not_fit_the_state(option):
  txs = [sophia_optax.scale_by_sophia(**o, **ESTIMATOR) for o in ({}, option)]
  for tx, other in (txs, txs[::-1]):
    with pytest.raises(ValueError, match=r'=.* does not fit the state'):
      tx.update(PARAMS, other.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
  ('extra', 'match'),
  [
    ({}, 'needs batch, got None'),
    ({'batch': jnp.ones((10, 2))}, r'10 examples .* 4 does not divide'),
    ({'batch': {'x': jnp.ones(8), 'y': jnp.ones(4)}}, 'same leading axis'),
    ({'batch': {'x': jnp.ones(8), 'rate': 0.1}}, 'same leading axis'),
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
