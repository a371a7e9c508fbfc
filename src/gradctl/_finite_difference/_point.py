"""A function of named tensors at one point: its outputs, its gradients, and how it changes along directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl._finite_difference._state import RandomStates

_LEAST_OUTPUT = 1e-3
# What directions are made of: 128 sizes between 0.5 and 1.5, of either sign.
_NUMBERS = torch.cat([sizes := (torch.arange(128, dtype=torch.float64) + 0.5) / 128 + 0.5, -sizes])


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Subject:
    """What is differentiated.

    Args:
        run: takes one leaf for each value, runs the function under autograd, returns its floating outputs.
        names: of the values.
        values: the point, each detached, of a floating or complex dtype.
        reset: puts back what a run may have changed besides random states: buffers, attributes.
        every_output: outputs without a graph count too, as constant; otherwise they are left out.
        still: masks for elements that are not moved (0) because they have no gradient by design, by index of the value.
        hooks: how many hooks a value's gradient passes, by index.
        generators: generators of its own that the function draws from.
    """

    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    reset: Callable[[], None] = _nothing
    every_output: bool = False
    still: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    hooks: Mapping[int, int] = field(default_factory=dict[int, int])
    generators: tuple[torch.Generator, ...] = ()


class Point:
    """The function of a subject at one point. Random states are those of the first call, for every call.

    Args:
        subject: what is differentiated.
        states: taken before the first call.
        seed: of directions and cotangents.
        values: the point, if another than the subject's.
    """

    def __init__(
        self, subject: Subject, states: RandomStates, seed: int, values: Sequence[Tensor] | None = None
    ) -> None:
        self.subject = subject
        self.values = tuple(values if values is not None else subject.values)
        self.num_forwards = 0
        self.num_backwards = 0
        self._states = states
        self._seed = seed
        self._leaves: list[Parameter] = []
        self._outputs: list[Tensor] = []
        # Those of one probe only: a direction is as large as the parameters.
        self._drawn: tuple[int, list[Tensor], dict[int, Tensor]] = (-1, [], {})
        outputs = self._forward(self.values)
        chosen = [i for i, out in enumerate(outputs) if out.requires_grad]
        # When no output has a graph the function is cut everywhere, which finite differences shall see.
        self.chosen = list(range(len(outputs))) if subject.every_output or not chosen else chosen
        self._outputs = [outputs[i] for i in self.chosen]
        self.outputs = [out.detach() for out in self._outputs]
        self.scales = [_scale(value) for value in self.values]

    @property
    def finite(self) -> bool:
        """Whether every output is finite."""
        return all(bool(torch.isfinite(out).all()) for out in self.outputs)

    def _forward(self, values: Sequence[Tensor]) -> list[Tensor]:
        self._states.restore()
        self.subject.reset()
        self.num_forwards += 1
        with torch.enable_grad():
            # A copy: a function that changes its parameters (max_norm of an embedding) changes the copy.
            own = zip(values, self.values, strict=True)
            self._leaves = [Parameter(value.clone() if value is kept else value) for value, kept in own]
            return list(self.subject.run(self._leaves))

    def forward_repeat(self) -> float:
        """Run once more at the point; return the relative difference of the outputs, 0.0 when equal bit by bit."""
        again = self._forward(self.values)
        self.release()
        return max((difference(self.outputs[k], again[i].detach()) for k, i in enumerate(self.chosen)), default=0.0)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def cotangents(self, probe: int) -> list[Tensor]:
        """Draw what the outputs are multiplied with; one number alone is taken as it is."""
        if self._drawn[0] != probe:
            self._drawn = (probe, self._cotangents(probe), {})
        return self._drawn[1]

    def _cotangents(self, probe: int) -> list[Tensor]:
        if len(self.outputs) == 1 and self.outputs[0].numel() == 1 and not self.outputs[0].is_complex():
            return [torch.ones_like(self.outputs[0])]
        # Outputs count alike, whatever their size; but one that is nothing beside the others is rounding, and stays so.
        scales = [_scale(out) for out in self.outputs]
        least = _LEAST_OUTPUT * max(scales)
        return [self._draw(out, probe, -1 - k) / max(scales[k], least) for k, out in enumerate(self.outputs)]

    def gradients(self, probe: int) -> list[Tensor | None]:
        """Return the gradient for each value, or None where autograd knows of none."""
        if not self._outputs:
            outputs = self._forward(self.values)
            self._outputs = [outputs[i] for i in self.chosen]
        pairs = [(o, u) for o, u in zip(self._outputs, self.cotangents(probe), strict=True) if o.requires_grad]
        if not pairs:
            return [None] * len(self.values)
        self.num_backwards += 1
        found: Any = torch.autograd.grad(
            [out for out, _ in pairs],
            self._leaves,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [None if g is None else (g.to_dense() if g.layout != torch.strided else g).detach() for g in found]

    def same_graph_again(self, probe: int) -> list[Tensor | None]:
        """Take the same gradients from the same graph, without putting random states back.

        A backward that frees what it saved by itself cannot run twice: then the function is run again.
        """
        try:
            return self.gradients(probe)
        except Exception:
            self.release()
            return self.gradients(probe)

    def release(self) -> None:
        """Let go of the graph."""
        self._outputs, self._leaves = [], []

    # -- differences --------------------------------------------------------------------------------------------------

    def direction(self, probe: int, index: int) -> Tensor:
        """Draw the direction of one value: no element near zero, the scale that of the value."""
        self.cotangents(probe)
        directions = self._drawn[2]
        if index not in directions:
            drawn = self._draw(self.values[index], probe, index).mul_(self.scales[index])
            still = self.subject.still.get(index)
            directions[index] = drawn if still is None else drawn.mul_(still)
        return directions[index]

    def change(self, probe: int, moves: Mapping[int, Tensor], step: float) -> float:
        """Return how far the outputs, times their cotangents, move when the values move by `step` times `moves`."""
        values = [torch.add(v, moves[i], alpha=step) if i in moves else v for i, v in enumerate(self.values)]
        self.release()
        try:
            outputs = self._forward(values)
        except (ValueError, RuntimeError, ArithmeticError):
            return math.nan  # outside of where the function is defined: a linear algebra error, a check of a range
        finally:
            self._leaves = []
        parts = zip(self.chosen, self.outputs, self.cotangents(probe), strict=True)
        return float(sum(dot(u, outputs[i].detach() - out) for i, out, u in parts))

    def beside(self, number: int, step: float) -> list[Tensor]:
        """Draw values beside these ones, each element moved by another amount: what was tied is tied no more."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number * 7919 + 1) % (1 << 62))
        moved: list[Tensor] = []
        for value, scale in zip(self.values, self.scales, strict=True):
            parts = _real(value)
            drawn = torch.rand(parts.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(step * scale)
            parts = parts + drawn.to(device=parts.device, dtype=parts.dtype)
            moved.append(torch.view_as_complex(parts) if value.is_complex() else parts)
        return moved

    def _draw(self, like: Tensor, probe: int, index: int) -> Tensor:
        """Draw numbers of either sign between 0.5 and 1.5: a wrong element cannot hide behind a small one."""
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + probe * 10_007 + index * 101 + 12345) % (1 << 62)
        )
        numel = like.numel() * (2 if like.is_complex() else 1)
        # Eight numbers from each draw of 64 bits.
        bits = torch.randint(-(1 << 63), (1 << 63) - 1, ((numel + 7) // 8,), generator=generator)
        drawn = _NUMBERS.index_select(0, bits.view(torch.uint8)[:numel].int())
        if like.is_complex():
            drawn = torch.view_as_complex(drawn.view(-1, 2))
        return drawn.view(like.shape).to(device=like.device, dtype=like.dtype)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors as vectors of real numbers, shape [], float64 on the CPU."""
    a, b = _real(a).reshape(-1), _real(b).reshape(-1)
    if a.dtype != torch.float64:
        return (a * b).sum(dtype=torch.float64).cpu()
    return torch.dot(a, b).cpu()


def size(a: Tensor, b: Tensor) -> Tensor:
    """Return the norm of the elementwise product, shape []: the size of `dot` for a direction of random signs."""
    return torch.linalg.vector_norm(_real(a) * _real(b), dtype=torch.float64).cpu()


def difference(a: Tensor, b: Tensor) -> float:
    """Return the relative difference of two tensors, 0.0 when they are equal bit by bit (NaN equals NaN)."""
    if a.shape != b.shape:
        return math.inf
    a, b = _real(a), _real(b)
    if torch.equal(a, b):
        return 0.0
    if bool(((a == b) | (a.isnan() & b.isnan())).all()):
        return 0.0
    off, whole = float((a - b).norm()), float(a.norm())
    return off / whole if whole > 0 and math.isfinite(off) else math.inf


def _real(a: Tensor) -> Tensor:
    return torch.view_as_real(a.resolve_conj()) if a.is_complex() else a


def _scale(a: Tensor) -> float:
    """Return the root mean square; 1.0 for a tensor of zeros, and for one without elements."""
    if a.numel() == 0:
        return 1.0
    found = float(torch.linalg.vector_norm(_real(a))) / math.sqrt(a.numel())
    return found if found > 0 and math.isfinite(found) else 1.0
