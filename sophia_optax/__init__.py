"""Sophia, a stochastic second-order optimizer, in optax's own form."""

from sophia_optax._alias import sophia as sophia
from sophia_optax._hutchinson import (
    hutchinson_estimator_diag_hessian as hutchinson_estimator_diag_hessian,
)
from sophia_optax._hutchinson import HutchinsonState as HutchinsonState
from sophia_optax._sophia import scale_by_sophia as scale_by_sophia
from sophia_optax._sophia import SophiaState as SophiaState

__version__ = '0.1.0.dev0'
