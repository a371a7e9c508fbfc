"""The largest eigenvalue of a Hessian, by Lanczos, with a bar that is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl._derivatives._operators import HessianOperator, Loss
from gradctl._derivatives._variables import Wanted
from gradctl._errors import NonFiniteGradient, UsageError


@dataclass(frozen=True, slots=True)
class Sharpness:
    """What Lanczos found.

    Attributes:
        value: the largest eigenvalue as far as found; never above the largest of the Hessian, up to rounding.
        residual: an eigenvalue of the Hessian lies within `value - residual` and `value + residual`.
        num_products: Hessian-vector products that were spent.
        smallest: the smallest eigenvalue as far as found; never below the smallest of the Hessian, up to rounding.
    """

    value: float
    residual: float
    num_products: int
    smallest: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.residual:.2g} after {self.num_products} products"


def sharpness(loss: Loss, params: Wanted, *, rtol: float = 1e-2, max_products: int = 100, seed: int = 0) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of a loss, with an error bar.

    It is that of the batch that the loss is computed on: batches of 128 spread by a seventh around the whole data set.
    Gradient descent without momentum is stable where lr < 2 / value; values of lr * value / 2 from 1.0 to 1.2 are
    usual in training and no fault (the edge of stability).

    Args:
        loss: as for `hvp`; a function is run once.
        params: as for `hvp`.
        rtol: stop when the bar is below this share of the value.
        max_products: stop after so many products; the bar then says how far it came.
        seed: of the vector that it starts from; the program's random state is left alone.
    Returns:
        The value with its bar; the order of the eigenvalues is certain only for what the start vector sees.
    Raises:
        NoSecondDerivative: an operation of the graph has no derivative of its backward.
        NonFiniteGradient: a product is NaN or inf.
        UsageError: `rtol` or `max_products` is not positive, or the loss does not depend on the parameters.
    Source: Lanczos 1950 with full reorthogonalisation; the bar is the norm of the residual, Parlett 1980, section 4.5.
    """
    if not rtol > 0 or max_products < 1:
        raise UsageError(
            f"rtol is {rtol}, max_products {max_products}", what="both are positive", fix="the defaults are 1e-2, 100"
        )
    operator = HessianOperator(loss, params)
    size = operator.shape[0]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    of = operator._columns
    dtype = of.dtype if of.dtype == torch.float64 else torch.float32
    q = (start / start.norm()).to(of.device, dtype)
    basis = torch.empty(min(size, max_products), size, dtype=dtype, device=of.device)
    alphas: list[float] = []
    betas: list[float] = []
    found = Sharpness(math.nan, math.inf, 0, math.nan)
    for step in range(min(size, max_products)):
        basis[step] = q
        w = of.flat(operator._forth(of.split(q.to(of.dtype)))).to(dtype)
        alpha = float(w @ q)
        if not math.isfinite(alpha):
            raise NonFiniteGradient(
                "a Hessian-vector product is not finite",
                what=f"product {step + 1} of the {type(operator).__name__}",
                fix="look for the NaN or inf in the loss and its gradient first",
            )
        alphas.append(alpha)
        w, beta = _orthogonal(w, basis[: step + 1])
        found = _ritz(alphas, betas, beta, torch.finfo(of.dtype).eps)
        betas.append(beta)
        # A space that is closed under the Hessian ends the search: nothing outside of it is ever seen.
        if beta <= 10 * torch.finfo(of.dtype).eps * max(map(abs, alphas)) or found.residual <= rtol * abs(found.value):
            break
        q = w / beta
    return found


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Take from `w` what it has of the basis, twice, so that rounding leaves nothing; return it and its norm."""
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w, float(w.norm())


def _ritz(alphas: list[float], betas: list[float], beta: float, eps: float) -> Sharpness:
    size = len(alphas)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if size > 1:
        off = torch.tensor(betas[: size - 1], dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    rounding = eps * float(values.abs().max()) * math.sqrt(size)
    return Sharpness(float(values[-1]), beta * abs(float(vectors[-1, -1])) + rounding, size, float(values[0]))
