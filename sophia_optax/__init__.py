"""Sophia, a stochastic second-order optimizer, as optax transformations."""

import contextlib

from sophia_optax import likelihoods as likelihoods
from sophia_optax._alias import sophia as sophia
from sophia_optax._alias import sophia_g as sophia_g
from sophia_optax._alias import sophiaw as sophiaw
from sophia_optax._averages import (
  average_over_replicas as average_over_replicas,
)
from sophia_optax._diagnose import diagnose as diagnose
from sophia_optax._diagnose import ModuleDiagnosis as ModuleDiagnosis
from sophia_optax._eigenbasis import EigenbasisState as EigenbasisState
from sophia_optax._eigenbasis import in_eigenbasis as in_eigenbasis
from sophia_optax._estimator import EstimatorState as EstimatorState
from sophia_optax._estimator import sampled_estimator as sampled_estimator
from sophia_optax._gauss_newton_bartlett import (
  gauss_newton_bartlett_estimator_diag_hessian as gauss_newton_bartlett_estimator_diag_hessian,  # noqa: E501
)
from sophia_optax._gauss_newton_bartlett import (
  GaussNewtonBartlettState as GaussNewtonBartlettState,
)
from sophia_optax._hutchinson import (
  hutchinson_estimator_diag_hessian as hutchinson_estimator_diag_hessian,
)
from sophia_optax._hutchinson import HutchinsonState as HutchinsonState
from sophia_optax._microbatched import microbatched as microbatched
from sophia_optax._multi_steps import MultiSteps as MultiSteps
from sophia_optax._sophia import scale_by_sophia as scale_by_sophia
from sophia_optax._sophia import SophiaState as SophiaState
from sophia_optax._squared_gradient import (
  squared_gradient_estimator_diag_hessian as squared_gradient_estimator_diag_hessian,  # noqa: E501
)

__version__ = '0.2.0.dev0'

with contextlib.suppress(ImportError):  # Flax is optional.
  from sophia_optax.flax import SophiaTrainState as SophiaTrainState
