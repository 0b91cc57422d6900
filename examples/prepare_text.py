"""Trains a tokenizer on text files, and converts them to tokens.

  python examples/prepare_text.py --out_dir=corpus notes.txt books 'src/**/*.md'

Pass names of files, folders or patterns. Folders are searched recursively,
without hidden files. The text must be UTF-8. Nothing is downloaded. Pass the
folder of the result to train_gpt.py as --data_dir. It contains:

  train.bin, val.bin  tokens, raw uint16, in nanoGPT's format
  tokenizer.json      byte-level BPE, for Hugging Face's tokenizers
  meta.json           size of the vocabulary, numbers of tokens, sources

The last --val_fraction of each file is held out, so that validation covers all
topics. The tokenizer is trained on the rest. Both parts of a file end with a
special token, <|endoftext|>.
"""

import codecs
from collections.abc import Iterator
import glob
import hashlib
import itertools
import json
import math
import os
import tempfile
from typing import NamedTuple

from absl import app
from absl import flags
import numpy as np
import tokenizers
import tqdm

import gpt_configs
import text

# Limits on memory: bytes in a piece, and pieces that the tokenizer encodes in
# parallel. A word at the boundary of two pieces is cut.
_PIECE_SIZE = 1 << 16
_BATCH_SIZE = 16
_RESULTS = ('train.bin', 'val.bin', 'tokenizer.json', 'meta.json')


class Span(NamedTuple):
  """A part of a file, from byte `start` up to byte `stop`."""

  path: str
  start: int
  stop: int


def find_files(names: list[str]) -> list[str]:
  """Returns the files that match the names, without duplicates.

  Args:
    names: files, folders and patterns. In folders and patterns, empty and
      hidden files are skipped.

  Returns:
    Paths in the order of the names. Several files for one name are sorted.

  Raises:
    FileNotFoundError: if there are no names, or one matches no file.
    ValueError: if a name is that of an empty file.
  """
  if not names:
    raise FileNotFoundError(
      'Text files are needed, but none was given. Pass files, folders or '
      "patterns: python examples/prepare_text.py --out_dir=corpus 'a/*.txt'"
    )
  files = []
  for name in names:
    if os.path.isfile(name):
      if not os.path.getsize(name):
        raise ValueError(
          f'Each file must contain text; {name} is empty. Leave it out.'
        )
      files.append(name)
      continue
    pattern = name
    if os.path.isdir(name):
      pattern = os.path.join(glob.escape(name), '**', '*')
    found = [
      path
      for path in sorted(glob.glob(pattern, recursive=True))
      if os.path.isfile(path) and os.path.getsize(path)
    ]
    if not found:
      raise FileNotFoundError(
        f'Each name must match a file with text; {name!r} matches none. Check '
        'its spelling and the working directory.'
      )
    files += found
  return list(dict.fromkeys(files))


def split(path: str, val_fraction: float) -> tuple[Span, Span]:
  """Splits a file into a part for training and the rest, for validation."""
  size = os.path.getsize(path)
  with open(path, 'rb') as file:
    file.seek(int(size * (1 - val_fraction)))
    # Moves to the start of a character: bytes 10xxxxxx continue one.
    while (byte := file.read(1)) and byte[0] >> 6 == 0b10:
      pass
    middle = file.tell() - len(byte)
  return Span(path, 0, middle), Span(path, middle, size)


def read(span: Span) -> Iterator[str]:
  """Yields the text of a span, one piece at a time.

  Raises:
    ValueError: if it is not UTF-8.
  """
  decoder = codecs.getincrementaldecoder('utf-8')()
  with open(span.path, 'rb') as file:
    file.seek(span.start)
    while True:
      # The decoder keeps the first bytes of an incomplete character.
      start = file.tell() - len(decoder.getstate()[0])
      data = file.read(min(_PIECE_SIZE, span.stop - file.tell()))
      try:
        piece = decoder.decode(data, final=not data)
      except UnicodeDecodeError as error:
        raise ValueError(
          f'Text must be UTF-8, but {span.path} is not, at byte '
          f'{start + error.start}: {error.reason}. Convert the file, for '
          'example with iconv -f latin1 -t utf-8, or leave it out.'
        ) from error
      if not data:
        return
      yield piece


def train_tokenizer(spans: list[Span], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains byte-level BPE, which encodes any text without loss.

  Args:
    spans: the text.
    vocab_size: limit on the number of tokens: text.END_OF_TEXT, one for each
      byte, and one for each merge. Merges end when no pair of tokens repeats.

  Returns:
    The tokenizer.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=[text.END_OF_TEXT],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  # The trainer shows its own progress bars.
  tokenizer.train_from_iterator(
    itertools.chain.from_iterable(map(read, spans)),
    trainer,
    length=sum(math.ceil((s.stop - s.start) / _PIECE_SIZE) for s in spans),
  )
  return tokenizer


def encode(
  tokenizer: tokenizers.Tokenizer, spans: list[Span], path: str
) -> int:
  """Writes the tokens of the text to a file and returns their number."""
  # If the text contains <|endoftext|>, encodes it as text.
  tokenizer.encode_special_tokens = True
  end = np.array([tokenizer.token_to_id(text.END_OF_TEXT)], np.uint16)
  num_bytes = sum(span.stop - span.start for span in spans)
  with (
    open(path, 'wb') as file,
    tqdm.tqdm(
      total=num_bytes, desc=os.path.basename(path), unit='B', unit_scale=True
    ) as bar,
  ):
    for span in spans:
      pieces = read(span)
      while batch := list(itertools.islice(pieces, _BATCH_SIZE)):
        for encoding in tokenizer.encode_batch_fast(batch):
          np.array(encoding.ids, np.uint16).tofile(file)
        bar.update(sum(len(piece.encode()) for piece in batch))
      end.tofile(file)
    return file.tell() // end.itemsize


def describe_file(path: str) -> dict[str, str | int]:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return {'path': path, 'bytes': os.path.getsize(path), 'sha256': digest}


def check_settings(vocab_size, val_fraction):
  if not 257 <= vocab_size <= 65_536:
    raise ValueError(
      'vocab_size must be 257 (all bytes and <|endoftext|>) to 65,536 (tokens '
      f'are uint16); got {vocab_size}.'
    )
  if not 0 < val_fraction < 1:
    raise ValueError(
      f'val_fraction must be above 0 and below 1; got {val_fraction}.'
    )


def check_is_free(out_dir):
  for name in _RESULTS:
    if os.path.exists(os.path.join(out_dir, name)):
      raise FileExistsError(
        f'--out_dir must not contain results; {out_dir} already has a {name}. '
        'Pass another --out_dir, or delete the file.'
      )


def write_tokens(folder, parts, vocab_size, block_size) -> dict[str, int]:
  """Writes tokenizer.json, train.bin and val.bin; returns their sizes."""
  train, val = map(list, zip(*parts, strict=True))
  tokenizer = train_tokenizer(train, vocab_size)
  tokenizer.save(os.path.join(folder, 'tokenizer.json'))
  sizes = {'vocab_size': tokenizer.get_vocab_size()}
  for name, spans in ('train', train), ('val', val):
    num_tokens = encode(tokenizer, spans, os.path.join(folder, f'{name}.bin'))
    if num_tokens <= block_size:
      raise ValueError(
        f'{name}.bin must have at least block_size + 1 = {block_size + 1} '
        f'tokens, but would have {num_tokens}. Add text, pass another '
        '--val_fraction, or pass a smaller --block_size both here and to '
        'train_gpt.py.'
      )
    sizes[f'{name}_tokens'] = num_tokens
  return sizes


def prepare(
  names: list[str],
  out_dir: str,
  vocab_size: int = 1024,
  val_fraction: float = 0.1,
  block_size: int = gpt_configs.Config.block_size,
) -> dict:
  """Writes a folder for --data_dir of train_gpt.py.

  Args:
    names: files, folders and patterns.
    out_dir: the folder. After an error it contains none of the files.
    vocab_size: limit on the number of different tokens, 257 to 65,536.
    val_fraction: fraction of each file to hold out.
    block_size: number of predictions in a sequence, as in train_gpt.py.

  Returns:
    The content of meta.json.

  Raises:
    FileExistsError: if the folder already contains such files.
    FileNotFoundError: if there is no text file.
    ValueError: if a setting is out of range, if a file is empty or not UTF-8,
      or if train.bin or val.bin would be shorter than a sequence.
  """
  check_settings(vocab_size, val_fraction)
  check_is_free(out_dir)
  files = find_files(names)
  parts = [split(path, val_fraction) for path in files]
  os.makedirs(out_dir, exist_ok=True)
  # After an error, none of the results is left in out_dir.
  with tempfile.TemporaryDirectory(prefix='part-', dir=out_dir) as folder:
    meta = write_tokens(folder, parts, vocab_size, block_size)
    meta |= {
      'val_fraction': val_fraction,
      'tokenizers_version': tokenizers.__version__,
      'files': [describe_file(path) for path in files],
    }
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
      json.dump(meta, file, indent=1)
    for name in _RESULTS:
      os.replace(os.path.join(folder, name), os.path.join(out_dir, name))
  return meta


def define_flags():
  flags.DEFINE_string('out_dir', None, 'Folder for the result.', required=True)
  flags.DEFINE_integer(
    'vocab_size',
    1024,
    'Limit on the number of different tokens; a short text gives fewer. 1024 '
    'suits a model as small as that of the demo. GPT-2 has 50,257.',
  )
  flags.DEFINE_float('val_fraction', 0.1, 'Fraction of each file to hold out.')
  flags.DEFINE_integer(
    'block_size',
    gpt_configs.Config.block_size,
    'Number of predictions in a sequence, as in train_gpt.py.',
  )


def main(argv):
  values = flags.FLAGS
  try:
    meta = prepare(
      argv[1:],
      values.out_dir,
      values.vocab_size,
      values.val_fraction,
      values.block_size,
    )
  except (FileExistsError, FileNotFoundError, ValueError) as error:
    raise app.UsageError(str(error)) from error
  print(
    f'{len(meta["files"])} files. The vocabulary has {meta["vocab_size"]:,} '
    f'tokens. The text has {meta["train_tokens"]:,} for training and '
    f'{meta["val_tokens"]:,} for validation. To train: '
    'python examples/train_gpt.py '
    f'--data_dir={values.out_dir} --out_dir=runs/mine'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main)
