"""Tests of benchmarks/scaling.py."""

import jax
import pytest

import hlo
import scaling


@pytest.mark.slow
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
  assert hlo.sent(refresh) > hlo.sent(ordinary)
  # Probes are drawn in parts, that of the token embedding too, which the model
  # gathers to use it.
  entries = figures['sophia_h']['entries']
  assert 0 < entries['largest probe'] <= entries['largest parameter']
