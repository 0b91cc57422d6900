"""Samples text from a model that was trained with train_gpt.py.

  python examples/sample.py --out_dir=runs/demo_sophia_h --prompt='def '

The newest checkpoint contains the settings of the model and the name of its
data folder. Text is encoded with the tokenizer.json in that folder, or without
a folder as bytes. All tokens are drawn in one compiled program.
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
import gpt_program
import sharding
import text


class Codec(NamedTuple):
  """Conversion between text and tokens."""

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]
  vocab_size: int
  start: int  # the token that precedes a text


def make_codec(data_dir: str) -> Codec:
  """Returns the codec for a model.

  Args:
    data_dir: folder with the tokenizer.json of prepare_text.py; '' for bytes.

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
      'The tokenizer of the model is needed; there is no '
      f'{path}. Pass --data_dir with the folder that contains it.'
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
    # Sampling runs on one device, even if training used several.
    known = {name: x for name, x in settings.items() if name in names}
    return gpt_configs.Config(**(known | {'mesh': ''}))

  def make_abstract_state(settings):
    mesh = sharding.make_mesh('')
    return gpt_program.make_program(make_config(settings), mesh).state

  settings, state = checkpoints.load(out_dir, make_abstract_state)
  return make_config(settings), state.params


def choose(logits, key, temperature, top_k, vocab_size):
  """Draws a token from logits (V,); see `generate`."""
  # The vocabulary of the model can be larger than that of the tokenizer.
  logits = logits[:vocab_size]
  if temperature == 0:
    return jnp.argmax(logits)
  if top_k:
    lowest = jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1]
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return jax.random.categorical(key, logits / temperature)


def make_generate(model, num_tokens, temperature, top_k, vocab_size):
  """Returns the function (params, window, length, key) -> tokens, to be jitted.

  The first `length` entries of the window (T,) are tokens. The others have no
  effect, because attention is causal. When the window is full, the oldest token
  is dropped.
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
      'temperature must be at least 0, which chooses the likeliest token; got '
      f'{temperature}.'
    )
  if top_k < 0:
    raise ValueError(
      f'top_k must be at least 0, which allows all tokens; got {top_k}.'
    )


def sample(
  out_dir: str,
  prompt: str = '',
  num_tokens: int = 200,
  temperature: float = 0.8,
  top_k: int = 0,
  seed: int = 0,
  data_dir: str | None = None,
) -> str:
  """Returns the prompt and its continuation by the model of a run.

  Args:
    out_dir: folder of the run.
    prompt: text to continue. The model sees its last block_size tokens.
    num_tokens: number of tokens to draw.
    temperature: divisor of the logits; 0 chooses the likeliest token.
    top_k: number of likeliest tokens to draw from; 0 for all.
    seed: seed of the draws.
    data_dir: folder with the tokenizer.json. None means the folder that the
      model was trained on.

  Raises:
    FileNotFoundError: if there is no checkpoint or no tokenizer.
    ValueError: if a setting is out of range, or a token of the prompt is not in
      the vocabulary of the model.
  """
  check_settings(num_tokens, temperature, top_k)
  config, params = load(out_dir)
  codec = make_codec(config.data_dir if data_dir is None else data_dir)
  given = codec.encode(prompt)
  if max(given, default=0) >= config.vocab_size:
    raise ValueError(
      'Tokens of the prompt must be below vocab_size = '
      f'{config.vocab_size} of the model; got {max(given)}. Pass --data_dir '
      'with the tokenizer.json of the model.'
    )
  seen = (given or [codec.start])[-config.block_size :]
  window = np.zeros(config.block_size, np.int32)
  window[: len(seen)] = seen
  generate = jax.jit(
    make_generate(
      gpt_program.make_model(config),
      num_tokens,
      temperature,
      top_k,
      min(codec.vocab_size, config.vocab_size),
    )
  )
  tokens = generate(params, window, len(seen), jax.random.key(seed))
  # Decodes all tokens together, because a character can have several tokens.
  return codec.decode(given + tokens.tolist())


def define_flags():
  flags.DEFINE_string(
    'out_dir', None, 'Folder of a run of train_gpt.py.', required=True
  )
  flags.DEFINE_string('prompt', '', 'Text to continue.')
  flags.DEFINE_integer('num_tokens', 200, 'Number of tokens to draw.')
  flags.DEFINE_float(
    'temperature', 0.8, 'Divisor of the logits; 0: choose the likeliest token.'
  )
  flags.DEFINE_integer(
    'top_k', 0, 'Number of likeliest tokens to draw from; 0: all.'
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the draws.')
  flags.DEFINE_string(
    'data_dir',
    None,
    'Folder with the tokenizer.json, if it has moved since training.',
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f'Only flags are accepted, such as --top_k=9; got {argv[1:]}.'
    )
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
