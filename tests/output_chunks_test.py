"""Compares Gauss-Newton-Bartlett in chunks with all outputs at once."""

import chex
from devices import map_grid
from devices import MAPS
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracles
import pytest

import dry_run
import sophia_optax
from sophia_optax import likelihoods

estimator_of = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
# Not random, so the estimate does not depend on the chunks.
likeliest = likelihoods.categorical._replace(
  sample=lambda key, logits: jnp.argmax(logits, axis=-1)
)
TOKENS = np.array([[0, 1, 2, 3], [3, 1, 0, 2]])  # (B, T)
RNG = np.random.default_rng(0)
# Tied embeddings of four words in three channels, and one layer.
PARAMS = {
  'table': jnp.float32(RNG.normal(size=(4, 3))),
  'layer': jnp.float32(RNG.normal(size=(3, 3))),
  'bias': jnp.float32(RNG.normal(size=4)),
}


def hidden_fn(params, tokens=TOKENS):  # (...) -> (..., 3)
  return jnp.tanh(params['table'][tokens] @ params['layer'])


def head_fn(params, hidden):  # (..., 3) -> (..., 4)
  logits = hidden @ params['table'].T
  return logits + jnp.broadcast_to(params['bias'], logits.shape)


def model(num_chunks, has_aux=False):
  """Returns the arguments of update. num_chunks=None computes all at once."""
  whole = lambda params, *batch: head_fn(params, hidden_fn(params, *batch))
  fn = whole if num_chunks is None else hidden_fn
  predict_fn = (lambda *args: (fn(*args), 'aux')) if has_aux else fn
  head = {} if num_chunks is None else {'head_fn': head_fn}
  return {'predict_fn': predict_fn, **head}


# Options of the estimator, arguments of update, microbatches.
OPTIONS = {
  'plain': ({}, {}, 1),
  'mask': (
    {'num_samples': 2, 'has_aux': True},
    {'label_mask': np.array([[True, False, True, True]])},
    1,
  ),
  'parts': (
    {},
    {'label_mask': np.array([[True], [False]]), 'loss_scale': 2.0**10},
    2,
  ),
}


@pytest.mark.parametrize(
  ('option', 'num_chunks'), [('plain', 4), ('mask', 2), ('parts', 2)]
)
def test_chunks_change_nothing_but_the_labels(option, num_chunks):
  options, extra, num_parts = OPTIONS[option]
  whole, chunked = (
    oracles.estimate(
      sophia_optax.microbatched(
        estimator_of(likelihood=likeliest, num_chunks=n, **options), num_parts
      ),
      PARAMS,
      batch=jnp.asarray(TOKENS),
      **model(n, options.get('has_aux', False)),
      **extra,
    )
    for n in (None, num_chunks)
  )
  chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)


def test_one_chunk_has_the_bits_of_outputs_at_once():
  whole, one = (
    oracles.estimate(
      estimator_of(num_chunks=n, num_samples=2), PARAMS, **model(n)
    )
    for n in (None, 1)
  )
  chex.assert_trees_all_equal(one, whole)


def test_half_precision():
  # A sum of 512 chunks would stall in half precision.
  narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
  chunked, exact = (
    oracles.estimate(
      estimator_of(likelihood=likeliest, num_chunks=n),
      params,
      batch=jnp.zeros(1024, jnp.int32),
      **model(n),
    )
    for n, params in ((512, narrow), (None, wide))
  )
  chex.assert_trees_all_close(chunked['bias'], exact['bias'], rtol=0.02)
  chex.assert_trees_all_equal_dtypes(chunked, exact)


def test_hidden_parameters():
  hide = lambda tree: tree | {'table': optax.MaskedNode()}
  estimator = estimator_of(likelihood=likeliest, num_chunks=2)
  full = oracles.estimate(estimator, PARAMS, **model(2))
  visible = oracles.estimate(
    estimator, hide(PARAMS), full_params=PARAMS, **model(2)
  )
  chex.assert_trees_all_close(visible, hide(full), rtol=1e-6)


# Devices.


def numbers(estimator, hidden):
  """Returns squared scores, for a model that outputs its parameters."""
  return oracles.first(
    estimator, hidden, predict_fn=lambda p: p, head_fn=lambda p, hidden: hidden
  )


def noise(key, outputs):
  return jax.random.normal(key, outputs.shape, outputs.dtype)


def test_keys_of_replicas_and_chunks():
  params = jnp.ones((4, 3))
  estimator = estimator_of(likelihood=noise, num_chunks=2, axis_name='data')
  run = MAPS['shard_map'](lambda params, _: numbers(estimator, params))
  drawn = run(params)

  @jax.jit
  @jax.vmap
  def squares(device):
    key = jax.random.fold_in(jax.random.split(jax.random.PRNGKey(0))[1], device)
    draw = jax.vmap(lambda key: jax.random.normal(key, (2, 3)))
    return draw(jax.random.split(key)) ** 2 / 12  # B = 12 numbers.

  first, second = np.mean(squares(np.arange(8)), axis=0)
  expected = [first[0], second[0], first[1], second[1]]
  np.testing.assert_allclose(drawn, np.tile(expected, (8, 1, 1)), rtol=1e-5)


def test_parts_of_divided_predictions_draw_independently():
  estimator = estimator_of(likelihood=noise, num_chunks=2)
  drawn = map_grid(
    lambda own: numbers(estimator, own),
    jnp.ones((16, 3)),
    specs=P('model'),
    out_specs=P('model'),
  )
  assert np.unique(drawn).size == drawn.size
  np.testing.assert_allclose(np.mean(drawn), 1 / drawn.size, rtol=0.5)


def test_predictions_divided_over_another_axis_are_one_estimate():
  # Rows of 'data' are replicas, columns of 'model' have parts of sequences.
  tokens = jnp.tile(TOKENS, (4, 4))  # (8, 16)
  estimator = lambda n, **options: estimator_of(
    likelihood=likeliest, num_chunks=n, **options
  )
  divided = estimator(2, axis_name='data')
  chunked = map_grid(
    lambda params, tokens: oracles.first(
      divided, params, batch=tokens, **model(2)
    ),
    PARAMS,
    tokens,
    specs=(P(), P('data', 'model')),
    out_specs=P(),
  )
  one = oracles.estimate(estimator(None), PARAMS, batch=tokens, **model(None))
  # Both replicas have the same sum S of scores, and S²/B is their mean. One
  # estimate of all has (2 S)²/(2 B).
  expected = jax.tree.map(lambda x: np.array(x) / 2, one)
  chex.assert_trees_all_close(chunked, expected, rtol=1e-4, atol=1e-6)


# What chunks cost.


def program(num_chunks, num_classes, num_samples=1):
  """Returns an estimate on 16 × 32 tokens and the shapes of its arguments."""
  estimator = estimator_of(num_chunks=num_chunks, num_samples=num_samples)
  shapes = {'table': (num_classes, 4), 'layer': (4, 4), 'bias': (num_classes,)}
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  tokens = jax.ShapeDtypeStruct((16, 32), jnp.int32)

  def update(params, tokens):
    return oracles.first(estimator, params, batch=tokens, **model(num_chunks))

  return update, params, tokens


@pytest.mark.slow
def test_memory_that_grows_with_classes_is_divided_by_the_chunks():
  growth = {}
  for num_chunks in (None, 8):
    sizes = []
    for num_classes in (2048, 4096):
      sizes.append(oracles.temporary_bytes(*program(num_chunks, num_classes)))
    growth[num_chunks] = sizes[1] - sizes[0]
  assert growth[None] >= 2 * 4 * 16 * 32 * 2048  # Logits and scores.
  assert growth[8] <= 1.05 * growth[None] / 8


def test_flops_are_those_of_outputs_at_once():
  whole, chunked, three = (
    dry_run.matmul_flops(*program(*args))[1]
    for args in ((None, 64), (8, 64), (8, 64, 3))
  )
  assert chunked == whole
  # A second draw computes the head again, but not the layer.
  tokens, head, layer = 16 * 32, 2 * 4 * 64, 2 * 4 * 4
  assert three - chunked == 2 * tokens * (3 * head + 2 * layer)


@pytest.mark.parametrize(
  ('num_chunks', 'extra', 'match'),
  [
    (None, {'head_fn': head_fn}, 'got only head_fn. Pass num_chunks=8'),
    (2, {}, 'got only num_chunks=2. .* head_fn='),
    (
      2,
      {'head_fn': head_fn, 'label_mask': np.ones((2, 2), bool)},
      'for broadcasting',
    ),
  ],
)
def test_errors(num_chunks, extra, match):
  with pytest.raises(ValueError, match=match):
    oracles.estimate(
      estimator_of(num_chunks=num_chunks), PARAMS, predict_fn=hidden_fn, **extra
    )
