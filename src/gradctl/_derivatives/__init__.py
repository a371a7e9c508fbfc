"""Products with Hessian, Gauss-Newton and Jacobian; per-sample gradients; what is built on them."""

from gradctl._derivatives._operators import GGNOperator, HessianOperator, JacobianOperator
from gradctl._derivatives._products import ggnvp, hvp, jvp, vjp

__all__ = [
    "GGNOperator",
    "HessianOperator",
    "JacobianOperator",
    "ggnvp",
    "hvp",
    "jvp",
    "vjp",
]
