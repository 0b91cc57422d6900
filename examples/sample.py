"""Prints text that a model of train_gpt.py continues, token by token.

  python examples/sample.py --out_dir=runs/demo_sophia_h --prompt='def '

The newest checkpoint has the settings of the model and the name of the folder
that it was trained on, whose tokenizer.json is used. Without such a folder a
token is a byte. All tokens come from one program, compiled once.
"""

from collections.abc import Callable
import dataclasses
import os
from typing import NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import checkpoints
import gpt_configs
import sharding
import text
import train_gpt


class Codec(NamedTuple):
  """How text becomes tokens and tokens become text."""

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]
  vocab_size: int
  start: int  # the token before a text


def make_codec(data_dir: str) -> Codec:
  """Returns the codec of a folder of prepare_text.py; '' is for bytes.

  Args:
    data_dir: folder with tokenizer.json.

  Raises:
    FileNotFoundError: if there is no tokenizer.json.
  """
  if not data_dir:
    return Codec(
      lambda string: list(string.encode()),
      lambda tokens: bytes(tokens).decode(errors='replace'),
      256,
      ord('\n'),
    )
  path = os.path.join(data_dir, 'tokenizer.json')
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f'The tokenizer that the model was trained with is needed; there is no '
      f'{path}. Pass --data_dir with a folder that has it.'
    )
  tokenizer = tokenizers.Tokenizer.from_file(path)
  return Codec(
    lambda string: tokenizer.encode(string).ids,
    lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
    tokenizer.get_vocab_size(),
    tokenizer.token_to_id(text.END_OF_TEXT) or 0,
  )


def load(out_dir: str):
  """Returns the settings and the parameters of a run's newest checkpoint."""
  names = {field.name for field in dataclasses.fields(gpt_configs.Config)}

  def make_config(settings):
    # On one device, whatever the mesh it was trained on.
    known = {name: x for name, x in settings.items() if name in names}
    return gpt_configs.Config(**(known | {'mesh': ''}))

  def make_abstract_state(settings):
    mesh = sharding.make_mesh('')
    return train_gpt.make_program(make_config(settings), mesh).state

  settings, state = checkpoints.load(out_dir, make_abstract_state)
  return make_config(settings), state.params


def choose(logits, key, temperature, top_k, vocab_size):
  """Draws a token from logits (V,); see `generate`."""
  # A model may have more tokens than the tokenizer.
  logits = logits[:vocab_size]
  if temperature == 0:
    return jnp.argmax(logits)
  if top_k:
    lowest = jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1]
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return jax.random.categorical(key, logits / temperature)


def make_generate(model, num_tokens, temperature, top_k, vocab_size):
  """Returns (params, window, length, key) -> tokens, to be jitted.

  The window (T,) begins with `length` tokens; what comes after them has no
  effect, as attention is causal. Once it is full, its first token leaves it.
  """

  def generate(params, window, length, key):
    def step(carry, key):
      window, length = carry
      logits = model.apply({'params': params}, window[None])  # (1, T, V)
      token = choose(
        logits[0, length - 1], key, temperature, top_k, vocab_size
      ).astype(window.dtype)
      window = jnp.where(length < len(window), window, jnp.roll(window, -1))
      length = jnp.minimum(length + 1, len(window))
      return (window.at[length - 1].set(token), length), token

    keys = jax.random.split(key, num_tokens)
    return jax.lax.scan(step, (window, length), keys)[1]  # (num_tokens,)

  return generate


def check_settings(num_tokens, temperature, top_k):
  if num_tokens < 1:
    raise ValueError(f'num_tokens must be at least 1; got {num_tokens}.')
  if temperature < 0:
    raise ValueError(
      f'temperature must be at least 0, the likeliest token; got {temperature}.'
    )
  if top_k < 0:
    raise ValueError(f'top_k must be at least 0, all tokens; got {top_k}.')


def sample(
  out_dir: str,
  prompt: str = '',
  num_tokens: int = 200,
  temperature: float = 0.8,
  top_k: int = 0,
  seed: int = 0,
  data_dir: str | None = None,
) -> str:
  """Returns a prompt and what the model of a run continues it with.

  Args:
    out_dir: folder of the run.
    prompt: text to begin with; of a long one the last block_size tokens count.
    num_tokens: number of tokens to draw.
    temperature: the logits are divided by it; 0 for the likeliest token.
    top_k: only that many of the likeliest tokens are drawn; 0 for all.
    seed: of the draws.
    data_dir: folder with the tokenizer.json; None for that of the training.

  Raises:
    FileNotFoundError: if there is no checkpoint or no tokenizer.
    ValueError: if a setting is out of range, or the model has no such token.
  """
  check_settings(num_tokens, temperature, top_k)
  config, params = load(out_dir)
  codec = make_codec(config.data_dir if data_dir is None else data_dir)
  given = codec.encode(prompt)
  if max(given, default=0) >= config.vocab_size:
    raise ValueError(
      f'Tokens of the prompt must be below vocab_size = {config.vocab_size} of '
      f'the model; got {max(given)}. Pass --data_dir with the tokenizer.json '
      'that the model was trained with.'
    )
  seen = (given or [codec.start])[-config.block_size :]
  window = np.zeros(config.block_size, np.int32)
  window[: len(seen)] = seen
  generate = jax.jit(
    make_generate(
      train_gpt.make_model(config),
      num_tokens,
      temperature,
      top_k,
      min(codec.vocab_size, config.vocab_size),
    )
  )
  tokens = generate(params, window, len(seen), jax.random.key(seed))
  # Together, as a character can have several tokens.
  return codec.decode(given + tokens.tolist())


def define_flags():
  flags.DEFINE_string(
    'out_dir', None, 'Folder of a run of train_gpt.py.', required=True
  )
  flags.DEFINE_string('prompt', '', 'Text to begin with.')
  flags.DEFINE_integer('num_tokens', 200, 'Number of tokens to draw.')
  flags.DEFINE_float(
    'temperature', 0.8, 'Logits are divided by it; 0: the likeliest token.'
  )
  flags.DEFINE_integer('top_k', 0, 'Draw of that many likeliest; 0: of all.')
  flags.DEFINE_integer('seed', 0, 'Seed of the draws.')
  flags.DEFINE_string(
    'data_dir',
    None,
    'Folder with the tokenizer.json, if it is not where it was in training.',
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Flags only, such as --top_k=9; got {argv[1:]}.')
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file as INFO
  values = flags.FLAGS
  try:
    print(
      sample(
        values.out_dir,
        values.prompt,
        values.num_tokens,
        values.temperature,
        values.top_k,
        values.seed,
        values.data_dir,
      )
    )
  except (FileNotFoundError, ValueError) as error:
    raise app.UsageError(str(error)) from error


if __name__ == '__main__':
  define_flags()
  app.run(main)
