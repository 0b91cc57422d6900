"""The data parallel example."""

import chex
import jax
import numpy as np
import pytest

import data_parallel

pytestmark = pytest.mark.usefixtures('compile_fast')


@pytest.mark.slow
def test_pmap_and_shard_map_are_the_same_training():
  # Few steps, so that the results may differ only by round-off.
  results = {name: data_parallel.train(name, 12) for name in data_parallel.MAPS}
  params, state, losses = results['pmap']
  for leaf in jax.tree.leaves((params, state)):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[0], (params, state)),
    results['shard_map'][:2],
    rtol=1e-4,
    atol=1e-5,
  )
  assert losses[-1] < losses[0] - 0.5


def test_batch_that_does_not_split(monkeypatch):
  monkeypatch.setattr(data_parallel, '_BATCH_SIZE', 255)
  with pytest.raises(ValueError, match='must divide the batch of 255 images'):
    data_parallel.train('pmap', 1)
