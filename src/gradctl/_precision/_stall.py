"""Updates that round to nothing: a 16-bit weight does not move although its optimizer moves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLED = 4096  # elements of a tensor that are looked at, evenly spread
_STUCK = 0.5  # a weight stalls if more than this share of its moved elements did not move
_LOOKS = 3  # in so many looks in a row; a rate that is 0 in a warm-up moves nothing once


@dataclass(frozen=True, slots=True)
class Stall:
    """16-bit weights whose updates are lost.

    Args:
        parameters: their names.
        share: mean share of elements with a gradient that did not move.
        of: 16-bit weights in all.
    """

    parameters: tuple[str, ...]
    share: float
    of: int

    def __str__(self) -> str:
        shown = ", ".join(self.parameters[:3]) + (f" and {n} more" if (n := len(self.parameters) - 3) > 0 else "")
        return (
            f"in {len(self.parameters)} of {self.of} 16-bit weights {self.share:.0%} of the updates round to nothing "
            f"({shown}): a step is smaller than half of the gap between neighbouring 16-bit numbers; use "
            'gradctl.precision("bf16-master"), "bf16-kahan" or "bf16-stochastic"'
        )


class StallWatch:
    """Looks at single steps: `before()`, the step, `after()`; then `found()` says what stalls.

    A look reads up to 4096 elements of each 16-bit weight; without such weights it does nothing. Only `found` waits
    for a device.

    Args:
        named: the parameters that are stepped, by name.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        low = (torch.bfloat16, torch.float16)
        self._named = {name: p for name, p in named.items() if p.dtype in low and p.requires_grad and p.numel()}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._looks: list[tuple[list[str], Tensor]] = []

    @property
    def sees_anything(self) -> bool:
        """Whether there are 16-bit weights to look at."""
        return bool(self._named)

    def before(self) -> None:
        """Remember a sample of the weights, and which of it have a gradient."""
        self._before = {
            name: (_sample(p).clone(), _sample(p.grad) != 0)
            for name, p in self._named.items()
            if p.grad is not None and not p.grad.is_sparse
        }

    def after(self) -> None:
        """Compare with the weights after the step."""
        before, self._before = self._before, {}
        if not before:
            return
        shares = [
            torch.stack(((_sample(self._named[name]).eq(was) & moved).sum(), moved.sum())).float()
            for name, (was, moved) in before.items()
        ]
        self._looks.append((list(before), torch.stack(shares)))
        del self._looks[:-_LOOKS]

    def found(self) -> Stall | None:
        """Return what stalled in each of the last three looks, if anything did."""
        if len(self._looks) < _LOOKS:
            return None
        seen: dict[str, list[float]] = {}
        for names, numbers in self._looks:
            for name, (stuck, moved) in zip(names, numbers.tolist(), strict=True):
                seen.setdefault(name, []).append(stuck / moved if moved else 0.0)
        stalled = {n: shares for n, shares in seen.items() if len(shares) == _LOOKS and min(shares) > _STUCK}
        if not stalled:
            return None
        share = sum(sum(shares) / len(shares) for shares in stalled.values()) / len(stalled)
        return Stall(tuple(stalled), share, len(self._named))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, -(-flat.numel() // _SAMPLED))]
