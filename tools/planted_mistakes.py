"""Plants mistakes in the package, one at a time, and runs tests on each.

    python tools/planted_mistakes.py                  plants all of them
    python tools/planted_mistakes.py --only=psum      those with it in the name

A user could notice each mistake, so a test must fail. If a mistake survives,
the tests are too weak. Only fast tests run, in the files that the list names.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from absl import app
from absl import flags

ONLY = flags.DEFINE_string('only', '', 'Plants only mistakes with this name.')
ROOT = pathlib.Path(__file__).resolve().parents[1]

# 'module, test files': {mistake: 'source «right→wrong» source'}. The source
# with the right part occurs once in the module.
# fmt: off
MISTAKES = {
  '_rule sophia': {
    'm is averaged twice':
    'ema(self.b1, g, «m→ema(self.b1, g, m)»), grads, mu)',
    'bias correction of t + 1': 'decay, «count→(count + 1)».astype',
    'the magnitude of h': '_cast(gamma, h) * «h→jnp.abs(h)»',
    'ε is added': 'jnp.«maximum→add»(_cast(gamma, h)',
    'h is clamped before the EMA': 'ema(self.b2, «e→jnp.maximum(e, 0)»,',
    'Nesterov corrects m with t':
    'ahead = corrected(state.mu, '
    '«optax.safe_increment(state.count)→state.count»)',
    'h is corrected for steps': 'jnp.maximum(state.«refresh_count→count»',
    'γ is a step ahead': 'self.gamma(state.«count - 1→count»)',
    'a coordinate at the threshold wins': 'jnp.abs(ratio) <«→=» _cast',
    'the limit of Adam lacks the root': '«jnp.sqrt(positive(v))→positive(v)»',
  },
  '_rule win_rate vmap low_precision': {
    'γ seems to affect |m| < c ε': '(h > 0)« & (jnp.abs(m) >= floor)→»',
    'the derivative of the root of 0':
    'positive = lambda v: «jnp.maximum(v, jnp.finfo(v.dtype).tiny)→v»',
    'h is averaged in its storage dtype': 'e, «_coordinates.widen(h)→h»)',
  },
  '_refresh reliability': {
    'NaN enters h': '«jnp.isfinite→~jnp.isinf»(new), new, h',
    'infinity enters h': '«jnp.isfinite→~jnp.isnan»(new), new, h',
    'nonfinite_count counts arrays': '«(nonfinite > 0)→nonfinite».astype',
  },
  '_refresh vmap': {
    'without jit, each print is compiled':
    'condition = «known(condition)→condition»\n  if',
    'vmap waits for all members': 'jnp.«any→all»(conditions)',
    'two vmaps compute every step':
    'return «_any_condition(jnp.any(conditions))→jnp.any(conditions)», False',
    'vmap refreshes all members':
    '«conditions→jnp.ones_like(conditions)», True',
  },
  '_refresh refresh conformance sophia multi_steps': {
    'refresh on every step': 'whole(interval) «=→>»= 0',
    'the estimate must fit its dtype': '«e if e.dtype == new.dtype else new→e»',
    'refresh is ignored': 'if «refresh is None→True»:',
    'False is ignored': 'return «not is_excluded and→»',
    'may_refresh is ignored': 'map(known, (refresh, «may→True»))',
  },
  '_sophia sophia': {
    "the estimator's state is lost":
    'hessian_fn_state=«estimator_state→old.hessian_fn_state»',
    "the paper's order by default": 'refresh_before_update else «old→new»\n',
    'updates have the wrong dtype': 'join(«updates→params», rule.update',
    'the win rate is that of new h': 'measure(rule, «used→new», grads)',
  },
  '_sophia win_rate estimator low_precision errors replicas refresh': {
    'γ is found for stale h': 'steer(rule, «new→old», grads',
    'a scaled estimate passes': "if «'loss_scale' in extra_args→False»:",
    'the gradient is unscaled in half precision':
    'grads = «_coordinates.widen(→(»_coordinates.split(params, updates))',
    'any options fit the state': 'found = «getattr(state, field)→value»',
    'replicas may differ': '«_checks.averaged(estimate, state.nu)→pass»',
    'the estimator gets m': 'inputs = «updates→old.mu», params',
  },
  '_win_rate win_rate sophia': {
    'coordinates with g = 0 count': '«(g != 0) & jnp→jnp»',
    'others win although they lose': 'target «+→-» missing / number',
    'γ moves without affected coordinates': 'affected >«→=» 0, step',
  },
  '_estimator conformance replicas estimator sophia_g': {
    'the key does not advance': '«state._replace(key=key)→state»',
    'parameters are not varying':
    '«_collectives.vary(_coordinates.split(params, params), '
    'axis_name)→_coordinates.split(params, params)»',
    'the key of a replica is stored': 'num_samples, zeros), «key→subkey»',
    'replicas draw the same': '«_collectives.names(axis_name)→()»',
    'loss_scale is applied twice':
    '_coordinates.unscale(«mean→_coordinates.unscale(mean, loss_scale)», '
    'loss_scale)',
    'the key of the user is donated': '«jnp.copy(seed)→seed»',
    'value_fn is not used': "fn = «extra_args.get('value_fn')→None»",
  },
  '_hutchinson hvp conformance': {
    'always the same probe':
    "'rademacher': «jax.random.rademacher→lambda k, s, d: -jnp.ones(s, d)»",
    'the step before rounding':
    'step = «x - y→(2 * delta).astype(x.dtype) * v»',
    'a step of 0 divides': '«jnp.where(step == 0, 0, v / step)→v / step»',
  },
  '_gauss_newton_bartlett gauss_newton_bartlett conformance output_chunks': {
    'B is left out': '«jnp.sqrt(count)→count»',
    'padding stays NaN':
    '«jnp.where(mask, scores, 0)→scores * mask.astype(wide)»',
    'no predictions divide by 0': '«jnp.maximum(count, 1)→count»',
    'shards draw the same labels': 'fold_in_index(key, «axes→()»)',
  },
  '_outputs output_chunks': {
    'chunks of the mask are contiguous':
    '«_averages.cut(mask, num_chunks, axis)→jnp.stack(jnp.split(mask, '
    'num_chunks, axis))»',
  },
  'likelihoods gauss_newton_bartlett': {
    'an impossible class is drawn': 'cumulated >«→=» threshold',
  },
  '_microbatched sophiaw': {
    'every example is taken': 'x[:, ::«stride→1»]',
    'the examples are contiguous':
    'x[:, «::stride→: -(-x.shape[1] // stride)»]',
    'without batch the mask is lost': 'if «label_mask is not None→False»:',
  },
  '_microbatched estimator': {
    'parts of parts are not split': 'mask)\n    «→  »microbatches = _averages',
  },
  '_averages microbatched': {
    'parts share a state': 'new, «state→_» = estimate',
    'masked parts have equal weights': 'jnp.sum(«mask→mask | ~mask», axis=1',
    'parts are contiguous':
    '«jnp.moveaxis(x.reshape(shape), axis + 1, 0)→jnp.stack(jnp.split(x, '
    'num_parts, axis))»',
  },
  '_averages replicas': {
    'a sum over replicas passes': 'if «tracked→False» and',
  },
  '_collectives conformance divided_parameters low_precision': {
    'pmean becomes psum': 'lax.«pmean→psum»(',
    'shards of an array draw the same': '«other_axes(x, axis_name)→()»)',
    'draws in half precision':
    'wide = «_coordinates.wider(x.dtype, jnp.float32)→x.dtype»',
  },
  '_fractions divided_parameters diagnose': {
    'the size of one shard': '« * _collectives.total(1, _axes(like, x))→»',
    'counts are in int32': 'jnp.«uint32→int32»)',
  },
  '_coordinates sophia estimator': {
    'h in the dtype of the parameter': 'dtype or «wider(own, jnp.float32)→own»',
    'float64 is narrowed': 'astype(«wider(x.dtype, jnp.float32)→jnp.float32»)',
    'full_params replaces all': '«f if is_hole(x) else x→f»',
  },
  '_alias sophia sophiaw sophia_g': {
    'sophia forgets eps': 'b2=b2,\n    eps=«eps→1e-8»',
    'integers decay': 'mask is None:\n    return «is_differentiable→True»',
    'b2 is that of h': 'b1=b1,\n    b2=«0.95→b2»',
    'γ of the other curvature': "'gamma': «0.1→0.05»",
    'sophia_g has the ε of sophia': 'eps=1e-«15→8»',
    'maximize lowers obj_fn':
    "for name in («'obj_fn', 'value_fn'→'value_fn',»)",
  },
  '_eigenbasis eigenbasis': {
    'momentum stays in the old basis': 'list(map(«move→lambda x: x», moments))',
    'the basis is that of this gradient':
    '_apply(_next_bases, layouts, «factors→_apply(functools.partial('
    '_next_factors, decay), layouts, updates, factors)», bases)',
    'rows and columns are exchanged':
    'lambda g: _matmul(«g, g.mT→g.mT, g»)), (',
    'NaN enters the factors': 'return «_if_finite(→(lambda x, _: x)(»weight',
    'functions get rotated parameters':
    'fn(\n        «rotate_back(params)→params», *args',
    'the gradient of a line search is not rotated': "'full_params'«, 'grad'→,»",
    'the first 20 steps are as any': '(state.count < «_FIRST_STEPS→0»)',
    'refresh is ignored': "extra_args.get('refresh«→ »')",
    'may_refresh is ignored': "extra_args.get('may_refresh«→ »', True)",
  },
  '_matrices matrices': {
    'embeddings are rotated': "'«embed|→»position",
    'attention is left alone': '«(^|_)head(_\\d+)?$→head»',
    'long sides are rotated whole': 'min(«*sides→10**9», block_size)',
    'a side without a divisor is cut': 'if ratio(nearest) <= «2→99» else',
    'a vector is a matrix': 'if «min(sides) == 1→False»:',
  },
  '_multi_steps multi_steps': {
    'the first micro-step refreshes': 'mini_step == «n - 1→0»',
  },
  '_diagnose diagnose': {
    'm is not looked at': '«jnp.isfinite(m) & →»',
  },
  'flax train_state': {
    'tx keeps the arguments of a step': "«({'tx': self.tx} | fields)→fields»",
  },
}
# fmt: on


def run_tests(package, names):
  """Runs tests with the package in a folder; returns the first that fails."""
  environment = os.environ | {
    'COLUMNS': '160',  # Of the line about a failure.
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
    'PYTHONPATH': str(package),
    'PYTHONSAFEPATH': '1',  # Otherwise the package here would come first.
  }
  command = [sys.executable, '-m', 'pytest', '-qx', '--tb=no', '-m', 'not slow']
  result = subprocess.run(
    [*command, *(f'tests/{name}_test.py' for name in names)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  if result.returncode == 0:
    return None
  failed = re.search(r'^(?:FAILED|ERROR) (.+)', result.stdout, re.MULTILINE)
  if result.returncode != 1 or not failed:
    raise RuntimeError(result.stdout + result.stderr)
  return failed[1]


def plant(module, edit, names):
  """Returns the failure that a mistake causes, or None."""
  right, wrong = (
    re.sub('«(.*)→(.*)»', part, edit, flags=re.DOTALL)
    for part in (r'\1', r'\2')
  )
  with tempfile.TemporaryDirectory() as folder:
    package = pathlib.Path(folder, 'sophia_optax')
    shutil.copytree(ROOT / 'sophia_optax', package)
    path, imported = package / f'{module}.py', package / 'imported'
    source = path.read_text()
    if source.count(right) != 1:
      raise ValueError(f'{path.name} has {source.count(right)} times: {right}')
    source = source.replace(right, wrong)
    path.write_text(f'{source}\nopen({str(imported)!r}, "w").close()\n')
    failure = run_tests(folder, names)
    if not imported.exists():
      raise RuntimeError(f'The tests did not import {path}.')
  return failure


def main(argv):
  """Prints which mistakes survive."""
  del argv
  chosen = [
    (name, edit, *key.split())
    for key, mistakes in MISTAKES.items()
    for name, edit in mistakes.items()
    if ONLY.value in name
  ]
  files = {name for _, _, _, *names in chosen for name in names}
  if failure := run_tests(ROOT, sorted(files)):
    sys.exit(f'Without any mistake, a test fails: {failure}')
  survivors = 0
  for mistake, edit, module, *names in chosen:
    failure = plant(module, edit, names)
    survivors += failure is None
    verdict = 'SURVIVED' if failure is None else 'killed  '
    print(f'{verdict} {module}: {mistake}: {failure or names}', flush=True)
  print(f'{len(chosen) - survivors} killed, {survivors} survived')
  sys.exit(survivors > 0)


if __name__ == '__main__':
  app.run(main)
