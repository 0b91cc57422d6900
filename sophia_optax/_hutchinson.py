"""Hutchinson's estimator of the Hessian diagonal.

v     probe: independent entries with mean 0 and variance 1, shaped like θ
H v   Hessian-vector product, the derivative of the gradient in direction v
ĥ     v ⊙ H v; E[ĥ] = diag(H), because E[v_i v_j] is 1 if i = j, else 0
δ     step size of finite differences: θ ± δ v
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax import _collectives
from sophia_optax import _coordinates
from sophia_optax import _estimator
from sophia_optax import _fractions

_PROBES = {'rademacher': jax.random.rademacher, 'normal': jax.random.normal}


HutchinsonState = _estimator.EstimatorState


def _forward_over_reverse(loss, theta, probe):
  return jax.jvp(jax.grad(loss), (theta,), (probe,))[1]


def _reverse_over_reverse(loss, theta, probe):
  _, pull_back = jax.vjp(jax.grad(loss), theta)
  return pull_back(probe)[0]  # vᵀ H, and H is symmetric.


def _finite_difference(loss, theta, probe, delta):
  def move(sign):
    return jax.tree.map(
      lambda x, v: x + (sign * delta).astype(x.dtype) * v, theta, probe
    )

  def quotient(x, y, v, g):
    step = x - y  # 2 δ v after rounding.
    # A step of 0 means that the parameter is so large that δ v is rounded away.
    return (g[0] - g[1]) * jnp.where(step == 0, 0, v / step)

  # One gradient at a time: the activations of both would take more memory.
  signs = jnp.array([1.0, -1.0], delta.dtype)
  grads = jax.lax.map(lambda sign: jax.grad(loss)(move(sign)), signs)
  return jax.tree.map(quotient, move(1), move(-1), probe, grads)


_PRODUCTS: dict[str, Callable[..., Any]] = {
  'forward_over_reverse': _forward_over_reverse,
  'reverse_over_reverse': _reverse_over_reverse,
  'finite_difference': _finite_difference,
}


def hutchinson_estimator_diag_hessian(
  random_seed: Any | None = None,
  *,
  num_samples: int = 1,
  distribution: str = 'rademacher',
  hvp: str = 'forward_over_reverse',
  has_aux: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the diagonal of the Hessian with random probes.

  .. math::
    \hat h = \frac{1}{n} \sum_{i=1}^n v_i \odot \nabla^2 L(\theta)\, v_i

  with random probes v and the Hessian :math:`H = \nabla^2 L(\theta)`. The
  estimate is unbiased, except with finite differences. The variance of one
  entry with Rademacher probes is :math:`\sum_{j \neq i} H_{ij}^2 / n`. Gaussian
  probes add :math:`2 H_{ii}^2 / n`. Each probe costs one Hessian-vector
  product. Probes are used one at a time, so memory does not grow with their
  number.

  ``hvp`` selects how :math:`H v` is computed. The table gives FLOPs and
  temporary memory of one probe relative to one gradient, measured for a GPT:

  ========================  =====  ======  ==============================
  hvp                       FLOPs  memory  works where ``obj_fn`` has
  ========================  =====  ======  ==============================
  ``forward_over_reverse``  3      2.1     a gradient with a JVP
  ``reverse_over_reverse``  3      2.4     a gradient with a VJP
  ``finite_difference``     2      1.1     a gradient, as training needs
  ========================  =====  ======  ==============================

  The first two are exact. ``finite_difference`` subtracts the gradient at
  θ - δv from the gradient at θ + δv. δ is 1/32 of the geometric mean of the
  magnitudes of the nonzero parameters, or :math:`2^{-17}` of it if all are
  float64. In a small network the bias is 0.06 % of the diagonal in float32, and
  3 % with activations in bfloat16. If a parameter is so large that δ does not
  change it, its estimate is zero. Finite differences ignore
  :func:`jax.lax.stop_gradient`: compute such a value outside of ``obj_fn``, or
  choose another ``hvp``.

  ``update(grads, state, params, obj_fn=...)`` returns the estimate in place of
  the gradients. It has the structure of ``params``. Its leaves are float32 or
  wider. For a complex leaf, the real part holds the curvature of the real part
  and the imaginary part that of the imaginary part. For an integer leaf the
  estimate is zero. ``update`` accepts:

  * ``obj_fn(params)``: returns the loss, a real scalar. With ``batch=`` it is
    called as ``obj_fn(params, batch)``.
  * ``full_params``: all parameters, needed if :func:`optax.masked` or
    :func:`optax.partition` hides some.
  * ``loss_scale=s``: the estimate is divided by s. ``obj_fn`` must return s
    times the loss.

  With ``axis_name``, ``obj_fn`` returns the loss of the local shard, *not
  averaged* over replicas. Each replica draws its own probe, and the estimates
  are averaged. So D replicas divide the variance by D. The state stays equal on
  all replicas.

  Args:
    random_seed: Seed of the probes: an integer, a raw or a typed PRNG key. None
      means 0.
    num_samples: Number n of probes to average.
    distribution: Distribution of the probes: ``'rademacher'`` (entries ±1, with
      the smaller variance) or ``'normal'`` (as in the paper).
    hvp: How to multiply by the Hessian: ``'forward_over_reverse'``,
      ``'reverse_over_reverse'`` or ``'finite_difference'``.
    has_aux: Whether ``obj_fn`` returns ``(loss, aux)``. aux is ignored.
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`
      over which the parameters are replicated and the data is divided. None for
      a single device and for :func:`jax.jit` with sharded arrays. Parameters
      may be divided over another axis of a ``shard_map`` with
      ``check_vma=True``. The loss must be the same along that axis.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`HutchinsonState`.

  Raises:
    ValueError: If ``num_samples`` is less than 1 or ``distribution`` or ``hvp``
      is unknown. In ``update``, if ``params``, ``obj_fn`` or a required
      ``full_params`` is missing, or if there is no axis ``axis_name``. Also in
      ``update``, if ``shard_map`` tracks that the loss is already averaged over
      ``axis_name``, or that ``axis_name`` lacks an axis over which it differs.
    TypeError: In ``update``, if ``obj_fn`` returns a tuple without ``has_aux``,
      or if a parameter is in half precision and ``hvp`` is
      ``'finite_difference'``. JAX raises other errors if ``obj_fn`` has no
      second derivative; a note on the error says which ``hvp`` to choose. Under
      :func:`jax.jit`, JAX finds some of these cases only when it compiles the
      step.

  Example:
    >>> import jax.numpy as jnp
    >>> from sophia_optax import hutchinson_estimator_diag_hessian
    >>> params = jnp.array([1.0, 2.0])
    >>> estimator = hutchinson_estimator_diag_hessian(random_seed=0)
    >>> state = estimator.init(params)
    >>> estimate, state = estimator.update(
    ...     None, state, params, obj_fn=lambda x: jnp.sum(x**3))
    >>> print(estimate)  # The Hessian is diagonal here, so this is exact.
    [ 6. 12.]

  References:
    Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023,
    Algorithm 1
  """
  _checks.one_of('distribution', distribution, _PROBES)
  _checks.one_of('hvp', hvp, _PRODUCTS)
  sampler = _PROBES[distribution]

  def make_draw(theta, loss, tools, /, **extra_args):
    del extra_args
    multiply = _PRODUCTS[hvp]
    if hvp == 'finite_difference':
      _check_wide(theta)
      multiply = functools.partial(multiply, delta=_step(theta, axis_name))

    def draw(key):
      probe = tools.random_like(key, theta, sampler)
      try:
        product = multiply(loss, theta, probe)
      except _REFUSALS as error:
        if hvp != 'finite_difference':
          error.add_note(_KERNEL_NOTE.format(hvp=hvp, others=sorted(_PRODUCTS)))
        raise
      return optax.tree.mul(
        _coordinates.widen(probe), _coordinates.widen(product)
      )

    return draw

  return _estimator.sampled_estimator(
    make_draw,
    random_seed,
    num_samples=num_samples,
    has_aux=has_aux,
    axis_name=axis_name,
  )


# JAX raises these if a function has no derivative, and Equinox a RuntimeError,
# of which NotImplementedError is a subclass.
_REFUSALS = AssertionError, RuntimeError, TypeError, ValueError
_KERNEL_NOTE = (
  'hvp={hvp!r} needs a second derivative of obj_fn. If JAX can compute its'
  ' gradient, the second derivative is missing, as in many fused kernels. Then'
  " pass hvp='finite_difference' to the estimator, which needs only gradients,"
  ' or try another of {others}. Or use sophia_g, which needs no second'
  ' derivative.'
)


def _check_wide(theta):
  """Raises if parameters have too few bits for a small step to change them."""
  for path, x in jax.tree.leaves_with_path(theta):
    if jnp.finfo(x.dtype).bits < 32:
      raise TypeError(
        "hvp='finite_difference' needs parameters in float32 or wider, got"
        f' {x.dtype} at {jax.tree_util.keystr(path) or "the root"}, which a'
        ' small step would not change. Keep parameters in float32 and cast them'
        ' inside obj_fn, or choose another hvp.'
      )


def _step(theta, axis_name):
  """Returns δ, the same for all coordinates and devices, float32.

  δ is a fraction of the geometric mean of the magnitudes of the nonzero
  parameters. docs/mathematics.md derives it.
  """

  def log_sizes(x):
    size = jnp.abs(x)
    is_nonzero = size >= jnp.finfo(x.dtype).tiny
    logs = jnp.log(jnp.where(is_nonzero, size, 1))
    return jnp.array(
      [jnp.sum(logs, dtype=jnp.float32), jnp.sum(is_nonzero, dtype=jnp.float32)]
    )

  like = _collectives.vary(jnp.zeros([]), axis_name)
  sums = _fractions.sum_over_shards(log_sizes, like, theta)
  total, count = jnp.broadcast_to(sums, 2)  # A scalar if there are no leaves.
  is_single = any(x.dtype == jnp.float32 for x in jax.tree.leaves(theta))
  fraction = 2.0**-5 if is_single else 2.0**-17
  return fraction * jnp.exp(total / jnp.maximum(count, 1))
