"""Tests of the counts in optimized HLO, on programs with known counts."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

import hlo


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
  return hlo.count_collectives(fn.lower(*args).compile().as_text())


ROWS = jax.ShapeDtypeStruct((64, 16), jnp.float32)  # 8 rows, 512 B, a device
FLAG = jax.ShapeDtypeStruct((), jnp.bool)


@pytest.mark.parametrize(('fn', 'kind', 'operands', 'devices', 'sent'), [
    (lambda x: x + jax.lax.psum(x, 'y'),
     'all-reduce', ['f32[8,16]'], 4, 2 * 3 / 4 * 512),
    (lambda x: x + jax.lax.psum(x, ('x', 'y')),
     'all-reduce', ['f32[8,16]'], 8, 2 * 7 / 8 * 512),
    (lambda x: jax.lax.all_gather(x, 'x', tiled=True),
     'all-gather', ['f32[8,16]'], 2, 1 / 2 * (2 * 512)),
    (lambda x: jax.lax.psum_scatter(x, 'y', tiled=True),
     'reduce-scatter', ['f32[8,16]'], 4, 3 / 4 * 512),
    (lambda x: jax.lax.all_to_all(x, 'y', 0, 0, tiled=True),
     'all-to-all', ['f32[2,16]'] * 4, 4, 3 / 4 * 512),
    (lambda x: jax.lax.ppermute(x, 'x', [(0, 1), (1, 0)]),
     'collective-permute', ['f32[8,16]'], 2, 512),
])  # fmt: skip
def test_bytes_of_a_ring(fn, kind, operands, devices, sent):
  ordinary, refresh = count(fn, ROWS)
  expected = hlo.Collective(kind, tuple(operands), devices)
  assert ordinary == refresh == {expected: 1}
  assert hlo.sent(ordinary) == sent


def test_collectives_in_a_loop_count_once_per_iteration():
  body = lambda x, _: (x + jax.lax.psum(jnp.tanh(x), 'y'), None)
  outer = lambda x, _: jax.lax.scan(body, jnp.sin(x), length=5)
  repeat = lambda x: jax.lax.scan(outer, x, length=3)[0]
  assert count(repeat, ROWS)[0].total() == 15


def test_branches_are_distinguished_by_their_collectives():
  def step(x, flag):
    x = x + jax.lax.psum(x, 'x')
    return jax.lax.cond(
      flag, lambda x: x + jax.lax.psum(jnp.sin(x), 'y'), lambda x: x, x
    )

  ordinary, refresh = count(step, ROWS, FLAG)
  always = hlo.Collective('all-reduce', ('f32[8,16]',), 2)
  assert ordinary == {always: 1}
  assert refresh - ordinary == {always._replace(devices=4): 1}


@pytest.mark.parametrize(('attributes', 'size'), [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, x', 4),
    ('replica_groups=[2,4]<=[8], x', 4),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x", 2),
    ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}, x", 8),
])  # fmt: skip
def test_notations_of_groups(attributes, size):
  assert hlo._group_size(attributes) == size


HLO = """
%nothing (p: f32[8,16]) -> f32[8,16] {
  ROOT %p = f32[8,16]{1,0} parameter(0)
}

%something (p.1: f32[8,16]) -> f32[8,16] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  ROOT %e = f32[8,16]{1,0} all-reduce(%p.1), replica_groups=[2,4]<=[8]
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  INSTRUCTION
}
"""


def test_a_loop_of_unknown_length_that_sends_is_an_error():
  loop = '%z = f32[8,16]{1,0} while(%x), condition=%nothing, body=%BODY'
  text = HLO.replace('INSTRUCTION', loop)
  empty = {}, {}
  assert hlo.count_collectives(text.replace('BODY', 'nothing')) == empty
  with pytest.raises(ValueError, match='how often'):
    hlo.count_collectives(text.replace('BODY', 'something'))


ASYNCHRONOUS = """
%begin (a: f32[8,16]) -> (f32[8,16], f32[16,16]) {
  %a = f32[8,16]{1,0} parameter(0)
  %g = f32[16,16]{1,0} all-gather(%a), GATHER
  ROOT %s = (f32[8,16]{1,0}, f32[16,16]{1,0}) custom-call(%g),\
 custom_call_target="AsyncCollectiveStart"
}

%beside (a.1: f32[8,16], w: f32[16,16], b: f32[8,16])\
 -> (f32[8,16], f32[8,16], f32[16,16]) {
  %b = f32[8,16]{1,0} parameter(2)
  %e = f32[8,16]{1,0} exponential(%b)
  %a.1 = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %g.1 = f32[16,16]{1,0} all-gather(%a.1), GATHER
  ROOT %t = (f32[8,16]{1,0}, f32[8,16]{1,0}, f32[16,16]{1,0})\
 tuple(%e, %a.1, %g.1)
}

%end (a.2: f32[8,16], w.1: f32[16,16]) -> f32[16,16] {
  %a.2 = f32[8,16]{1,0} parameter(0)
  %w.1 = f32[16,16]{1,0} parameter(1)
  %g.2 = f32[16,16]{1,0} all-gather(%a.2), GATHER
  ROOT %d = f32[16,16]{1,0} custom-call(%a.2, %w.1, %g.2),\
 custom_call_target="AsyncCollectiveDone"
}

%body (n: f32[8,16]) -> f32[8,16] {
  %n = f32[8,16]{1,0} parameter(0)
  %w.2 = f32[16,16]{1,0} constant(0)
  %r = (f32[8,16]{1,0}, f32[8,16]{1,0}, f32[16,16]{1,0})\
 fusion(%n, %w.2, %n), calls=%beside
}
"""


def test_an_asynchronous_collective_in_several_fusions_counts_once():
  fused = ASYNCHRONOUS.replace(
    'GATHER',
    'channel_id=7, replica_groups=[4,2]<=[8],'
    ' backend_config={"async_collective_fusion_config":{}}',
  )
  text = fused + HLO.replace(
    'INSTRUCTION',
    '%s = (f32[8,16]{1,0}, f32[16,16]{1,0}) fusion(%x), calls=%begin\n'
    '  %c = f32[8,16]{1,0} while(%x), condition=%nothing, body=%body,'
    ' backend_config={"known_trip_count":{"n":"3"}}\n'
    '  %v = f32[16,16]{1,0} get-tuple-element(%s), index=1\n'
    '  %z = f32[16,16]{1,0} fusion(%x, %v), calls=%end',
  )
  expected = {hlo.Collective('all-gather', ('f32[8,16]',), 2): 1}
  assert hlo.count_collectives(text) == (expected, expected)


def test_a_reduce_scatter_of_a_tpu_is_not_taken_for_an_all_reduce():
  fused = """
%all-reduce-scatter (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %all = f32[8,16]{1,0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%s
  %own = s32[] constant(0)
  ROOT %r = f32[2,16]{1,0} dynamic-slice(%all, %own, %own)
}
"""
  text = fused + HLO.replace(
    'INSTRUCTION',
    '%z = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter',
  )
  expected = {hlo.Collective('reduce-scatter', ('f32[8,16]',), 4): 1}
  assert hlo.count_collectives(text) == (expected, expected)
