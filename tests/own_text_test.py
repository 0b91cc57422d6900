"""The commands from a user's files to text sampled from a model."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gpt
import tokenizers

import demo
import gpt_configs
import gpt_program
import prepare_text
import sample
import text
import train_gpt

# For the whole module, as `commands` is.
pytestmark = pytest.mark.usefixtures('compile_module_fast')

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {
  'demo.py': demo,
  'prepare_text.py': prepare_text,
  'train_gpt.py': train_gpt,
  'sample.py': sample,
}
TINY = {
  'num_layers': 1,
  'num_heads': 2,
  'width': 16,
  'block_size': 8,
  'batch_size': 8,
  'micro_batch_size': 8,
  'eval_batches': 1,
  'num_steps': 2,
  'warmup_steps': 1,
  'checkpoint_interval': 1,
}
# Characters of one to four bytes.
PROSE = 'Ærlig talt, sa «kapteinen» – 日本 🚢 <|endoftext|>\r\n' * 20


# The commands.


def read_commands():
  """Returns what `make demo` runs, and the commands of the page."""
  page = (ROOT / 'examples/README.md').read_text()
  block = re.search(r'## Your own text\n.*?```shell\n(.*?)```', page, re.DOTALL)
  commands = [shlex.split(line) for line in block[1].splitlines()]
  recipe = re.search(
    r'^demo:.*\n\t\$\(BIN\)/(.*)', (ROOT / 'Makefile').read_text(), re.MULTILINE
  )
  for command in [shlex.split(recipe[1]), *commands]:
    python, script = command[:2]
    assert python == 'python'
    yield script.removeprefix('examples/'), command[2:]


def run(script, args):
  """Runs a script's main as the command line does."""
  before, verbosity = set(flags.FLAGS), logging.get_verbosity()
  SCRIPTS[script].define_flags()
  try:
    # optax's schedules need promotion.
    with jax.numpy_dtype_promotion('standard'):
      SCRIPTS[script].main(flags.FLAGS([script, *args]))
  finally:
    logging.set_verbosity(verbosity)
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
  """Runs the commands; returns their folder and what they printed."""
  folder = tmp_path_factory.mktemp('commands')
  (folder / 'my_files').mkdir()
  (folder / 'my_files' / 'prose.txt').write_bytes(PROSE.encode() * 10)
  # Small settings replace those of the demo, with one optimizer.
  config = dataclasses.replace(gpt_configs.CONFIGS['demo'], **TINY)
  printed = {}
  with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
    patch.setitem(gpt_configs.CONFIGS, 'demo', config)
    patch.setattr(demo, 'RUNS', {'adamw': demo.RUNS['adamw']})
    for script, args in read_commands():
      lines = []
      patch.setattr('builtins.print', lambda *x: lines.append(' '.join(x)))  # noqa: B023
      run(script, args)
      printed[script] = '\n'.join(lines)
  return folder, printed


@pytest.mark.slow
def test_commands_of_the_page_run(commands, tmp_path):
  folder, printed = commands
  assert list(printed) == list(SCRIPTS)
  assert 'AdamW              2' in printed['demo.py']
  meta = json.loads((folder / 'corpus' / 'meta.json').read_text())
  assert f'{meta["train_tokens"]:,} for training' in printed['prepare_text.py']
  assert 'checkpoint in runs/mine' in printed['train_gpt.py']
  assert printed['sample.py'].startswith('Once upon')
  assert len(printed['sample.py']) > len('Once upon')
  # Sampling leaves alone what a run that still trains is writing.
  out_dir = folder / 'runs' / 'mine'
  (out_dir / '3.orbax-checkpoint-tmp').mkdir()
  before = sorted(out_dir.rglob('*'))
  config, params = sample.load(str(out_dir))
  assert sorted(out_dir.rglob('*')) == before
  # The size of the vocabulary came from meta.json.
  assert config.optimizer == 'sophia_h'
  assert config.vocab_size == meta['vocab_size'] > 257
  assert params['tokens']['embedding'].shape == (meta['vocab_size'], 16)
  tokenizers.Tokenizer(tokenizers.models.BPE({'a': 9999}, [])).save(
    str(tmp_path / 'tokenizer.json')
  )
  with pytest.raises(ValueError, match=r'below vocab_size = \d+ .*; got 9999'):
    sample.sample(str(out_dir), 'a', data_dir=str(tmp_path))


# Preparation.


def decode_bin(folder, name):
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokens = np.fromfile(folder / name, np.uint16)
  end = tokenizer.token_to_id(text.END_OF_TEXT)
  *documents, rest = np.split(tokens, np.flatnonzero(tokens == end) + 1)
  assert not len(rest)
  return [tokenizer.decode(document[:-1].tolist()) for document in documents]


@pytest.mark.parametrize('piece_size', [5, 1 << 16])
def test_tokens_contain_all_of_the_text_once(tmp_path, monkeypatch, piece_size):
  monkeypatch.setattr(prepare_text, '_PIECE_SIZE', piece_size)
  names = [str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')]
  for name, string in zip(names, (PROSE, PROSE[::-1]), strict=True):
    pathlib.Path(name).write_bytes(string.encode())
  out = tmp_path / 'out'
  meta = prepare_text.prepare(names, str(out), 300, val_fraction=0.25)

  train, val = decode_bin(out, 'train.bin'), decode_bin(out, 'val.bin')
  assert [a + b for a, b in zip(train, val, strict=True)] == [
    PROSE,
    PROSE[::-1],
  ]
  for string in val:
    assert len(string.encode()) == pytest.approx(len(PROSE.encode()) / 4, abs=4)

  assert json.loads((out / 'meta.json').read_text()) == meta
  assert meta['vocab_size'] == 300
  sizes = [len(tokens) for tokens in text.load(str(out))]
  assert sizes == [meta['train_tokens'], meta['val_tokens']]
  assert meta['files'] == [
    {
      'path': name,
      'bytes': len(PROSE.encode()),
      'sha256': hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest(),
    }
    for name in names
  ]
  with pytest.raises(FileExistsError, match='already has a train'):
    prepare_text.prepare(names, str(out), 300)


def test_tokenizer_does_not_learn_from_what_is_held_out(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('early ' * 90 + 'late ' * 100)
  prepare_text.prepare([str(path)], str(tmp_path), 300, 0.49)
  tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert len(tokenizer.encode(' early').ids) == 1
  assert len(tokenizer.encode(' late').ids) > 1


def test_names_match_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.makedirs('folder/inner')
  inside = ['folder/a', 'folder/b', 'folder/inner/c']
  for name in [*inside, 'd[1].md', 'folder/.h']:
    pathlib.Path(name).write_text('text')
  pathlib.Path('folder/empty').touch()
  assert prepare_text.find_files(['folder']) == inside
  assert prepare_text.find_files(['d[1].md', '**/c', 'folder']) == [
    'd[1].md',
    'folder/inner/c',
    'folder/a',
    'folder/b',
  ]


@pytest.mark.parametrize(('names', 'settings', 'error', 'message'), [
    ([], {}, FileNotFoundError, 'but none was given'),
    (['nowhere'], {}, FileNotFoundError, "'nowhere' matches none"),
    (['empty'], {}, ValueError, 'empty is empty'),
    (['prose', 'latin'], {}, ValueError, 'latin is not, at byte 70003: inv'),
    (['cut'], {}, ValueError, r'cut is not, at byte 1000: unexpected end'),
    (['short'], {}, ValueError, r'val\.bin .* 65 tokens, .* have 12\.'),
    (['prose'], {'block_size': 9999}, ValueError, r'train\.bin .* 10000 tok'),
    (['prose'], {'vocab_size': 256}, ValueError, '257 .*; got 256'),
])  # fmt: skip
def test_bad_text_is_a_clear_error(
  tmp_path, monkeypatch, names, settings, error, message
):
  monkeypatch.chdir(tmp_path)
  for name, content in {
    'prose': PROSE.encode(),
    'short': b'a ' * 100,
    'empty': b'',
    'latin': b'a ' * 35_000 + b'abc\xe9\n' + b'a ' * 10_000,
    'cut': b'a ' * 500 + '日'.encode()[:2],
  }.items():
    pathlib.Path(name).write_bytes(content)
  with pytest.raises(error, match=message):
    prepare_text.prepare(names, 'out', **({'vocab_size': 300} | settings))
  # The folder is unchanged, so it can be used again.
  assert not os.path.exists('out') or not os.listdir('out')


# The size of the vocabulary.


def test_vocabulary_of_a_folder(tmp_path, monkeypatch):
  folder = str(tmp_path)
  assert text.vocab_size('', 64) == 64
  assert text.vocab_size(folder) is None  # as nanoGPT's
  (tmp_path / 'meta.json').write_text('{"vocab_size": 300}')
  assert text.vocab_size(folder) == 300
  assert text.vocab_size(folder, 384) == 384
  monkeypatch.chdir(folder)
  assert text.vocab_size('') is None  # the standard library, wherever it runs
  with pytest.raises(ValueError, match=r'at least 300, .*; got 299'):
    text.vocab_size(folder, 299)
  (tmp_path / 'meta.json').write_text('{"vocab_size": null}')
  with pytest.raises(ValueError, match=r'meta\.json must be JSON with a voc'):
    text.vocab_size(folder)


# Sampling.


@pytest.mark.parametrize(
  ('temperature', 'top_k', 'vocab_size'), [(0.5, 99, 40), (2.0, 3, 50)]
)
def test_draws_have_the_probabilities(temperature, top_k, vocab_size):
  logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
  p = np.exp(logits[:vocab_size] / temperature)
  p[np.argsort(-p)[top_k:]] = 0.0
  p /= p.sum()
  num_draws = 20_000
  draws = jax.vmap(
    lambda key: sample.choose(logits, key, temperature, top_k, vocab_size)
  )(jax.random.split(jax.random.key(0), num_draws))
  counts = np.bincount(draws, minlength=vocab_size)
  # Five standard deviations, so 0 where p is 0.
  assert np.all(
    np.abs(counts / num_draws - p) <= 5 * np.sqrt(p * (1 - p) / num_draws)
  )


def test_temperature_0_is_the_likeliest():
  logits = jnp.array([0.0, 3.0, 2.0, 9.0])
  assert sample.choose(logits, jax.random.key(0), 0.0, 0, 3) == 1


def test_window_is_the_last_tokens():
  """Compares with the model on the window alone, without padding."""
  config = gpt_configs.Config(vocab_size=64, **TINY)
  model = gpt_program.make_model(config)
  tokens = [7, 1, 9, 4, 2, 5, 3]  # one fewer than the window has
  params = tiny_gpt.random_params(model)
  window = np.full(8, 63, np.int32)
  window[: len(tokens)] = tokens
  generate = jax.jit(sample.make_generate(model, 4, 0.0, 0, 64))
  drawn = generate(params, window, len(tokens), jax.random.key(0))
  apply = jax.jit(model.apply)  # compiled for seven and for eight tokens
  for _ in range(4):
    logits = apply({'params': params}, jnp.array([tokens[-8:]]))[0, -1]
    tokens.append(int(jnp.argmax(logits)))
  assert drawn.tolist() == tokens[7:]
  assert len(set(tokens[7:])) == 4


def test_bytes_are_the_codec_of_the_standard_library():
  codec = sample.make_codec('')
  tokens = codec.encode('é\n')
  assert tokens == [0xC3, 0xA9, 0x0A]
  assert codec.decode(tokens) == 'é\n'
  assert codec.decode([0xC3]) == '\N{REPLACEMENT CHARACTER}'
  assert (codec.vocab_size, codec.start) == (256, 10)


@pytest.mark.slow
def test_demo_is_sampled_in_bytes(commands):
  folder, _ = commands
  (out_dir,) = folder.glob('runs/demo-*/adamw')
  draw = lambda **settings: sample.sample(str(out_dir), 'é', 9, **settings)
  assert draw() == draw()
  assert draw() != draw(seed=1)
  assert draw().startswith('é')
