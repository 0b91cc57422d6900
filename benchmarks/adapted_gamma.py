"""Compares a fixed γ with one that adapts to a win rate.

  python benchmarks/adapted_gamma.py --output=benchmarks/adapted_gamma.json
  python benchmarks/adapted_gamma.py --show=benchmarks/adapted_gamma.json

Sophia trains the demo's byte-level GPT (0.12 million parameters) for 250 steps
of 8,192 tokens, from three starts of γ. Except for γ and target_win_rate, the
settings are the best of twelve random trials. Columns: final validation loss
and win rate, the final γ relative to the tuned one, and the first of every
tenth step from which the win rate stays within 0.1 of the target.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import records

sys.path.append(records.EXAMPLES)
import gpt
import gpt_configs
import gpt_program
import sophia_optax
import text


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run, with a curvature batch in `parts` parts."""

  learning_rate: float
  b1: float
  b2: float
  eps: float
  gamma: float
  update_interval: int
  curvature_of: int  # sequences
  parts: int
  bias_correction: bool
  sequences: int = 128  # of 64 tokens each
  num_steps: int = 250
  target_win_rate: float | None = None


_ESTIMATORS = {
  'sophia_h': sophia_optax.hutchinson_estimator_diag_hessian,
  'sophia_g': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}
TUNED = {
  'sophia_h': Settings(
    0.00399, 0.816, 0.968, 1e-8, gamma=0.00487, update_interval=5,
    curvature_of=32, parts=1, bias_correction=True,
  ),
  'sophia_g': Settings(
    0.00712, 0.737, 0.975, 1e-15, gamma=0.0186, update_interval=2,
    curvature_of=64, parts=8, bias_correction=False,
  ),
}  # fmt: skip
_CONFIG = dataclasses.replace(gpt_configs.CONFIGS['demo'], unroll=1)
_CHUNK = 10  # steps per call, and from one win rate to the next
_TARGET = 0.3
_STARTS = (1e-2, 1.0, 1e2)  # γ at first, in multiples of the tuned one
_KEYS = 'optimizer', 'start', 'target_win_rate'


def run(optimizer: str, settings: Settings):
  """Trains once with clipping, warm-up over half of the steps, and cosine.

  Returns:
    The final validation loss, and every _CHUNK steps the win rate and γ,
    relative to the γ of the settings.
  """
  sizes = _CONFIG.block_size, _CONFIG.vocab_size
  tokens, held_out = text.load(_CONFIG.data_dir)
  model = gpt_program.make_model(_CONFIG)
  predict_fn = gpt_program.make_predict(model)
  loss_fn = gpt_program.make_loss(predict_fn)
  s, peak = settings, settings.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak, s.num_steps // 2, s.num_steps, 0.05 * peak
  )
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    sophia_optax.sophia(
      schedule,
      s.b1,
      s.b2,
      s.eps,
      weight_decay=0.1,
      weight_decay_mask=gpt.decay_mask,
      gamma=s.gamma,
      update_interval=s.update_interval,
      bias_correction=s.bias_correction,
      target_win_rate=s.target_win_rate,
      hessian_diagonal_fn=sophia_optax.microbatched(
        _ESTIMATORS[optimizer](), s.parts
      ),
    ),
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def train(carry, batches):  # batches: (_CHUNK, B, T + 1)
    def step(carry, batch):
      params, state = carry
      updates, state = tx.update(
        jax.grad(loss_fn)(params, batch),
        state,
        params,
        obj_fn=loss_fn,
        predict_fn=predict_fn,
        batch=batch[: s.curvature_of],
      )
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, batches)[0]

  shape = jnp.zeros((1, _CONFIG.block_size), jnp.int32)
  params = model.init(jax.random.key(0), shape)['params']
  carry = params, tx.init(params)
  history = []
  for start in range(0, s.num_steps, _CHUNK):
    batches = [
      text.sample(tokens, 0, step, s.sequences, *sizes)
      for step in range(start, start + _CHUNK)
    ]
    carry = train(carry, np.stack(batches))
    get = functools.partial(optax.tree.get, carry[1])
    history.append((float(get('win_rate')), float(get('gamma_factor') or 1.0)))
  validation = text.validation(held_out, 16, 32, *sizes)
  loss = float(gpt_program.make_evaluate(loss_fn)(carry[0], validation))
  return loss, history


def measure(results: records.Results, save) -> None:
  """Runs the cases that are missing, and saves after each."""
  results['text_sha256'] = text.fingerprint(text.standard_library())
  found = results['gamma'] = results.pop('gamma', [])
  done = {tuple(case[key] for key in _KEYS) for case in found}
  cases = itertools.product(TUNED, _STARTS, (0.0, _TARGET))
  for case in tqdm.tqdm([x for x in cases if x not in done]):
    optimizer, start, target = case
    tuned = TUNED[optimizer]
    changes = {'gamma': start * tuned.gamma, 'target_win_rate': target or None}
    loss, history = run(optimizer, dataclasses.replace(tuned, **changes))
    figures = {
      'val_loss': float(f'{loss:.6g}'),
      'gamma_factor': float(f'{history[-1][1]:.6g}'),
      'win_rate': [float(f'{rate:.4g}') for rate, _ in history],
    }
    found.append(dict(zip(_KEYS, case, strict=True)) | figures)
    save()


def render(results: records.Results) -> str:
  """Lays out the table."""
  figures = {}
  for case in results['gamma']:
    rates, start = case['win_rate'], case['start']
    kind = 'adapted ' if case['target_win_rate'] else ''
    row = figures.setdefault(f'{case["optimizer"]}, {start:g}', {})
    row |= {f'{kind}loss': case['val_loss'], f'{kind}win rate': rates[-1]}
    if kind:
      row['γ'] = case['gamma_factor'] * start
      off = [i for i, x in enumerate(rates, 1) if abs(x - _TARGET) > 0.1]
      row['from step'] = _CHUNK * (max(off, default=0) + 1)
  digits = {'loss': 3, 'adapted loss': 3, 'from step': 0}
  return records.figures('start of γ', figures, lambda x: digits.get(x, 2))


if __name__ == '__main__':
  records.main(measure, render)
