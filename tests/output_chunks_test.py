"""Compares Gauss-Newton-Bartlett in chunks with all outputs at once."""

import functools
import itertools

import chex
from devices import map_grid
from devices import MAPS
from devices import maps
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import dry_run
import sophia_optax
from sophia_optax import likelihoods

estimator_of = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
# Not random, so the estimate does not depend on the chunks.
likeliest = likelihoods.categorical._replace(
  sample=lambda key, logits: jnp.argmax(logits, axis=-1)
)


def make_params(dtype=jnp.float32):
  """Returns tied embeddings of four words in three channels, and one layer."""
  rng = np.random.default_rng(0)
  return {
    'table': jnp.asarray(rng.normal(size=(4, 3)), dtype),
    'layer': jnp.asarray(rng.normal(size=(3, 3)), dtype),
    'bias': jnp.asarray(rng.normal(size=4), dtype),
  }


def hidden_fn(params, tokens):  # (...) -> (..., 3)
  x = params['table'][tokens]
  return jnp.tanh(x @ params['layer'])


def head_fn(params, hidden):  # (..., 3) -> (..., 4)
  logits = hidden @ params['table'].T
  return logits + jnp.broadcast_to(params['bias'], logits.shape)


def logits_fn(params, tokens):
  return head_fn(params, hidden_fn(params, tokens))


def estimate(num_chunks, tokens, params=None, part=lambda e: e, **kwargs):
  """Returns one estimate. num_chunks=None computes all outputs at once."""
  params = make_params() if params is None else params
  update_args = {
    name: kwargs.pop(name)
    for name in ('label_mask', 'loss_scale', 'full_params')
    if name in kwargs
  }
  predict_fn = logits_fn
  if num_chunks is not None:
    predict_fn = hidden_fn
    update_args['head_fn'] = head_fn
  if kwargs.get('has_aux'):
    predict_fn = lambda *args, fn=predict_fn: (fn(*args), 'aux')
  estimator = part(estimator_of(num_chunks=num_chunks, **kwargs))
  return estimator.update(
    None,
    estimator.init(params),
    params,
    predict_fn=predict_fn,
    batch=tokens,
    **update_args,
  )


TOKENS = jnp.array([[0, 1, 2, 3], [3, 1, 0, 2]])  # (B, T)


CASES = {
  'sequence': ((1, 4), 2, None),
  'batch': ((4,), 2, None),
  'one_each': ((4,), 4, None),
  'three': ((3, 2), 2, None),
  'masked': ((4,), 2, [True, False, True, True]),
  'masked_broadcast': ((2, 2), 2, [[True], [False]]),
  'masked_chunk': ((4,), 2, [True, False, True, False]),
  'all_masked': ((2,), 2, [False, False]),
}


@pytest.mark.parametrize(
  'case',
  [
    case
    if case in ('batch', 'three', 'masked_chunk')
    else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
def test_mean_over_all_labels_is_the_gauss_newton_diagonal(case):
  shape, num_chunks, mask = CASES[case]
  with jax.enable_x64(True):
    params = make_params(jnp.float64)
    size = int(np.prod(shape))
    # All predictions differ, so logits identify the prediction.
    table = jnp.asarray(np.random.default_rng(1).normal(size=(size, 3)))
    inputs = table.reshape(*shape, 3)

    def hidden_fn(params):
      return jnp.tanh(inputs @ params['layer'])

    logits = head_fn(params, hidden_fn(params)).reshape(size, 4)
    p = np.array(jax.nn.softmax(logits))
    labels = np.array(list(itertools.product(range(4), repeat=size)))
    weights = np.prod(p[np.arange(size), labels], axis=1)
    extra = {} if mask is None else {'label_mask': jnp.array(mask)}

    def estimate(labels):
      def sample(key, z):
        distance = jnp.abs(z[..., None, :] - logits).sum(axis=-1)
        return labels[jnp.argmin(distance, axis=-1)]

      likelihood = likelihoods.categorical._replace(sample=sample)
      estimator = estimator_of(likelihood=likelihood, num_chunks=num_chunks)
      return estimator.update(
        None,
        estimator.init(params),
        params,
        predict_fn=hidden_fn,
        head_fn=head_fn,
        **extra,
      )[0]

    estimates = jax.jit(jax.vmap(estimate))(jnp.asarray(labels))
    actual = jax.tree.map(lambda e: jnp.tensordot(weights, e, 1), estimates)

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(
      lambda x: head_fn(unravel(x), hidden_fn(unravel(x))).reshape(size, 4)
    )(flat)
    metric = p[:, :, None] * np.eye(4) - p[:, :, None] * p[:, None, :]
    counts = jnp.broadcast_to(True if mask is None else jnp.array(mask), shape)
    per_prediction = jnp.einsum('bcp,bcd,bdp->bp', jacobian, metric, jacobian)
    counts = counts.ravel().astype(p.dtype)
    expected = unravel(counts @ per_prediction / jnp.maximum(counts.sum(), 1))
    chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize('num_samples', [1, 2])
def test_one_chunk_has_the_bits_of_outputs_at_once(num_samples):
  whole, one = (
    jax.jit(functools.partial(estimate, n, num_samples=num_samples))(TOKENS)
    for n in (None, 1)
  )
  chex.assert_trees_all_equal(one, whole)


OPTIONS = {
  'plain': {},
  'mask': {'label_mask': jnp.array([[True, False, True, True]])},
  'column_mask': {'label_mask': jnp.array([[True], [False]])},
  'num_samples': {'num_samples': 2},
  'has_aux': {'has_aux': True},
  'loss_scale': {'loss_scale': 2.0**10},
  'microbatched': {'part': lambda e: sophia_optax.microbatched(e, 2)},
}


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize(
  'num_chunks', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_chunks_change_nothing_but_the_labels(option, num_chunks):
  whole, chunked = (
    estimate(n, TOKENS, likelihood=likeliest, **OPTIONS[option])[0]
    for n in (None, num_chunks)
  )
  chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  'dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)]
)
def test_half_precision(dtype):
  # A sum of 2,048 chunks would stall in half precision.
  narrow = make_params(jnp.dtype(dtype))
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
  tokens = jnp.zeros(4096, jnp.int32)
  chunked, exact = (
    estimate(n, tokens, params, likelihood=likeliest)[0]
    for n, params in ((2048, narrow), (None, wide))
  )
  chex.assert_trees_all_close(chunked['bias'], exact['bias'], rtol=0.02)
  chex.assert_trees_all_equal_dtypes(chunked, exact)


def test_leaves_of_every_kind():
  params = make_params() | {
    'complex': jnp.array([1.0 + 2.0j, 0.5 - 1.0j]),
    'int': jnp.array([3]),
    'none': None,
  }

  def hidden_fn(p):  # (4, 2)
    return jnp.outer(jnp.arange(1.0, 5.0), p['complex'].real)

  def head_fn(p, hidden):  # (..., 2)
    return hidden * p['complex'].imag.reshape((1,) * (hidden.ndim - 1) + (2,))

  update = lambda e, **fns: e.update(None, e.init(params), params, **fns)[0]
  make = functools.partial(estimator_of, likelihood=likeliest)
  whole = update(make(), predict_fn=lambda p: head_fn(p, hidden_fn(p)))
  chunked = update(make(num_chunks=2), predict_fn=hidden_fn, head_fn=head_fn)
  chex.assert_trees_all_close(chunked, whole, rtol=1e-6)
  chex.assert_trees_all_equal_dtypes(chunked, whole)


def test_hidden_parameters():
  params = make_params()
  hide = lambda tree: tree | {'table': optax.MaskedNode()}
  full = estimate(2, TOKENS, likelihood=likeliest)[0]
  visible = estimate(
    2, TOKENS, hide(params), likelihood=likeliest, full_params=params
  )[0]
  chex.assert_trees_all_close(visible, hide(full), rtol=1e-6)


def numbers(estimator, hidden, **kwargs):
  """Returns squared scores, for a model that outputs its parameters."""
  return estimator.update(
    None,
    estimator.init(hidden),
    hidden,
    predict_fn=lambda p: p,
    head_fn=lambda p, hidden: hidden,
    **kwargs,
  )[0]


def noise(key, outputs):
  return jax.random.normal(key, outputs.shape, outputs.dtype)


def test_chunks_draw_independently():
  estimator = estimator_of(likelihood=noise, num_chunks=4)
  drawn = numbers(estimator, jnp.ones((2, 8, 3)))
  assert np.unique(drawn).size == drawn.size


@maps
def test_keys_of_replicas_and_chunks(map_name):
  params = jnp.ones((4, 3))
  estimator = estimator_of(likelihood=noise, num_chunks=2, axis_name='data')
  drawn = MAPS[map_name](lambda params, _: numbers(estimator, params))(params)

  _, subkey = jax.random.split(estimator.init(params).key)
  squares = np.zeros((8, 4, 3))
  for device in range(8):
    keys = jax.random.split(jax.random.fold_in(subkey, device))
    for chunk, key in enumerate(keys):  # Rows 0 and 2, then 1 and 3.
      scores = np.asarray(jax.random.normal(key, (2, 3)))
      squares[device, chunk::2] = scores**2 / 12  # B = 12 numbers.
  for device in range(8):
    np.testing.assert_allclose(drawn[device], squares.mean(0), rtol=1e-5)


def test_parts_of_divided_predictions_draw_independently():
  estimator = estimator_of(likelihood=noise, num_chunks=2)
  drawn = map_grid(
    lambda own: numbers(estimator, own),
    jnp.ones((16, 3)),
    specs=P('model'),
    out_specs=P('model'),
  )
  assert np.unique(drawn).size == drawn.size
  np.testing.assert_allclose(drawn.mean(), 1 / drawn.size, rtol=0.5)


def test_predictions_divided_over_another_axis_are_one_estimate():
  # Rows of 'data' are replicas, columns of 'model' have parts of sequences.
  params = make_params()
  tokens = jnp.tile(TOKENS, (4, 4))  # (8, 16)

  def update(num_chunks, params, tokens):
    return estimate(
      num_chunks, tokens, params, likelihood=likeliest, axis_name='data'
    )[0]

  whole, chunked = (
    map_grid(
      functools.partial(update, n),
      params,
      tokens,
      specs=(P(), P('data', 'model')),
      out_specs=P(),
    )
    for n in (None, 2)
  )
  chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)
  one = estimate(None, tokens, params, likelihood=likeliest)[0]
  # Both replicas have the same sum S of scores, and S²/B is their mean. One
  # estimate of all has (2 S)²/(2 B).
  chex.assert_trees_all_close(
    chunked, jax.tree.map(lambda x: x / 2, one), rtol=1e-4, atol=1e-6
  )


def test_vocabulary_divided_over_another_axis():
  params = make_params()

  def update(num_chunks, table, layer, tokens):
    head = lambda p, hidden: jax.lax.all_gather(
      hidden @ p['table'].T, 'model', axis=-1, tiled=True
    )
    hidden = lambda p: jnp.tanh(jax.nn.one_hot(tokens, 3) @ p['layer'])
    p = {'layer': layer, 'table': table}
    estimator = estimator_of(
      likelihood=likeliest, num_chunks=num_chunks, axis_name='data'
    )
    fns = {'predict_fn': lambda p: head(p, hidden(p))}
    if num_chunks:
      fns = {'predict_fn': hidden, 'head_fn': head}
    return estimator.update(None, estimator.init(p), p, **fns)[0]['table']

  whole, chunked = (
    map_grid(
      functools.partial(update, n),
      params['table'],
      params['layer'],
      jnp.tile(TOKENS, (1, 2)),
      specs=(P('model'), P(), P('data')),
      out_specs=P('model'),
    )
    for n in (None, 2)
  )
  chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)


@maps
def test_replicas(map_name):
  def update(num_chunks, params, shard):
    tokens = jnp.argmax(shard, axis=-1)  # (4,)
    return estimate(
      num_chunks, tokens, params, likelihood=likeliest, axis_name='data'
    )[0]

  whole, chunked = (
    MAPS[map_name](functools.partial(update, n))(make_params())
    for n in (None, 2)
  )
  chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)


def program(num_chunks, num_classes, num_samples=1):
  """Returns an estimate on 16 × 32 tokens and the shapes of its arguments."""
  estimator = estimator_of(num_chunks=num_chunks, num_samples=num_samples)
  params = {
    'table': jax.ShapeDtypeStruct((num_classes, 4), jnp.float32),
    'layer': jax.ShapeDtypeStruct((4, 4), jnp.float32),
  }
  tokens = jax.ShapeDtypeStruct((16, 32), jnp.int32)
  head_fn = lambda p, hidden: hidden @ p['table'].T

  def update(params, tokens):
    fns = {'predict_fn': lambda p: head_fn(p, hidden_fn(p, tokens))}
    if num_chunks is not None:
      fns = {'predict_fn': lambda p: hidden_fn(p, tokens), 'head_fn': head_fn}
    return estimator.update(None, estimator.init(params), params, **fns)[0]

  return update, params, tokens


def temp_bytes(update, *args):
  memory = jax.jit(update).lower(*args).compile().memory_analysis()
  return memory.temp_size_in_bytes


@pytest.mark.slow
def test_memory_that_grows_with_classes_is_divided_by_the_chunks():
  growth = {}
  for num_chunks in (None, 8):
    sizes = [temp_bytes(*program(num_chunks, c)) for c in (2048, 4096)]
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


ERRORS = {
  'alone': (
    {},
    {'head_fn': head_fn},
    ValueError,
    'got only head_fn. Pass num_chunks=8',
  ),
  'no_head': (
    {'num_chunks': 2},
    {},
    ValueError,
    'got only num_chunks=2. .* head_fn=',
  ),
  'divides': (
    {'num_chunks': 3},
    {'head_fn': head_fn},
    ValueError,
    r'num_chunks=3 equal chunks, got shape \(2, 4, 3\) with N = 4. Choose',
  ),
  'no_axis': (
    {'num_chunks': 2},
    {'head_fn': head_fn, 'predict_fn': lambda p: p['bias']},
    ValueError,
    r'hidden states \(..., N, D\) .* got shape \(4,\) without an axis of N',
  ),
  'rank': (
    {'num_chunks': 2},
    {'head_fn': lambda p, hidden: hidden.sum(-1)},
    TypeError,
    r'shape \(2, 2, classes\) from .* shape \(2, 2, 3\), got shape \(2, 2\)',
  ),
  'reshaped': (
    {'num_chunks': 1},
    {'head_fn': lambda p, hidden: hidden.reshape(-1, 3)},
    TypeError,
    r'shape \(2, 4, classes\) from .* got shape \(8, 3\). Replace',
  ),
  'integers': (
    {'num_chunks': 2},
    {'head_fn': lambda p, hidden: jnp.argmax(hidden, -1)},
    TypeError,
    'head_fn must return one real floating point array.* got int32',
  ),
  'tuple': (
    {'num_chunks': 2},
    {'head_fn': lambda p, hidden: (hidden, 1)},
    TypeError,
    r'head_fn must return .* got a tuple. Return that array alone, .* it\.\n',
  ),
  'arguments': (
    {'num_chunks': 2},
    {'head_fn': lambda hidden: hidden},
    TypeError,
    r'head_fn was called as head_fn\(params, hidden\)',
  ),
  'mask': (
    {'num_chunks': 2},
    {'head_fn': head_fn, 'label_mask': jnp.ones((2, 2), bool)},
    ValueError,
    r'the shape \(2, 4\) of the predictions, got shape \(2, 2\)',
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors(case):
  kwargs, extra_args, error, match = ERRORS[case]
  estimator = estimator_of(**kwargs)
  tx = sophia_optax.sophia_g(hessian_diagonal_fn=estimator)
  params = make_params()
  state = tx.init(params)
  before = jax.tree.map(np.array, state)
  extra_args = {'predict_fn': lambda p: hidden_fn(p, TOKENS)} | extra_args
  update = lambda state: tx.update(params, state, params, **extra_args)
  for fn in (update, jax.jit(update)):
    with pytest.raises(error, match=match):
      fn(state)
  chex.assert_trees_all_equal(before, state)


@pytest.mark.parametrize('num_chunks', [0, 1.5])
def test_number_of_chunks(num_chunks):
  with pytest.raises(ValueError, match='num_chunks must be a number'):
    estimator_of(num_chunks=num_chunks)
