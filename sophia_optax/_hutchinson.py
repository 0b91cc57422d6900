"""Hutchinson's estimator of the Hessian diagonal.

v     probe: independent entries with mean 0 and variance 1, shaped like θ
H v   Hessian-vector product, the tangent of the gradient in direction v
ĥ     v ⊙ H v, so that E[ĥ] = diag(H): E[v_i v_j] is 1 if i = j, else 0
"""

from typing import Any

import jax
import optax

from sophia_optax import _checks
from sophia_optax import _coordinates
from sophia_optax import _estimator

_PROBES = {'rademacher': jax.random.rademacher, 'normal': jax.random.normal}


HutchinsonState = _estimator.EstimatorState


def hutchinson_estimator_diag_hessian(
  random_seed: Any | None = None,
  *,
  num_samples: int = 1,
  distribution: str = 'rademacher',
  has_aux: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the diagonal of the Hessian with random probes.

  .. math::
    \hat h = \frac{1}{n} \sum_{i=1}^n v_i \odot \nabla^2 L(\theta)\, v_i

  With ``axis_name``, ``obj_fn`` returns the loss of the local shard, *not
  averaged* over replicas: each draws a probe of its own, and the estimates are
  averaged, so that D replicas divide the variance by D. What is stored stays
  equal on all.

  The estimate is unbiased. The variance of one entry with Rademacher probes is
  :math:`\sum_{j \neq i} H_{ij}^2 / n`; Gaussian probes add
  :math:`2 H_{ii}^2 / n`. Each probe costs one Hessian-vector product, about
  8/3 of a gradient; probes are taken one after another, so memory does not
  grow with their number.

  ``update(grads, state, params, obj_fn=...)`` returns the estimate in place of
  the gradients. ``obj_fn(params)`` is the loss, a real scalar; with ``batch=``
  it is called as ``obj_fn(params, batch)``. Where :func:`optax.masked` or
  :func:`optax.partition` hides parameters, ``full_params=`` has them all for
  ``obj_fn``. With ``loss_scale=s``, ``obj_fn`` returns s times the loss, and
  the estimate is divided by s. The estimate has the structure of ``params``.
  Its leaves are float32 or wider; that of a complex leaf holds the curvature of
  the real part in its real part and that of the imaginary part in its imaginary
  part; that of an integer leaf is zero.

  Args:
    random_seed: Seed of the probes: an integer, a raw or a typed PRNG key. None
      means 0.
    num_samples: Number n of probes to average.
    distribution: ``'rademacher'`` (entries ±1, the smaller variance) or
      ``'normal'`` (the paper's).
    has_aux: Whether ``obj_fn`` returns ``(loss, aux)``. What is in aux is not
      used.
    axis_name: Mapped axis or axes of :func:`jax.pmap` or :func:`jax.shard_map`
      over which the parameters are replicated and the data is not. None for a
      single device and for :func:`jax.jit` with sharded arrays. Parameters may
      be divided over another axis of a ``shard_map`` with ``check_vma=True``;
      the loss has to be the same along that one.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` with a
    :class:`HutchinsonState`.

  Raises:
    ValueError: If ``num_samples`` is less than 1 or ``distribution`` is
      unknown; in ``update``, if ``params`` or ``obj_fn`` is missing, or
      ``full_params`` where parameters are hidden; if there is no axis
      ``axis_name``; or, where ``shard_map`` shows that, if ``obj_fn`` averaged
      over it already, or differs along an axis of replicas that it leaves out.
    TypeError: In ``update``, if ``obj_fn`` can't be called with these arguments
      or returns something else than a real scalar.

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
  sampler = _PROBES[distribution]

  def make_draw(theta, loss, *, random_like, **extra_args):
    del extra_args

    def draw(key):
      probe = random_like(key, theta, sampler)
      _, hvp = jax.jvp(jax.grad(loss), (theta,), (probe,))
      return optax.tree.mul(_coordinates.widen(probe), _coordinates.widen(hvp))

    return draw

  return _estimator.sampled_estimator(
    make_draw,
    random_seed,
    num_samples=num_samples,
    has_aux=has_aux,
    axis_name=axis_name,
  )
