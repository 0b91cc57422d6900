"""NNX and Equinox give the numbers of a plain tree; wrappers of optax."""

import pathlib
import re

import chex
import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax

pytestmark = pytest.mark.usefixtures('compile_fast')

STEPS = 3
X = jax.random.normal(jax.random.key(1), (16, 4))
LABELS = jnp.argmax(X[:, :3], axis=-1)

TX = sophia_optax.sophia_g(0.05, update_interval=2)


def cross_entropy(logits):
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
  )


def train_plain(predict_fn, params):
  """Returns parameters and state after some steps with a plain tree."""

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: cross_entropy(predict_fn(p)))(params)
    updates, state = TX.update(grads, state, params, predict_fn=predict_fn)
    return optax.apply_updates(params, updates), state

  state = TX.init(params)
  for _ in range(STEPS):
    params, state = step(params, state)
  return params, state


def assert_close(trees, others):
  """Compares the leaves in order; containers may differ."""
  for x, y in zip(*map(jax.tree.leaves, (trees, others)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(others)) > 0


class NNXModel(nnx.Module):
  def __init__(self, dropout_rate):
    rngs = nnx.Rngs(0)
    # A bias before the normalization has a gradient of rounding errors only.
    self.hidden = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
    self.logits = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.hidden(x)))
    return self.logits(self.dropout(x))


def predict_with_plain_tree(params):
  x = X @ params['hidden']['kernel']
  x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
  x = jax.nn.relu(x * params['norm']['scale'] + params['norm']['bias'])
  return x @ params['logits']['kernel'] + params['logits']['bias']


@nnx.jit
def nnx_step(model, optimizer):
  grads = nnx.grad(lambda model: cross_entropy(model(X)))(model)

  def predict_fn(params):
    copy = nnx.clone(model)
    nnx.update(copy, params)
    return copy(X)

  optimizer.update(model, grads, predict_fn=predict_fn)


@pytest.mark.slow
def test_nnx():
  model = NNXModel(dropout_rate=0.0)
  plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
  for _ in range(STEPS):
    nnx_step(model, optimizer)

  params, state = train_plain(predict_with_plain_tree, plain)
  assert_close(nnx.state(model, nnx.Param), params)
  moments = optimizer.opt_state[0]
  assert_close((moments.mu, moments.nu), (state[0].mu, state[0].nu))


def test_nnx_curvature_does_not_change_the_model():
  """Sophia's forward passes change no statistics and no random numbers."""
  model = NNXModel(dropout_rate=0.5)
  other = nnx.clone(model)
  nnx_step(model, nnx.Optimizer(model, TX, wrt=nnx.Param))
  other(X)
  for kind in (nnx.BatchStat, nnx.RngCount):
    got, expected = nnx.state(model, kind), nnx.state(other, kind)
    assert jax.tree.leaves(got)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


class EquinoxModel(eqx.Module):
  layers: list[eqx.nn.Linear]
  num_calls: jax.Array  # An integer, which has no gradient.
  activation: str = eqx.field(static=True)

  def __call__(self, x):  # (4,)
    x = getattr(jax.nn, self.activation)(self.layers[0](x))
    return self.layers[1](x)  # (3,)


def test_equinox():
  keys = jax.random.split(jax.random.key(0))
  model = EquinoxModel(
    layers=[
      eqx.nn.Linear(4, 5, key=keys[0]),
      eqx.nn.Linear(5, 3, use_bias=False, key=keys[1]),
    ],
    num_calls=jnp.array(7),
    activation='gelu',
  )
  plain = [model.layers[0].weight, model.layers[0].bias, model.layers[1].weight]

  @eqx.filter_jit
  def step(model, state):
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    predict_fn = lambda params: jax.vmap(eqx.combine(params, rest))(X)
    grads = eqx.filter_grad(lambda p: cross_entropy(predict_fn(p)))(params)
    updates, state = TX.update(grads, state, params, predict_fn=predict_fn)
    return eqx.apply_updates(model, updates), state

  state = TX.init(eqx.filter(model, eqx.is_inexact_array))
  for _ in range(STEPS):
    model, state = step(model, state)

  def predict_with_plain_list(params):
    first, bias, second = params
    return jax.nn.gelu(X @ first.T + bias) @ second.T

  params, expected = train_plain(predict_with_plain_list, plain)
  assert_close(eqx.filter(model, eqx.is_inexact_array), params)
  assert_close((state[0].mu, state[0].nu), (expected[0].mu, expected[0].nu))
  assert model.num_calls == 7
  assert model.layers[1].bias is None


FORWARDING = {
  'chain': lambda tx: optax.chain(optax.clip(1.0), tx),
  'named_chain': lambda tx: optax.named_chain(('sophia', tx)),
  'masked': lambda tx: optax.masked(tx, True),
  'partition': lambda tx: optax.partition({'all': tx}, 'all'),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 2),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 1),
  'conditionally_transform': lambda tx: optax.conditionally_transform(
    tx, lambda step, **_: step < 1
  ),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(lambda: tx)(),
  'contrib.schedule_free': lambda tx: optax.contrib.schedule_free(tx, 0.1),
  'contrib.mechanize': optax.contrib.mechanize,
}
REFUSING = {
  'lookahead': lambda tx: optax.lookahead(tx, 2, 0.5),
  'contrib.sam': lambda tx: optax.contrib.sam(tx, optax.sgd(0.1), 2),
  'contrib.split_real_and_imaginary': optax.contrib.split_real_and_imaginary,
}


def test_the_page_names_these_wrappers():
  page = (
    pathlib.Path(__file__).parents[1] / 'docs/integrations.md'
  ).read_text()
  forward, refuse = re.search(
    r'forward the arguments:(.*?)These raise a `TypeError`:(.*?)\.\s',
    page,
    re.S,
  ).groups()
  assert re.findall(r'`(.*?)`', forward) == list(FORWARDING)
  assert re.findall(r'`(.*?)`', refuse) == list(REFUSING)


@pytest.mark.parametrize('name', FORWARDING | REFUSING)
def test_wrappers_that_forward_arguments(name):
  params = {'w': jnp.ones(3)}
  received = []

  def update_fn(updates, state, params=None, **extra_args):
    received.append(extra_args)
    return updates, state

  tx = (FORWARDING | REFUSING)[name](
    optax.GradientTransformationExtraArgs(optax.identity().init, update_fn)
  )
  init = optax.LookaheadParams.init_synced if name == 'lookahead' else dict

  def update():
    wrapped = init(params)
    tx.update(params, tx.init(wrapped), wrapped, predict_fn=jnp.sum)

  with jax.numpy_dtype_promotion('standard'):  # Some wrappers need it.
    if name in FORWARDING:
      update()
      assert any(args.get('predict_fn') is jnp.sum for args in received)
    else:
      with pytest.raises(TypeError, match='predict_fn'):
        update()
