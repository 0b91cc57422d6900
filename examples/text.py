"""Text to train on: the standard library's own, or files of tokens.

A batch is a pure function of (seed, step). So a resumed run continues where
it was cut off without a saved reader position, and two optimizers with one
seed see the same batches.
"""

import hashlib
import json
import os
import pathlib
import sysconfig

import numpy as np

# Not text that people wrote to be read: tests, generated or vendored code.
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
  """Reads the text that every Python carries: its help topics and sources.

  Returns:
    uint8 array (bytes,), about 10 MB, in an order that depends on the names of
    the files only. It differs between Python versions: see `fingerprint`.

  Raises:
    FileNotFoundError: if this Python came without its sources.
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
  # English prose first, then code by relative name, whatever the file system.
  paths.sort(key=lambda p: (p != topics, p.relative_to(root).as_posix()))
  if topics not in paths:
    raise FileNotFoundError(
      f'The demo reads the sources of the standard library, and {root} has '
      'no pydoc_data/topics.py. Install a Python with its sources, or pass '
      '--data_dir with a train.bin and a val.bin of your own.'
    )
  return np.frombuffer(b'\n'.join(p.read_bytes() for p in paths), np.uint8)


def load(data_dir: str = '') -> tuple[np.ndarray, np.ndarray]:
  """Loads the training and the validation tokens.

  Args:
    data_dir: folder with `train.bin` and `val.bin` (raw uint16 tokens) of
      prepare_text.py or of nanoGPT's prepare.py, which are mapped and not read;
      '' for the standard library.

  Returns:
    (train, validation), integer arrays of shape (tokens,).

  Raises:
    FileNotFoundError: if one of the files is not there.
    ValueError: if a file does not hold whole uint16 tokens.
  """
  if not data_dir:
    tokens = standard_library()
    blocks = tokens[: len(tokens) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    # Every 20th block, not the tail: a tail of sorted files is another topic.
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
        f'{path} must hold uint16 tokens, two bytes each; it has {size} '
        'bytes. Write it again with tokens.astype(np.uint16).tofile(path).'
      )
    return np.memmap(path, np.uint16, mode='r')

  return read('train.bin'), read('val.bin')


def vocab_size(data_dir: str, given: int | None = None) -> int | None:
  """Returns the size of the vocabulary for a model of these tokens.

  Args:
    data_dir: as in `load`.
    given: a size that was asked for, such as a multiple of 128.

  Returns:
    `given`; without it what the folder's meta.json has; None if that is not
    there.

  Raises:
    ValueError: if `given` is below what meta.json has, or that has no size.
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
      f'{path}; got {given}. Leave out --vocab_size to have it from there.'
    )
  return given or size


def fingerprint(tokens: np.ndarray) -> str:
  """Returns the SHA-256 of the tokens' bytes, in hexadecimal."""
  return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()


def _windows(tokens, starts, length, vocab_size):
  batch = np.stack([tokens[i : i + length] for i in starts]).astype(np.int32)
  # An embedding look-up out of range is silent under jit.
  if batch.max() >= vocab_size:
    raise ValueError(
      f'Tokens must be below vocab_size, {vocab_size}; the data has '
      f"{batch.max()}. Pass a --vocab_size above the tokenizer's largest."
    )
  return batch


def _check_length(tokens, length):
  if len(tokens) < length:
    raise ValueError(
      f'A window of block_size + 1 = {length} tokens is needed; the data '
      f'has {len(tokens)}. Pass a smaller --block_size or more data.'
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
    vocab_size: V, above every token.

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
  """Cuts the same, evenly spread windows each time, so that losses compare.

  Args:
    tokens: integer array (tokens,).
    num_batches: N, batches.
    batch_size: B, sequences in a batch.
    block_size: T, predictions in a sequence.
    vocab_size: V, above every token.

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
