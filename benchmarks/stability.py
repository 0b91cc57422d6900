"""Settings that make Sophia unstable, remedies, and a γ that adapts.

  python benchmarks/stability.py --output=benchmarks/stability.json
  python benchmarks/stability.py --show=benchmarks/stability.json

In the first table Sophia-H trains the demo's byte-level GPT (0.12 million
parameters). It starts from good settings and changes one of them at a time to
one that users report as trouble: a learning rate that is too high, no warm-up,
a large b1, few tokens per step, or the paper's ε. Each is combined with each
remedy of this library. The table gives the final validation loss.

The second table compares a fixed γ with one that adapts to a win rate, in 250
steps of 8,192 tokens. Except for γ and target_win_rate, the settings are the
best of twelve random trials. Columns:
final validation loss and win rate, the final γ, and the first validation after
which the win rate stays within 0.1 of the target. Nothing is timed.
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
  """Settings of a run. The defaults are good ones of the first table."""

  learning_rate: float = 2e-3
  b1: float = 0.8
  b2: float = 0.97
  eps: float = 1e-8
  warmup: float = 0.33  # fraction of the steps
  sequences: int = 32  # per step, of 64 tokens each
  num_steps: int = 240
  curvature_of: int | None = None  # sequences for the curvature; None: all
  parts: int = 1  # number of parts of these, with an estimate on each
  gamma: float = 0.01
  update_interval: int = 10
  target_win_rate: float | None = None
  refresh_before_update: bool = False
  bias_correction: bool = True


_ESTIMATORS = {
  'sophia_h': sophia_optax.hutchinson_estimator_diag_hessian,
  'sophia_g': sophia_optax.gauss_newton_bartlett_estimator_diag_hessian,
}
TROUBLES = {
  'none': {},
  'learning rate × 4': {'learning_rate': 8e-3},
  'no warm-up': {'warmup': 0.0},
  'b1 = 0.965': {'b1': 0.965},
  '256 tokens a step, 4 times as long': {'sequences': 4, 'num_steps': 960},
  'ε = 1e-12': {'eps': 1e-12},
}
REMEDIES = {
  'nothing': {},
  'target_win_rate=0.3': {'target_win_rate': 0.3},
  'microbatched': {'parts': 4},
  'eps=1e-4': {'eps': 1e-4},
  'warm-up of 60 %': {'warmup': 0.6},
  'refresh_before_update': {'refresh_before_update': True},
}
_CONFIG = gpt_configs.CONFIGS['demo']
_CHUNK = 10  # steps per call, and from one win rate to the next
_TARGET = 0.3
_STARTS = (1e-2, 1.0, 1e2)  # γ at first, in multiples of the tuned one
_LONGER = {'sequences': 128, 'num_steps': 250, 'warmup': 0.5}
_TUNED = {
  'sophia_h': Settings(
    0.00399, 0.816, 0.968, gamma=0.00487, update_interval=5, curvature_of=32,
    **_LONGER,
  ),
  'sophia_g': Settings(
    0.00712, 0.737, 0.975, 1e-15, gamma=0.0186, update_interval=2,
    curvature_of=64, parts=8, bias_correction=False, **_LONGER,
  ),
}  # fmt: skip


def run(settings: Settings, seed: int, optimizer: str = 'sophia_h'):
  """Trains once with clipping, warm-up and cosine.

  Returns:
    The final validation loss, and every _CHUNK steps the win rate and γ,
    relative to the γ of the settings.
  """
  config = dataclasses.replace(_CONFIG, unroll=1)
  sizes = config.block_size, config.vocab_size
  tokens, held_out = text.load(config.data_dir)
  model = gpt_program.make_model(config)
  predict_fn = gpt_program.make_predict(model)
  loss_fn = gpt_program.make_loss(predict_fn)
  s, peak = settings, settings.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak, int(s.warmup * s.num_steps), s.num_steps, 0.05 * peak
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
      refresh_before_update=s.refresh_before_update,
      hessian_diagonal_fn=sophia_optax.microbatched(
        _ESTIMATORS[optimizer](seed), s.parts
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

  shape = jnp.zeros((1, config.block_size), jnp.int32)
  params = model.init(jax.random.key(seed), shape)['params']
  carry = params, tx.init(params)
  history = []
  for start in range(0, s.num_steps, _CHUNK):
    batches = [
      text.sample(tokens, seed, step, s.sequences, *sizes)
      for step in range(start, start + _CHUNK)
    ]
    carry = train(carry, np.stack(batches))
    get = functools.partial(optax.tree.get, carry[1])
    history.append((float(get('win_rate')), float(get('gamma_factor') or 1.0)))
  validation = text.validation(held_out, 16, 32, *sizes)
  loss = float(gpt_program.make_evaluate(loss_fn)(carry[0], validation))
  return loss, history


def run_case(trouble: str, remedy: str) -> dict:
  """Runs a case of the first table."""
  loss, _ = run(Settings(**TROUBLES[trouble] | REMEDIES[remedy]), seed=0)
  case = {'trouble': trouble, 'remedy': remedy}
  return case | {'val_loss': float(f'{loss:.6g}')}


def run_gamma(optimizer: str, start: float, target: float) -> dict:
  """Trains once with γ at a multiple of the tuned one."""
  tuned = _TUNED[optimizer]
  changes = {'gamma': start * tuned.gamma, 'target_win_rate': target or None}
  loss, history = run(dataclasses.replace(tuned, **changes), 0, optimizer)
  return {
    'optimizer': optimizer,
    'start': start,
    'target_win_rate': target,
    'val_loss': float(f'{loss:.6g}'),
    'gamma_factor': float(f'{history[-1][1]:.6g}'),
    'win_rate': [float(f'{rate:.4g}') for rate, _ in history],
  }


# Of each table: what names a case, all names, and what runs it.
_TABLES = {
  'runs': (
    ('trouble', 'remedy'),
    list(itertools.product(TROUBLES, REMEDIES)),
    run_case,
  ),
  'gamma': (
    ('optimizer', 'start', 'target_win_rate'),
    list(itertools.product(_TUNED, _STARTS, (0.0, _TARGET))),
    run_gamma,
  ),
}


def measure(results: records.Results, save) -> None:
  """Runs the cases that are missing, and saves after each."""
  results['text_sha256'] = text.fingerprint(text.standard_library())
  for table, (keys, cases, run_one) in _TABLES.items():
    found = results[table] = results.pop(table, [])
    done = {tuple(case[key] for key in keys) for case in found}
    for case in tqdm.tqdm([x for x in cases if x not in done], desc=table):
      found.append(run_one(*case))
      save()


def _render_gamma(cases):
  figures = {}
  for case in cases:
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


def render(results: records.Results) -> str:
  """Lays out both tables."""
  losses = {
    (r['trouble'], r['remedy']): f'{r["val_loss"]:.3f}' for r in results['runs']
  }
  rows = (
    [remedy, *(losses.get((trouble, remedy), '') for trouble in TROUBLES)]
    for remedy in REMEDIES
  )
  table = records.markdown(['', *TROUBLES], rows)
  return f'{table}\n\n{_render_gamma(results.get("gamma", []))}'


if __name__ == '__main__':
  records.main(measure, render)
