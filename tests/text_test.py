"""The text of the language model example, and its batches."""

import numpy as np
import pytest

import text


def test_standard_library_is_the_same_at_every_call():
  tokens = text.standard_library()
  assert len(tokens) > 5_000_000
  assert text.fingerprint(tokens) == text.fingerprint(text.standard_library())
  train, val = text.load()
  assert 0.04 < len(val) / len(train) < 0.06


def test_bin_files_are_mapped_and_read_as_uint16(data_dir):
  train, _ = text.load(data_dir)
  assert isinstance(train, np.memmap)
  batch = text.sample(train, 0, 3, 4, 8, 64)
  assert batch.shape == (4, 9)
  assert batch.dtype == np.int32
  # Each row is a run of consecutive tokens of the file.
  windows = np.lib.stride_tricks.sliding_window_view(train, 9)
  assert all((windows == row).all(axis=1).any() for row in batch)


def test_batch_depends_on_seed_and_step_only(data_dir):
  train, _ = text.load(data_dir)
  draw = lambda seed, step: text.sample(train, seed, step, 4, 8, 64)
  np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
  assert (draw(1, 2) != draw(1, 3)).any()
  assert (draw(1, 2) != draw(2, 2)).any()
  # The only window, which is also the last.
  batch = text.sample(np.arange(9), 0, 0, 4, 8, 64)
  np.testing.assert_array_equal(batch, np.tile(np.arange(9), (4, 1)))


def test_bad_data_is_a_clear_error(tmp_path, data_dir):
  with pytest.raises(FileNotFoundError, match=r'no .*train\.bin'):
    text.load(str(tmp_path / 'nowhere'))
  train, _ = text.load(data_dir)
  with pytest.raises(ValueError, match=r'below vocab_size, 8;'):
    text.sample(train, 0, 0, 4, 8, 8)
  with pytest.raises(ValueError, match=r'10001 tokens are needed.* has 5000'):
    text.validation(train, 1, 1, 10000, 64)
  (tmp_path / 'train.bin').write_bytes(b'odd')
  with pytest.raises(ValueError, match='it has 3 bytes'):
    text.load(data_dir)
