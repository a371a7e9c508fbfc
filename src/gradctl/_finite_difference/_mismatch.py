"""What a comparison of gradients with finite differences measured: facts, without a judgement."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor whose gradient is not the derivative.

    Args:
        name: the argument or the parameter.
        shape: of the tensor.
        analytic: what the gradient says the function changes along the direction that was tried.
        numeric: what finite differences say.
        error: how far `numeric` may be off, from the differences between steps and from rounding.
        size: the expected size of `analytic` for a random direction: the norm of gradient times direction.
        is_none: autograd gave None: the function did not use the tensor in a way that autograd saw.
        nonfinite: how many elements of the gradient are NaN or infinite.
        factor: the derivative is this times the gradient, along every direction tried; None otherwise.
        transposed: the derivative is the transposed gradient.
        swapped_with: the derivative is the gradient that this other tensor got.
        conjugate: the derivative is the conjugate of the gradient.
        elements: the only elements that are wrong, by index; empty when they are too many to be listed.
        constant: the outputs do not move at all along the direction (round, sign, argmax).
        rounded_to: the backward computed in this dtype, and the difference is of the size of its rounding.
        repeat: relative difference between two backwards of the same graph; 0.0 when they are equal bit by bit.
        hooks: how many hooks of the parameter may have changed its gradient.
    """

    name: str
    shape: tuple[int, ...]
    analytic: float
    numeric: float
    error: float
    size: float
    is_none: bool = False
    nonfinite: int = 0
    factor: float | None = None
    transposed: bool = False
    swapped_with: str | None = None
    conjugate: bool = False
    elements: tuple[tuple[int, ...], ...] = ()
    constant: bool = False
    rounded_to: str | None = None
    repeat: float = 0.0
    hooks: int = 0

    @property
    def relative(self) -> float:
        """By how much the gradient is off, as a share of the larger of its size and the derivative."""
        return abs(self.analytic - self.numeric) / max(self.size, abs(self.numeric), 1e-300)

    def __str__(self) -> str:
        if self.nonfinite:
            return f"the gradient of {self.name} has {self.nonfinite} NaN or infinite elements"
        if self.repeat:
            return f"two backwards of the same graph give {self.name} gradients that differ by {self.repeat:.2g} of it"
        got = "None" if self.is_none else f"{self.analytic:.6g}"
        return (
            f"the gradient of {self.name} gives {got} along a random direction, finite differences {self.numeric:.6g}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole comparison.

    Args:
        mismatches: tensors whose gradient is not the derivative.
        kinks: tensors whose gradient disagrees at the point itself and agrees right beside it.
        undecided: tensors for which no step gave differences good enough to decide, with the best error, relative.
        forward_repeat: relative difference between two forwards from the same random state; 0.0 when bitwise equal.
        precision: dtype in which all was computed.
        lowest: a lower dtype that an operation on the way used, with the operation's name.
        casts_raised: casts of the forward to float32 went to float64 instead.
        num_forwards: how often the function was run.
        num_backwards: how often it was differentiated.
        checked: names of the tensors that were compared.
    """

    mismatches: tuple[Mismatch, ...] = ()
    kinks: tuple[Mismatch, ...] = ()
    undecided: dict[str, float] = field(default_factory=dict[str, float])
    forward_repeat: float = 0.0
    precision: str = "float64"
    lowest: tuple[str, str] | None = None
    casts_raised: bool = False
    num_forwards: int = 0
    num_backwards: int = 0
    checked: tuple[str, ...] = ()
