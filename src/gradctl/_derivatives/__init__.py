"""Products with Hessian, Gauss-Newton and Jacobian; per-sample gradients; what is built on them."""

from gradctl._derivatives._diagonal import hessian_diagonal
from gradctl._derivatives._jacobian import jacobian
from gradctl._derivatives._noise import NoiseScale, gradient_noise_scale
from gradctl._derivatives._operators import GGNOperator, HessianOperator, JacobianOperator
from gradctl._derivatives._penalty import gradient_penalty
from gradctl._derivatives._per_sample import PerSampleGrads, per_sample_grads
from gradctl._derivatives._per_sample_norms import per_sample_norms
from gradctl._derivatives._products import ggnvp, hvp, jvp, vjp
from gradctl._derivatives._spectrum import Sharpness, sharpness
from gradctl._derivatives._unrolled import Unrolled, unrolled

__all__ = [
    "GGNOperator",
    "HessianOperator",
    "JacobianOperator",
    "NoiseScale",
    "PerSampleGrads",
    "Sharpness",
    "Unrolled",
    "ggnvp",
    "gradient_noise_scale",
    "gradient_penalty",
    "hessian_diagonal",
    "hvp",
    "jacobian",
    "jvp",
    "per_sample_grads",
    "per_sample_norms",
    "sharpness",
    "unrolled",
    "vjp",
]
