"""Settings that make Sophia unstable, their diagnostics, and remedies.

  python benchmarks/stability.py --output=benchmarks/stability.json
  python benchmarks/stability.py --show=benchmarks/stability.json --plot=x.png

Sophia-H trains the demo's byte-level GPT (0.12 million parameters). It starts
from good settings and changes one of them at a time to one that users report as
trouble: a learning rate that is too high, no warm-up, a large b1, few tokens
per step, or the paper's ε. Each is combined with each remedy of this library.

The table gives the final validation loss. The plot shows loss, win rate, norm
of h and the negative fraction of h for one trouble. Nothing is timed.
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
import sys

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from matplotlib import figure
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
  """Settings of one run. The defaults are good ones."""

  learning_rate: float = 2e-3
  b1: float = 0.8
  b2: float = 0.97
  eps: float = 1e-8
  warmup: float = 0.33  # fraction of the steps
  sequences: int = 32  # per step, of 64 tokens each
  num_steps: int = 240
  parts: int = 1  # number of parts of the batch, with an estimate on each
  target_win_rate: float | None = None
  refresh_before_update: bool = False


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
_SHOWN = 'learning rate × 4'
_CONFIG = gpt_configs.get_config('demo', 'sophia_h')
_CHUNK = 10  # steps per call, and per point of the plot
_LABELS = {
  'loss': 'Training loss (nats)',
  'win_rate': 'Win rate',
  'negative_fraction': 'Fraction of h below zero',
  'curvature_norm': 'Norm of h',
}
_LINES = [  # of the plot
  ('none', 'nothing', 'learning rate × 1', '#999999', '-'),
  (_SHOWN, 'nothing', '× 4, nothing', '#000000', '--'),
  (_SHOWN, 'target_win_rate=0.3', '× 4, target_win_rate=0.3', '#0072B2', '-'),
  (_SHOWN, 'microbatched', '× 4, microbatched', '#D55E00', '-.'),
  (_SHOWN, 'eps=1e-4', '× 4, eps=1e-4', '#009E73', ':'),
]


def make_optimizer(settings: Settings, seed: int):
  """Returns Sophia-H with clipping, warm-up and cosine."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    settings.learning_rate,
    int(settings.warmup * settings.num_steps),
    settings.num_steps,
    0.05 * settings.learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    sophia_optax.sophia(
      schedule,
      settings.b1,
      settings.b2,
      settings.eps,
      weight_decay=0.1,
      weight_decay_mask=gpt.decay_mask,
      target_win_rate=settings.target_win_rate,
      refresh_before_update=settings.refresh_before_update,
      diagnostics=True,
      hessian_diagonal_fn=sophia_optax.microbatched(
        sophia_optax.hutchinson_estimator_diag_hessian(seed), settings.parts
      ),
    ),
  )


def run(settings: Settings, seed: int) -> dict:
  """Trains once; returns metrics of every tenth step, and the final loss."""
  config = dataclasses.replace(_CONFIG, unroll=1)
  sizes = config.block_size, config.vocab_size
  tokens, held_out = text.load(config.data_dir)
  model = gpt_program.make_model(config)
  loss_fn = gpt_program.make_loss(gpt_program.make_predict(model))
  optimizer = make_optimizer(settings, seed)

  @functools.partial(jax.jit, donate_argnums=0)
  def train(carry, batches):  # batches: (_CHUNK, B, T + 1)
    def step(carry, batch):
      params, state = carry
      loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      updates, state = optimizer.update(
        grads, state, params, obj_fn=loss_fn, batch=batch
      )
      return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, carry, batches)
    return (params, state), {
      'loss': jnp.mean(losses),
      'win_rate': optax.tree.get(state, 'win_rate'),
      'negative_fraction': optax.tree.get(state, 'negative_fraction'),
      'curvature_norm': optax.tree.norm(optax.tree.get(state, 'nu')),
    }

  params = model.init(
    jax.random.key(seed), jnp.zeros((1, config.block_size), jnp.int32)
  )['params']
  carry = params, optimizer.init(params)
  history = []
  for start in range(0, settings.num_steps, _CHUNK):
    carry, seen = train(
      carry,
      np.stack(
        [
          text.sample(tokens, seed, step, settings.sequences, *sizes)
          for step in range(start, start + _CHUNK)
        ]
      ),
    )
    history.append(
      {'step': start + _CHUNK}
      | {name: float(f'{x:.4g}') for name, x in seen.items()}
    )
  validation = text.validation(held_out, 16, 32, *sizes)
  return {
    'history': history,
    'val_loss': float(gpt_program.make_evaluate(loss_fn)(carry[0], validation)),
  }


def render(runs: list[dict]) -> str:
  """Returns a Markdown table with a row for each remedy."""
  lines = [f'| | {" | ".join(TROUBLES)} |', '|---' * (1 + len(TROUBLES)) + '|']
  for remedy in REMEDIES:
    cells = []
    for trouble in TROUBLES:
      losses = [
        r['val_loss']
        for r in runs
        if (r['trouble'], r['remedy']) == (trouble, remedy)
      ]
      cells.append(f'{statistics.mean(losses):.3f}' if losses else '')
    lines.append(f'| {remedy} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def plot(runs: list[dict]) -> figure.Figure:
  """Draws the diagnostics of one trouble, with each remedy."""
  fig = figure.Figure(figsize=(7.5, 6), layout='constrained')
  for ax, name in zip(fig.subplots(2, 2).flat, _LABELS, strict=True):
    for trouble, remedy, label, color, style in _LINES:
      history = next(
        r['history']
        for r in runs
        if r['seed'] == 0 and (r['trouble'], r['remedy']) == (trouble, remedy)
      )
      ax.plot(
        [h['step'] for h in history],
        [h[name] for h in history],
        color=color,
        linestyle=style,
        linewidth=2,
        label=label,
      )
    ax.set(xlabel='Steps', ylabel=_LABELS[name])
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
    if name == 'curvature_norm':
      ax.set_yscale('log')
    if name == 'negative_fraction':
      ax.axhline(0.5, color='#999999', linewidth=1, zorder=0)
  fig.axes[0].legend(frameon=False, fontsize='small')
  fig.suptitle(f'Sophia-H, {_SHOWN}: diagnostics')
  return fig


def run_all(path: pathlib.Path, num_seeds: int) -> list[dict]:
  """Runs the cases that are not in the file, and writes it after each."""
  runs = records.read(path)['runs'] if path.exists() else []
  done = {(r['seed'], r['trouble'], r['remedy']) for r in runs}
  left = [
    case
    for case in itertools.product(range(num_seeds), TROUBLES, REMEDIES)
    if case not in done
  ]
  fingerprint = text.fingerprint(text.standard_library())
  for seed, trouble, remedy in tqdm.tqdm(left):
    settings = Settings(**TROUBLES[trouble] | REMEDIES[remedy])
    runs.append(
      {'trouble': trouble, 'remedy': remedy, 'seed': seed} | run(settings, seed)
    )
    records.write(path, text_sha256=fingerprint, runs=runs)
  return runs


def main(argv):
  """Runs, prints and writes."""
  records.check_only_flags(argv)
  if records.SHOW.value:
    runs = records.read(records.SHOW.value)['runs']
  else:
    runs = run_all(
      pathlib.Path(records.OUTPUT.value or 'stability.json'), _SEEDS.value
    )
  print(render(runs))
  if _PLOT.value:
    plot(runs).savefig(_PLOT.value, dpi=110)


if __name__ == '__main__':
  _PLOT = flags.DEFINE_string('plot', None, 'PNG file for the plot.')
  _SEEDS = flags.DEFINE_integer('seeds', 1, 'Number of runs of each case.')
  app.run(main)
