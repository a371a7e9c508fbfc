"""Which sample a row of an intermediate gradient belongs to.

Rows are samples, or positions of samples in either order, or anything: the shape does not tell [B * T] from [T * B].
The gradient does. It is linear in the gradient of the outputs, so weighting sample b there by a factor of its own
shows that factor in every row that belongs to it, and a mixture in every row that belongs to several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Digits have at most this many values: their steps stay far above rounding, also in rows that are small.
_BASE = 32
# Shares of the largest row, squared. Rows below the first are too weak to tell whose they are; what is left of a row
# below the second when its factor is taken out is rounding.
_WEAK = 1e-8
_ROUNDING = 1e-11
# What is left of a row, as a share of it, squared, when it is a mixture of samples.
_MIXED = 1e-5


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows [R, ...] become [B, K, ...].

    Args:
        order: "rows" (R is B), "samples first" ([B * K]), "samples last" ([K * B]), "listed", or "unseen": every row
            was zero.
        size: number of samples.
        places: "listed": the rows of each sample, [B, K]; places without a row hold R.
    """

    order: Literal["rows", "samples first", "samples last", "listed", "unseen"]
    size: int
    places: Tensor | None = None

    def apply(self, rows: Tensor) -> Tensor:
        """Return the rows by sample, [B, K, ...]."""
        if self.order == "rows":
            return rows.unsqueeze(1)
        if self.order == "samples first":
            return rows.reshape(self.size, -1, *rows.shape[1:])
        if self.order == "samples last":
            return rows.reshape(-1, self.size, *rows.shape[1:]).transpose(0, 1)
        assert self.places is not None
        more = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return more[self.places]


@dataclass(frozen=True, slots=True)
class Digits:
    """The digits of the samples' numbers, each written as a factor from 1 to 2.

    Args:
        base: number of values of a digit.
        factors: [B] for each digit, the lowest first.
    """

    base: int
    factors: list[Tensor]


def digits(size: int, dtype: torch.dtype) -> Digits:
    """Factors that tell `size` samples apart in `dtype`; in half precision binary ones: 1 and 2 are exact there."""
    base = max(2, min(size, _BASE)) if dtype in (torch.float32, torch.float64) else 2
    number = torch.arange(size)
    found: list[Tensor] = []
    while not found or bool(number.any()):
        found.append(1 + (number % base).double() / (base - 1))
        number = number // base
    return Digits(base, found)


def find_layout(plain: Tensor, weighted: list[Tensor], size: int, base: int) -> Layout | None:
    """Find the layout of rows; None when a row belongs to several samples.

    Rows that are zero follow the order of the others.

    Args:
        plain: rows [R, F] of a gradient.
        weighted: the same rows for each digit, the samples weighted by it.
        size: number of samples.
        base: of the digits.
    """
    count = plain.shape[0]
    a = plain.double()
    power = a.square().sum(1)
    largest = power.max()
    alive = power > _WEAK * largest
    owner = torch.zeros(count, dtype=torch.long, device=plain.device)
    place = 1
    for one in weighted:
        b = one.double()
        ratio = (a * b).sum(1) / power.clamp(min=1e-300)
        left = (b - ratio[:, None] * a).square().sum(1)
        exact = (ratio - 1) * (base - 1)
        digit = exact.round()
        mixed = (left > _MIXED * power) & (left > _ROUNDING * largest)
        if bool((alive & (mixed | ((exact - digit).abs() > 0.25))).any()):
            return None
        owner = owner + digit.long() * place
        place *= base
    if bool((alive & ((owner < 0) | (owner >= size))).any()):
        return None
    owner = torch.where(alive, owner, torch.full_like(owner, -1))

    rows = torch.arange(count, device=owner.device)
    if count % size == 0:
        each = count // size

        def fits(expected: Tensor) -> bool:
            return bool((~alive | (owner == expected)).all())

        if fits(rows // each):
            return Layout("rows" if each == 1 else "samples first", size)
        if fits(rows % size):
            return Layout("samples last", size)
    if bool((~alive & (power > 0)).any()):
        return None  # in no order, and too weak to tell
    most = int(torch.bincount(owner[alive], minlength=size).max())
    places = torch.full((size, most), count, device=owner.device)
    for index in range(size):
        mine = rows[owner == index]
        places[index, : len(mine)] = mine
    return Layout("listed", size, places)
