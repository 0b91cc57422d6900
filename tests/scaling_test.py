"""Tests of the figures of benchmarks/scaling.py on programs that are known."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

import scaling


def count(fn, *args):
  """Counts for `fn` on 2 × 4 devices, with rows of the first argument each."""
  mesh = jax.make_mesh(
    (2, 4), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  specs = P(('x', 'y')), *[P()] * (len(args) - 1)
  fn = jax.jit(
    jax.shard_map(
      fn, mesh=mesh, in_specs=specs, out_specs=P(('x', 'y')), check_vma=False
    )
  )
  return scaling.count_collectives(fn.lower(*args).compile().as_text())


ROWS = jax.ShapeDtypeStruct((64, 16), jnp.float32)  # 8 rows, 512 B, a device
FLAG = jax.ShapeDtypeStruct((), jnp.bool)


@pytest.mark.parametrize(
  ('fn', 'expected', 'sent'),
  [
    (
      lambda x: x + jax.lax.psum(x, 'y'),
      ('all-reduce', ('f32[8,16]',), 4),
      2 * 3 / 4 * 512,
    ),
    (
      lambda x: x + jax.lax.psum(x, ('x', 'y')),
      ('all-reduce', ('f32[8,16]',), 8),
      2 * 7 / 8 * 512,
    ),
    (
      lambda x: jax.lax.all_gather(x, 'x', tiled=True),
      ('all-gather', ('f32[8,16]',), 2),
      1 / 2 * (2 * 512),
    ),
    (
      lambda x: jax.lax.psum_scatter(x, 'y', tiled=True),
      ('reduce-scatter', ('f32[8,16]',), 4),
      3 / 4 * 512,
    ),
    (
      lambda x: jax.lax.all_to_all(x, 'y', 0, 0, tiled=True),
      ('all-to-all', ('f32[2,16]',) * 4, 4),
      3 / 4 * 512,
    ),
    (
      lambda x: jax.lax.ppermute(x, 'x', [(0, 1), (1, 0)]),
      ('collective-permute', ('f32[8,16]',), 2),
      512,
    ),
  ],
)
def test_bytes_of_a_ring(fn, expected, sent):
  ordinary, refresh = count(fn, ROWS)
  assert ordinary == refresh == {expected: 1}
  assert scaling.sent(ordinary) == sent


def test_a_loop_sends_as_often_as_it_runs():
  def repeat(x):
    def body(x, _):
      return x + jax.lax.psum(jnp.tanh(x), 'y'), None

    def outer(x, _):
      return jax.lax.scan(body, jnp.sin(x), length=5)

    return jax.lax.scan(outer, x, length=3)[0]

  ordinary, _ = count(repeat, ROWS)
  assert ordinary.total() == 15


def test_a_loop_of_unknown_length_that_sends_is_an_error():
  def repeat(x):
    return jax.lax.while_loop(
      lambda x: jax.lax.psum(x.sum(), ('x', 'y')) < 1, lambda x: 2 * x, x
    )

  with pytest.raises(ValueError, match='how often'):
    count(repeat, ROWS)


def test_branches_are_told_apart_by_what_they_send():
  def step(x, flag):
    x = x + jax.lax.psum(x, 'x')
    return jax.lax.cond(
      flag, lambda x: x + jax.lax.psum(jnp.sin(x), 'y'), lambda x: x, x
    )

  ordinary, refresh = count(step, ROWS, FLAG)
  always = scaling.Collective('all-reduce', ('f32[8,16]',), 2)
  assert ordinary == {always: 1}
  assert refresh - ordinary == {always._replace(devices=4): 1}


@pytest.mark.parametrize(
  ('attributes', 'size'),
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, x', 4),
    ('replica_groups=[2,4]<=[8], x', 4),
    ("replica_groups=mesh['a'=1,'b'=8] {'b'}, x", 8),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x", 2),
    ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}, x", 8),
  ],
)
def test_notations_of_groups(attributes, size):
  assert scaling._group_size(attributes) == size


def test_an_ordinary_step_sends_what_adamws_sends():
  counts, figures = {}, {}
  for row in 'adamw', 'sophia_h':
    config = scaling.make_config(
      row, 'fsdp:8', **scaling._TINY, dtype='float32', remat=False
    )
    with jax.numpy_dtype_promotion('standard'):  # optax.adamw needs it.
      figures[row], counts[row] = scaling.measure(config)
  ordinary, refresh = counts['sophia_h']
  assert ordinary == counts['adamw'][0] == counts['adamw'][1]
  assert scaling.sent(refresh) > scaling.sent(ordinary)
  # Probes are drawn in parts, that of the token embedding too, which the model
  # gathers to use it.
  entries = figures['sophia_h']['entries']
  assert 0 < entries['largest probe'] <= entries['largest parameter']
