"""Products with Hessian, Gauss-Newton and Jacobian; per-sample gradients; what is built on them."""

from gradctl._derivatives._diagonal import hessian_diagonal
from gradctl._derivatives._jacobian import jacobian
from gradctl._derivatives._operators import GGNOperator, HessianOperator, JacobianOperator
from gradctl._derivatives._products import ggnvp, hvp, jvp, vjp
from gradctl._derivatives._spectrum import Sharpness, sharpness

__all__ = [
    "GGNOperator",
    "HessianOperator",
    "JacobianOperator",
    "Sharpness",
    "ggnvp",
    "hessian_diagonal",
    "hvp",
    "jacobian",
    "jvp",
    "sharpness",
    "vjp",
]
