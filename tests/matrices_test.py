"""Which arrays are matrices for `in_eigenbasis`, and how they are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
import pytest

import sophia_optax

in_eigenbasis = sophia_optax.in_eigenbasis
KEY = jax.random.PRNGKey(0)


def shapes(tx, params):
  return jax.tree.map(jnp.shape, tx.init(params).bases)


def test_by_default_matrices_are_rotated_and_embeddings_and_vectors_are_not():
  tx = in_eigenbasis(optax.identity())
  arrays = {
    'layers': {'mlp_in': (2, 4, 8), 'norm_scale': (2, 8)},
    'multi_head_attention': {'query': (4, 4)},
    'ensemble': (3, 4, 4),
    'tok_embed': (9, 4),
    'lm_head': (4, 9),
    'row': (1, 4),
    'bias': (4,),
  }
  params = jax.tree.map(
    jnp.zeros, arrays, is_leaf=lambda x: isinstance(x, tuple)
  )
  square = lambda n: ((n, 4, 4), (n, 4, 4))
  expected = jax.tree.map(lambda x: (), params) | {
    'layers': {'mlp_in': square(4), 'norm_scale': ()},
    'multi_head_attention': {'query': square(1)},
    'ensemble': square(3),
  }
  assert shapes(tx, params) == expected


@pytest.mark.parametrize(
  ('shape', 'numbers', 'block_size', 'expected'),
  [
    ((6, 6), (0, 1), 1024, ((1, 6, 6), (1, 6, 6))),
    ((6, 6), (0, 1), 3, ((4, 3, 3), (4, 3, 3))),
    ((6, 8), (0, 1), 1024, ((1, 6, 6), (1, 8, 8))),  # 8 has no divisor nearer.
    ((4, 12), (0, 1), 1024, ((3, 4, 4), (3, 4, 4))),
    ((4, 31), (0, 1), 1024, ((1, 4, 4), None)),  # 31 is a prime number.
    ((6, 2, 3), (0, (1, 2)), 1024, ((1, 6, 6), (1, 6, 6))),
    ((2, 3, 6), ((0, 1), 2), 1024, ((1, 6, 6), (1, 6, 6))),
    ((4, 5, 4), (0, 2), 1024, ((5, 4, 4), (5, 4, 4))),
  ],
)
def test_layouts(shape, numbers, block_size, expected):
  tx = in_eigenbasis(
    optax.trace(0.9),
    block_size=block_size,
    weight_dimension_numbers=MuonDimensionNumbers(*numbers),
  )
  params = {'w': jax.random.normal(KEY, shape)}
  assert shapes(tx, params)['w'] == expected
  # Rotated and back it is the same array. No change of the basis is due.
  state = tx.init(params)._replace(count=jnp.int32(21))
  bases = jax.tree.map(
    lambda b: jnp.linalg.qr(jax.random.normal(KEY, b.shape))[0], state.bases
  )
  state = state._replace(bases=bases)
  updates, state = tx.update(params, state, params)
  np.testing.assert_allclose(updates['w'], params['w'], atol=1e-5)
  trace = state.inner_state.trace['w']
  assert np.max(np.abs(trace - params['w'])) > 0.1


def test_an_axis_can_not_be_rows_and_columns():
  with pytest.raises(ValueError, match=r'different axes.*\(4, 8\)'):
    in_eigenbasis(
      optax.identity(), weight_dimension_numbers=MuonDimensionNumbers(0, -2)
    ).init({'w': jnp.zeros((4, 8))})
