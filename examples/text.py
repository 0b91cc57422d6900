"""Loads training data: text of the standard library, or files of tokens.

A batch is a pure function of (seed, step). A resumed run therefore needs no
saved reader position, and two optimizers with the same seed see the same
batches.
"""

import hashlib
import json
import os
import pathlib
import sysconfig

import numpy as np

# Tests, generated code and vendored code.
_SKIPPED_FOLDERS = frozenset(
  {
    'site-packages',
    'dist-packages',
    '__pycache__',
    'test',
    'tests',
    'idle_test',
    'lib2to3',
    'encodings',
  }
)
# A token that prepare_text.py writes after each file.
END_OF_TEXT = '<|endoftext|>'

_BLOCK = 4096
_VALIDATION_EVERY = 20


def standard_library() -> np.ndarray:
  """Reads help topics and sources of Python's standard library.

  Returns:
    uint8 array (bytes,), about 10 MB. The order of the files depends only on
    their names. The text differs between Python versions, see `fingerprint`.

  Raises:
    FileNotFoundError: if this Python was installed without its sources.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  topics = root / 'pydoc_data' / 'topics.py'
  paths = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [
      name
      for name in subfolders
      if name not in _SKIPPED_FOLDERS and not name.startswith('config-')
    ]
    paths += [
      pathlib.Path(folder, name)
      for name in names
      if name.endswith('.py') and not name.startswith('_sysconfigdata')
    ]
  # English prose first, then code, sorted by name on every file system.
  paths.sort(key=lambda p: (p != topics, p.relative_to(root).as_posix()))
  if topics not in paths:
    raise FileNotFoundError(
      'The demo needs the sources of the standard library, but '
      f'{root} has no pydoc_data/topics.py. Install a Python with its sources, '
      'or pass --data_dir with your own train.bin and val.bin.'
    )
  return np.frombuffer(b'\n'.join(p.read_bytes() for p in paths), np.uint8)


def load(data_dir: str = '') -> tuple[np.ndarray, np.ndarray]:
  """Loads the training and the validation tokens.

  Args:
    data_dir: folder with `train.bin` and `val.bin` (raw uint16 tokens), from
      prepare_text.py or nanoGPT's prepare.py. The files are memory-mapped. ''
      for the standard library.

  Returns:
    (train, validation), integer arrays of shape (tokens,).

  Raises:
    FileNotFoundError: if one of the files does not exist.
    ValueError: if the size of a file is 0 or odd.
  """
  if not data_dir:
    tokens = standard_library()
    blocks = tokens[: len(tokens) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    # Holds out every 20th block. The last blocks would be of other topics,
    # because the files are sorted.
    held_out = np.arange(len(blocks)) % _VALIDATION_EVERY == 0
    return blocks[~held_out].reshape(-1), blocks[held_out].reshape(-1)

  def read(name):
    path = pathlib.Path(data_dir, name)
    if not path.is_file():
      raise FileNotFoundError(
        '--data_dir needs train.bin and val.bin (raw uint16 tokens, as '
        f'written by prepare_text.py); there is no {path}.'
      )
    size = path.stat().st_size
    if size == 0 or size % 2:
      raise ValueError(
        f'{path} must contain uint16 tokens, two bytes each; it has {size} '
        'bytes. Write it again with tokens.astype(np.uint16).tofile(path).'
      )
    return np.memmap(path, np.uint16, mode='r')

  return read('train.bin'), read('val.bin')


def vocab_size(data_dir: str, given: int | None = None) -> int | None:
  """Returns the vocabulary size for a model of these tokens.

  Args:
    data_dir: as in `load`.
    given: the size that the user passed, if any, such as a multiple of 128.

  Returns:
    `given` if it is not None, otherwise the size in the folder's meta.json, or
    None if there is no such file.

  Raises:
    ValueError: if `given` is below the size in meta.json, or meta.json has no
      size.
  """
  path = pathlib.Path(data_dir, 'meta.json')
  if not data_dir or not path.is_file():
    return given
  try:
    size = int(json.loads(path.read_text())['vocab_size'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} must be JSON with a vocab_size, as written by '
      'prepare_text.py. Write it again, or delete it and pass --vocab_size.'
    ) from error
  if given is not None and given < size:
    raise ValueError(
      f'vocab_size must be at least {size}, the number of different tokens in '
      f'{path}; got {given}. Leave --vocab_size out to use that number.'
    )
  return given or size


def fingerprint(tokens: np.ndarray) -> str:
  """Returns the SHA-256 of the tokens' bytes, in hexadecimal."""
  return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()


def _windows(tokens, starts, length, vocab_size):
  batch = np.stack([tokens[i : i + length] for i in starts]).astype(np.int32)
  # Under jit, an embedding look-up out of range raises no error.
  if batch.max() >= vocab_size:
    raise ValueError(
      f'Tokens must be below vocab_size, {vocab_size}; the data has '
      f'{batch.max()}. Pass a --vocab_size above the largest token.'
    )
  return batch


def _check_length(tokens, length):
  if len(tokens) < length:
    raise ValueError(
      f'At least block_size + 1 = {length} tokens are needed; the data has '
      f'{len(tokens)}. Pass a smaller --block_size or more data.'
    )


def sample(
  tokens: np.ndarray,
  seed: int,
  step: int,
  batch_size: int,
  block_size: int,
  vocab_size: int,
) -> np.ndarray:
  """Draws the training batch of one step, a pure function of (seed, step).

  Args:
    tokens: integer array (tokens,).
    seed: seed of the run.
    step: number of the step.
    batch_size: B, sequences in the batch.
    block_size: T, predictions in a sequence.
    vocab_size: V, greater than every token.

  Returns:
    int32 array (B, T + 1): inputs are [:, :-1], targets [:, 1:].

  Raises:
    ValueError: if there are too few tokens, or one is not below vocab_size.
  """
  length = block_size + 1
  _check_length(tokens, length)
  rng = np.random.default_rng((seed, step))
  starts = rng.integers(0, len(tokens) - length + 1, size=batch_size)
  return _windows(tokens, starts, length, vocab_size)


def validation(
  tokens: np.ndarray,
  num_batches: int,
  batch_size: int,
  block_size: int,
  vocab_size: int,
) -> np.ndarray:
  """Returns the validation batches, evenly spaced sequences of the tokens.

  Args:
    tokens: integer array (tokens,).
    num_batches: N, batches.
    batch_size: B, sequences in a batch.
    block_size: T, predictions in a sequence.
    vocab_size: V, greater than every token.

  Returns:
    int32 array (N, B, T + 1).

  Raises:
    ValueError: if there are too few tokens, or one is not below vocab_size.
  """
  length = block_size + 1
  _check_length(tokens, length)
  starts = np.linspace(
    0, len(tokens) - length, num_batches * batch_size, dtype=np.int64
  )
  batch = _windows(tokens, starts, length, vocab_size)
  return batch.reshape(num_batches, batch_size, length)
