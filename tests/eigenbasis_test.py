"""`in_eigenbasis` against reparametrized problems and dense Hessians."""

import functools

import chex
from devices import mesh
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
import oracles
import pytest

import hlo
import sophia_optax

in_eigenbasis = sophia_optax.in_eigenbasis
KEY = jax.random.PRNGKey(0)
PARAMS = {
  'kernel': jax.random.normal(KEY, (4, 8)),
  'layers': jax.random.normal(KEY, (2, 3, 4)),
  'embedding': jax.random.normal(KEY, (5, 4)),
  'bias': jnp.ones(3),
}


def orthogonal(shape, seed=3):
  return jnp.linalg.qr(jax.random.normal(jax.random.key(seed), shape))[0]


def with_random_bases(state):
  """Returns a state in a fixed basis: no refresh is due on its steps."""
  bases = jax.tree.map(lambda b: orthogonal(b.shape), state.bases)
  return state._replace(bases=bases, count=jnp.int32(21))


def in_fixed_basis(inner):
  return in_eigenbasis(inner, update_interval=10_000)


def train(tx, gradients, state=None):
  """Returns the updates for a sequence of gradients, and the final state."""

  def step(state, grads):
    updates, state = tx.update(grads, state, PARAMS)
    return state, updates

  state = tx.init(PARAMS) if state is None else state
  with jax.numpy_dtype_promotion('standard'):  # optax's Adam needs it.
    run = jax.jit(lambda *a: jax.lax.scan(step, *a))
    state, updates = run(state, gradients)
  return updates, state


def random_gradients(num_steps):
  # Large along one direction, so that the basis matters.
  def make(x):
    noise = jax.random.normal(KEY, (num_steps, *x.shape))
    return noise + 5 * jnp.sum(noise, axis=-1, keepdims=True)

  return jax.tree.map(make, PARAMS)


# The definition.


@pytest.mark.parametrize('block_size', [1, 2, 1024])
def test_momentum_does_not_notice(block_size):
  inner = optax.trace(0.9, nesterov=True)
  gradients = random_gradients(25)
  plain, _ = train(inner, gradients)
  rotated, state = train(in_eigenbasis(inner, block_size=block_size), gradients)
  chex.assert_trees_all_close(rotated, plain, rtol=1e-4, atol=1e-3)
  if block_size > 1:
    moved = np.abs(state.bases['kernel'][0] - jnp.eye(min(block_size, 4)))
    assert np.max(moved) > 0.1


def numpy_soap(gradients, b1, b2, eps, interval, decay):
  """Returns updates of Adam in the basis of one matrix, one step at a time."""
  m, n = gradients.shape[1:]
  left, right, p, q = np.zeros((m, m)), np.zeros((n, n)), np.eye(m), np.eye(n)
  mean, square, updates = np.zeros((m, n)), np.zeros((m, n)), []
  for t, g in enumerate(gradients.astype(np.float64)):
    if t < 20 or t % interval == 0:
      old = p @ mean @ q.T
      if t > 0:
        p, q = np.linalg.qr(left @ p)[0], np.linalg.qr(right @ q)[0]
      mean = p.T @ old @ q
      left = decay * left + (1 - decay) * g @ g.T
      right = decay * right + (1 - decay) * g.T @ g
    rotated = p.T @ g @ q
    mean = b1 * mean + (1 - b1) * rotated
    square = b2 * square + (1 - b2) * rotated**2
    ratio = mean / (1 - b1 ** (t + 1))
    ratio /= np.sqrt(square / (1 - b2 ** (t + 1))) + eps
    updates.append(p @ ratio @ q.T)
  return np.array(updates)


def test_adam_in_the_eigenbasis_is_a_transcript_of_soap():
  numbers = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-3}
  gradients = random_gradients(50)
  tx = in_eigenbasis(
    optax.scale_by_adam(**numbers),
    update_interval=7,
    decay=0.7,
    weight_dimension_numbers=lambda params: {
      'kernel': None,
      'layers': MuonDimensionNumbers(-2, -1),
      'embedding': MuonDimensionNumbers(),
      'bias': None,
    },
  )
  updates, _ = train(tx, gradients)
  numpy_updates = functools.partial(
    numpy_soap, **numbers, interval=7, decay=0.7
  )
  for layer in (0, 1):
    np.testing.assert_allclose(
      updates['layers'][:, layer],
      numpy_updates(np.array(gradients['layers'][:, layer])),
      atol=5e-3,
    )
  np.testing.assert_allclose(
    updates['embedding'],
    numpy_updates(np.array(gradients['embedding'])),
    atol=5e-3,
  )
  adam, _ = train(optax.scale_by_adam(**numbers), gradients)
  chex.assert_trees_all_close(
    [updates['kernel'], updates['bias']],
    [adam['kernel'], adam['bias']],
    atol=1e-6,
  )


def rotated_problem(loss, bases, params):
  """Returns loss and parameters in fixed bases, made by hand."""
  turn = lambda a, x, b: jnp.einsum('ij,jk,lk->il', a, x, b)
  forward = {k: turn(p[0].T, params[k], q[0].T) for k, (p, q) in bases.items()}
  back = lambda t: {k: turn(p[0], t[k], q[0]) for k, (p, q) in bases.items()}
  return lambda t: loss(back(t)), forward, back


def network_loss(params):
  return oracles.network_loss(params, jnp.float32)


def test_in_a_fixed_basis_it_optimizes_the_reparametrized_problem():
  inner = sophia_optax.scale_by_sophia(
    gamma=0.5, adam_b2=0.9, update_interval=2, target_win_rate=0.3
  )
  tx, params = in_fixed_basis(inner), oracles.NETWORK
  state = with_random_bases(tx.init(params))
  loss, theta, back = rotated_problem(network_loss, state.bases, params)

  def run(tx, loss, params, state):
    @jax.jit
    def step(params, state):
      updates, state = tx.update(
        jax.grad(loss)(params), state, params, obj_fn=loss
      )
      return optax.tree.add_scale(params, -0.1, updates), state

    for _ in range(6):
      params, state = step(params, state)
    return params, state

  got, state = run(tx, network_loss, params, state)
  theta, expected = run(inner, loss, theta, inner.init(theta))
  chex.assert_trees_all_close(got, back(theta), atol=1e-4)
  chex.assert_trees_all_close(state.inner_state.nu, expected.nu, atol=1e-4)


# Curvature in the basis.


def curvature_in_basis(make_estimator, params, draws, **extra_args):
  """Returns bases, and estimates of the diagonal in them, one for each draw."""

  def estimate(draw):
    tx = in_fixed_basis(
      sophia_optax.scale_by_sophia(
        b2=0.0, hessian_diagonal_fn=make_estimator(draw)
      )
    )
    state = with_random_bases(tx.init(params))
    _, new = tx.update(params, state, params, **extra_args)
    return new.bases, oracles.flat(new.inner_state.nu)

  bases, found = jax.jit(jax.vmap(estimate))(draws)
  return jax.tree.map(lambda b: b[0], bases), np.array(found, np.float64)


def test_hutchinson_is_unbiased_over_all_signs():
  params = oracles.NETWORK
  bases, found = curvature_in_basis(
    sophia_optax.hutchinson_estimator_diag_hessian,
    params,
    oracles.all_signs(),
    obj_fn=network_loss,
  )
  loss, theta, _ = rotated_problem(network_loss, bases, params)
  expected = np.diag(oracles.hessian(loss, theta))
  np.testing.assert_allclose(found.mean(0), expected, atol=1e-5)
  plain = np.diag(oracles.hessian(network_loss, params))
  assert np.max(np.abs(expected - plain)) > 0.01


def test_gauss_newton_bartlett_is_unbiased_over_all_labels():
  inputs = jnp.array([[1.0, -0.5], [0.3, 2.0]])
  params = {'w': jnp.array([[0.5, -1.0, 0.2], [-0.7, 0.1, 0.9]])}
  predict_fn = lambda p: inputs @ p['w']
  logits = predict_fn(params)
  labels = np.stack(np.meshgrid(*2 * [range(3)]), -1).reshape(-1, 2)
  chances = np.prod(np.array(jax.nn.softmax(logits))[range(2), labels], axis=1)

  def make_estimator(labels):
    planted = sophia_optax.likelihoods.categorical._replace(
      sample=lambda key, outputs: labels
    )
    return sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
      likelihood=planted
    )

  bases, found = curvature_in_basis(
    make_estimator, params, labels, predict_fn=predict_fn
  )
  predict, theta, _ = rotated_problem(predict_fn, bases, params)
  outputs, jacobian = oracles.outputs_and_jacobian(predict, theta, classes=3)
  fisher = oracles.FISHER['categorical'](
    outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
  )
  expected = oracles.gauss_newton(jacobian, fisher)
  np.testing.assert_allclose(chances @ found, expected, rtol=1e-4)


def least_squares(is_rotated, wrap, size=8, condition=100, num_steps=400):
  """Returns the final loss, relative to the initial one, of Sophia-G.

  The curvature lies along the axes of the matrix, or is rotated on both sides.
  """
  left, right = (
    orthogonal((size, size), seed) if is_rotated else jnp.eye(size)
    for seed in (1, 2)
  )
  scales = condition ** -jnp.linspace(0.0, 1.0, size)
  inputs, outputs = scales[:, None] * left.T, right * scales
  solution = left @ jax.random.normal(KEY, (size, size)) @ right.T
  tx = wrap(
    sophia_optax.scale_by_sophia(
      b1=0.9,
      b2=0.9,
      gamma=1.0,
      update_interval=1,
      nu_bias_correction=True,
      refresh_before_update=True,
      hessian_diagonal_fn=(
        sophia_optax.gauss_newton_bartlett_estimator_diag_hessian(
          likelihood='gaussian'
        )
      ),
    )
  )

  def step(carry, t):
    w, state = carry
    x = jax.random.normal(jax.random.fold_in(KEY, t), (64, size)) @ inputs
    predict = lambda w: x @ w @ outputs
    loss = lambda w: jnp.sum(predict(w - solution) ** 2) / (2 * len(x))
    updates, state = tx.update(jax.grad(loss)(w), state, w, predict_fn=predict)
    return (
      w - 0.3 * (1 - t.astype(jnp.float32) / num_steps) * updates,
      state,
    ), None

  w = jnp.zeros((size, size))
  (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), jnp.arange(num_steps))
  excess = lambda w: jnp.sum((inputs @ (w - solution) @ outputs) ** 2)
  return excess(w) / excess(jnp.zeros_like(w))


@pytest.mark.parametrize('is_rotated', [False, True])
def test_sophia_solves_least_squares_of_a_rotated_matrix(is_rotated):
  wrap = lambda tx: in_eigenbasis(tx, update_interval=1, decay=0.95)
  losses = [least_squares(is_rotated, w) for w in (lambda tx: tx, wrap)]
  assert losses[1] < 1e-11
  assert losses[0] > 1e-5 if is_rotated else losses[0] < 1e-11


# When the basis changes.


def basis_changes(tx, num_steps, **extra_args):
  """Returns the steps on which the basis of the kernel differs from before."""
  gradients = random_gradients(num_steps)
  with jax.numpy_dtype_promotion('standard'):
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS, **extra_args)[1])
    state, changed = tx.init(PARAMS), []
    for t in range(num_steps):
      new = update(jax.tree.map(lambda g, t=t: g[t], gradients), state)
      old, now = (optax.tree.get(s, 'bases')['kernel'][0] for s in (state, new))
      if np.any(old != now):
        changed.append(t)
      state = new
  return changed


@pytest.mark.parametrize(
  ('extra_args', 'expected'),
  [
    # The factors are zero on step 0, and the basis stays the identity.
    ({}, [*range(1, 20), 21, 24]),
    ({'refresh': True}, [*range(1, 25)]),
    ({'refresh': False}, []),
    ({'may_refresh': jnp.array(False)}, []),
  ],
)
def test_basis_changes_on_each_of_20_steps_and_then_every_k(
  extra_args, expected
):
  tx = in_eigenbasis(optax.scale_by_adam(), update_interval=3)
  assert basis_changes(tx, 25, **extra_args) == expected


def test_accumulation_changes_the_basis_once_a_step():
  tx = in_eigenbasis(optax.scale_by_adam(), update_interval=3)
  tx = sophia_optax.MultiSteps(tx, 3).gradient_transformation()
  # Steps end on the micro-steps 2, 5, 8, ....
  assert basis_changes(tx, 12) == [5, 8, 11]


def test_refresh_and_functions_reach_the_inner_transformation():
  seen = []

  def update(updates, state, params=None, **extra_args):
    seen.append(extra_args)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
  tx = in_fixed_basis(inner)
  params = {'w': PARAMS['kernel']}
  state = with_random_bases(tx.init(params))
  first = lambda p, *args, scale=1.0: (p['w'], args, scale)
  names = 'obj_fn', 'predict_fn', 'head_fn', 'value_fn'
  tx.update(
    params,
    state,
    params,
    refresh=False,
    batch=3,
    grad=params,
    **dict.fromkeys(names, first),
  )
  (got,) = seen
  assert got['refresh'] is False
  assert got['batch'] == 3
  assert 'may_refresh' not in got
  for name in names:
    w, args, scale = got[name](got['grad'], 'x', scale=2.0)
    np.testing.assert_allclose(w, params['w'], atol=1e-5)
    assert (args, scale) == (('x',), 2.0)


# Other leaves, and masks.


def test_leaves_of_other_kinds_pass_through():
  params = {
    'half': jnp.ones((2, 2), jnp.bfloat16),
    'int': jnp.ones((2, 2), jnp.int32),
    'complex': jnp.ones((2, 2), jnp.complex64),
    'empty': jnp.ones((0, 2)),
    'none': None,
  }
  tx = in_eigenbasis(sophia_optax.scale_by_sophia())
  state = tx.init(params)
  assert [name for name, bases in state.bases.items() if bases] == ['half']
  assert state.bases['half'][0].dtype == jnp.float32
  obj_fn = lambda p: jnp.sum(p['half'].astype(jnp.float32) ** 2)
  for _ in range(2):
    updates, state = tx.update(params, state, params, obj_fn=obj_fn)
  chex.assert_trees_all_equal_dtypes(updates, params)
  assert np.all(updates['half'] != 0)
  np.testing.assert_array_equal(updates['int'], 0)
  np.testing.assert_allclose(updates['complex'].real, 1.0)


def test_hidden_parameters_and_masks_inside():
  params = {'w': PARAMS['kernel'], 'v': PARAMS['kernel'] + 1}
  loss = lambda p: jnp.sum(jnp.cosh(p['w'])) + jnp.sum(p['w'] * p['v'] ** 2)
  sophia = sophia_optax.scale_by_sophia(b2=0.0)
  only_w = {'w': True, 'v': False}
  outside = optax.masked(in_fixed_basis(sophia), only_w)
  inside = in_fixed_basis(optax.masked(sophia, only_w))

  def curvature(tx):
    state = tx.init(params)
    own = state.inner_state if isinstance(state, optax.MaskedState) else state
    own = with_random_bases(own)
    if isinstance(state, optax.MaskedState):
      own = state._replace(inner_state=own)
    _, new = tx.update(params, own, params, obj_fn=loss, full_params=params)
    return optax.tree.get(new, 'nu')['w']

  nu = curvature(outside)
  assert np.all(nu != 0)
  np.testing.assert_allclose(nu, curvature(inside), rtol=1e-3, atol=1e-3)


# Faults, devices, populations.


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e25])
def test_a_gradient_that_is_not_finite_never_gets_into_the_basis(value):
  gradients = random_gradients(6)
  broken = {k: g.at[2].set(value) for k, g in gradients.items()}
  tx = in_eigenbasis(optax.identity(), update_interval=1)
  _, state = train(tx, broken)
  kept = [0, 1, 3, 4, 5]
  _, expected = train(tx, jax.tree.map(lambda g: g[kept, ...], gradients))
  chex.assert_tree_all_finite(state)
  chex.assert_trees_all_close(state.factors, expected.factors, rtol=1e-5)


def test_bases_are_equal_on_replicas_and_as_on_one_device():
  tx = in_eigenbasis(optax.trace(0.9), update_interval=1)
  shards = random_gradients(8)

  def run(grads):
    state = tx.init(PARAMS)
    for _ in range(3):
      updates, state = tx.update(grads, state, PARAMS)
    return updates, state

  def replica(shard):
    return run(jax.lax.pmean(shard, 'data'))

  pmapped = jax.pmap(replica, axis_name='data')(shards)
  mapped = jax.shard_map(
    lambda shard: replica(jax.tree.map(lambda x: x[0], shard)),
    mesh=mesh(),
    in_specs=P('data'),
    out_specs=P(),
  )
  expected = jax.jit(run)(jax.tree.map(lambda g: jnp.mean(g, 0), shards))
  first, last = (jax.tree.map(lambda x, i=i: x[i], pmapped) for i in (0, 7))
  chex.assert_trees_all_equal(first, last)
  for got in first, jax.jit(mapped)(shards):
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('axis_type', ['Auto', 'Explicit'])
def test_divided_parameters(axis_type):
  grid = jax.make_mesh(
    (2, 4),
    ('data', 'model'),
    axis_types=2 * (getattr(jax.sharding.AxisType, axis_type),),
  )
  specs = {
    'kernel': P('data', 'model'),
    'layers': P(None, None, 'model'),
    'embedding': P(None, 'model'),
    'bias': P(),
  }
  tx = in_eigenbasis(optax.trace(0.9), update_interval=1)
  gradients = random_gradients(3)
  expected, _ = train(tx, gradients)
  divide = lambda tree: jax.tree.map(
    lambda x, s: jax.device_put(x, jax.NamedSharding(grid, s)), tree, specs
  )
  with jax.set_mesh(grid):
    params = divide(PARAMS)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update)
    for t in range(3):
      grads = divide(jax.tree.map(lambda g, t=t: g[t], gradients))
      updates, state = step(grads, state, params)
  last = jax.tree.map(lambda u: u[-1], expected)
  chex.assert_trees_all_close(
    jax.device_get(updates), jax.device_get(last), rtol=1e-4, atol=1e-3
  )


def test_data_parallelism_sends_no_more():
  replicated, divided = (
    jax.NamedSharding(mesh(), P(*a)) for a in ((), ('data',))
  )
  params = {'kernel': PARAMS['kernel']}

  def sent(tx):
    @jax.jit
    def step(params, state, x):
      loss = lambda p: jnp.mean(jnp.tanh(x @ p['kernel']) ** 2)
      return tx.update(jax.grad(loss)(params), state, params)

    args = jax.device_put((params, tx.init(params)), replicated)
    x = jax.device_put(jnp.ones((16, 4)), divided)
    return hlo.count_collectives(step.lower(*args, x).compile().as_text())

  inner = optax.trace(0.9)
  expected = sent(inner)
  assert expected[0].total() == 1
  assert sent(in_eigenbasis(inner, update_interval=3)) == expected


def test_members_of_a_vmap_change_their_bases_as_alone():
  tx = in_eigenbasis(optax.trace(0.9), update_interval=3)
  gradients = random_gradients(4)
  counts = jnp.array([0, 30, 31])
  states = jax.vmap(lambda n: tx.init(PARAMS)._replace(count=n))(counts)

  def run(state):
    step = lambda s, g: tx.update(g, s, PARAMS)[::-1]
    return jax.lax.scan(step, state, gradients)

  together, updates = jax.jit(jax.vmap(run))(states)
  for i in range(3):
    alone = jax.jit(run)(jax.tree.map(lambda x, i=i: x[i], states))
    own = jax.tree.map(lambda x, i=i: x[i], (together, updates))
    chex.assert_trees_all_close(own, alone, rtol=1e-4, atol=1e-4)
