"""Cost and variance of estimators, compared with one gradient.

  python benchmarks/estimators.py --output=benchmarks/estimators.json
  python benchmarks/estimators.py --show=benchmarks/estimators.json

Each estimator is drawn many times, for a GPT with 2 layers, width 64, 32 × 64
tokens and 256 token types. Columns:

* FLOPs/gradient: counted in the jaxpr, with loops multiplied by their length.
* MB: temporaries of the compiled program.
* scatter: relative standard deviation, √(Σ variance) / √(Σ mean²). The square
  of a mean of n draws is reduced by variance / n, by which it is too large.
* variance/whole: compared with the same estimator on the whole batch at once.
* mean, in errors: distance of the mean from that of the first row of its kind,
  in standard errors. It is about 1 if both are unbiased.
"""

import sys
from typing import NamedTuple

from absl import flags
import jax
import numpy as np
import optax
import tqdm

import records
import sophia_optax

sys.path.append(records.EXAMPLES)
import dry_run
import gpt
import gpt_program


class Row(NamedTuple):
  """An estimator, and the name of the row to compare it with."""

  name: str
  estimator: optax.GradientTransformation
  base: str


def rows() -> list[Row]:
  """Returns both estimators on parts of the batch, and with several samples."""
  h = sophia_optax.hutchinson_estimator_diag_hessian
  g = sophia_optax.gauss_newton_bartlett_estimator_diag_hessian
  result = []
  for kind, make in (('H', h), ('G', g)):
    base = f'{kind}, whole batch'
    result.append(Row(base, make(), base))
    for parts in (2, 4, 8):
      tx = sophia_optax.microbatched(make(), parts)
      result.append(Row(f'{kind}, {parts} parts', tx, base))
    result.append(Row(f'{kind}, 4 samples', make(num_samples=4), base))
    if kind == 'H':
      result.append(Row('H, normal probe', make(distribution='normal'), base))
      for hvp in ('reverse_over_reverse', 'finite_difference'):
        result.append(Row(f'H, {hvp}', make(hvp=hvp), base))
  return result


def measure(draws: int) -> dict[str, dict[str, float]]:
  """Returns a dict of the columns of each row."""
  model = gpt.GPT(256, 64, 2, 2, 64, unroll=2)
  tokens = jax.random.randint(jax.random.key(0), (32, 65), 0, 256)
  params = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])['params']
  # Larger parameters, because initial ones give almost uniform predictions.
  params = jax.tree.map(lambda p: 2.0 * p, params)
  predict_fn = gpt_program.make_predict(model)
  loss_fn = gpt_program.make_loss(predict_fn)

  def cost(fn, *args):
    compiled = jax.jit(fn).lower(*args).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled, dry_run.matmul_flops(fn, *args)[1], memory / 1e6

  _, gradient_flops, gradient_mb = cost(jax.grad(loss_fn), params, tokens)
  table = {'gradient': {'FLOPs/gradient': 1.0, 'MB': gradient_mb}}
  moments = {}
  for row in tqdm.tqdm(rows(), desc='estimators'):

    def estimate(params, tokens, state, estimator=row.estimator):
      return estimator.update(
        None, state, params, obj_fn=loss_fn, predict_fn=predict_fn, batch=tokens
      )

    state = row.estimator.init(params)
    compiled, flops, megabytes = cost(estimate, params, tokens, state)
    total, squares = 0.0, 0.0
    for _ in range(draws):
      drawn, state = compiled(params, tokens, state)
      flat = np.asarray(jax.flatten_util.ravel_pytree(drawn)[0], np.float64)
      total, squares = total + flat, squares + flat**2
    mean = total / draws
    variance = (squares / draws - mean**2) * draws / (draws - 1)
    moments[row.name] = mean, variance
    base_mean, base_variance = moments[row.base]
    squared_mean = (mean**2).sum() - variance.sum() / draws
    error = np.sqrt((variance + base_variance).sum() / draws)
    table[row.name] = {
      'FLOPs/gradient': flops / gradient_flops,
      'MB': megabytes,
      'scatter': np.sqrt(variance.sum() / squared_mean),
      'variance/whole': variance.sum() / base_variance.sum(),
      'mean, in errors': np.linalg.norm(mean - base_mean) / error,
    }
  return table


def _measure(results, save):
  results['table'] = measure(_DRAWS.value)
  save()


if __name__ == '__main__':
  _DRAWS = flags.DEFINE_integer('draws', 300, 'Number of estimates per row.')
  records.main(_measure, lambda x: records.figures('', x['table']))
