"""Linear operators whose graph is built once: Hessian, Gauss-Newton, Jacobian. SciPy takes them as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from gradctl._derivatives._forward import MATH_NOTE, bound, run, scalar, with_graph
from gradctl._derivatives._graph import (
    Reached,
    differentiate,
    notes_of,
    plain_arithmetic,
    refuse_no_second_derivative,
    walk,
)
from gradctl._derivatives._jacobian import Method, dense
from gradctl._derivatives._split import split
from gradctl._derivatives._twice import TwiceBackward, zeros_for
from gradctl._derivatives._used import Unused, hold_used
from gradctl._derivatives._variables import Variables, Wanted, variables
from gradctl._errors import UsageError

Loss = Tensor | Callable[..., Any]
Values = Sequence[Tensor]


class LinearOperator(ABC):
    """A matrix known by its products; the graph behind it is kept, so that a further product costs no forward.

    It has what `scipy.sparse.linalg` asks of an operator: shape, dtype, matvec, rmatvec, matmat, rmatmat.

    Attributes:
        method: how the products are computed.
        notes: what is worth knowing about them; each a sentence.
    """

    method: str = "double backward"
    notes: tuple[str, ...] = ()

    def __init__(self, rows: Variables, columns: Variables) -> None:
        self._rows = rows
        self._columns = columns
        self._versions = [tensor._version for tensor in columns.tensors]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._rows.numel, self._columns.numel

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the products; float32 for bfloat16, which NumPy does not have."""
        return np.dtype(_NUMPY.get(self._columns.dtype, np.float32))

    @abstractmethod
    def _forth(self, v: Values) -> Values: ...

    @abstractmethod
    def _back(self, u: Values) -> Values: ...

    def __call__(self, v: Any) -> Any:
        """Return the product with `v`: values in the structure of the tensors, or one flat vector.

        Args:
            v: tensors in the structure that the operator was built for, or a flat Tensor or NumPy array [columns].
        Returns:
            The product: structured for structured `v`, flat for flat.
        Raises:
            UsageError: a shape, dtype or device is not that of the tensors; or these have changed since.
        """
        return self._product(v, self._columns, self._rows, self._forth)

    def transposed(self, u: Any) -> Any:
        """Return the product of the transpose with `u`, as `__call__` does for the matrix itself."""
        return self._product(u, self._rows, self._columns, self._back)

    def matvec(self, x: Any) -> Any:
        """Return the product with a flat vector [columns] or [columns, 1], of the same kind and rank."""
        return self._flat(x, self._columns, self._rows, self._forth)

    def rmatvec(self, x: Any) -> Any:
        """Return the product of the transpose with a flat vector [rows] or [rows, 1]."""
        return self._flat(x, self._rows, self._columns, self._back)

    def matmat(self, x: Any) -> Any:
        """Return the products with the columns of a matrix [columns, k], one after another: [rows, k]."""
        return _stacked([self.matvec(x[:, k]) for k in range(x.shape[1])], x, self.shape[0])

    def rmatmat(self, x: Any) -> Any:
        """Return the products of the transpose with the columns of a matrix [rows, k]: [columns, k]."""
        return _stacked([self.rmatvec(x[:, k]) for k in range(x.shape[1])], x, self.shape[1])

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, Tensor | np.ndarray) and x.ndim == 2 and x.shape[0] == self.shape[1]:
            return self.matmat(x)
        return self(x)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<{type(self).__name__} {rows} x {columns}, {self.dtype}, by {self.method}>"

    def _product(self, v: Any, of: Variables, to: Variables, apply: Callable[[Values], Values]) -> Any:
        if of.is_flat(v):
            return self._flat(v, of, to, apply)
        return to.pack(apply(of.unpack(v)))

    def _flat(self, x: Any, of: Variables, to: Variables, apply: Callable[[Values], Values]) -> Any:
        if isinstance(x, np.ndarray):
            found = to.flat(apply(of.split(of._flat_of(x, "v")))).cpu()
            dense: np.ndarray[Any, Any] = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
            return dense.astype(self.dtype, copy=False).reshape((to.numel, 1) if x.ndim == 2 else (to.numel,))
        column = x.ndim == 2 and x.shape == (of.numel, 1)
        found = to.flat(apply(of.split(of._flat_of(x.reshape(-1) if column else x, "v"))))
        return found.unsqueeze(1) if column else found

    def _hold_unchanged(self) -> None:
        for tensor, name, version in zip(self._columns.tensors, self._columns.names, self._versions, strict=True):
            if tensor._version != version:
                raise UsageError(
                    f"{name} has changed since this {type(self).__name__} was built",
                    what="it stands for the values that the parameters had",
                    fix="build it again after the change",
                )


_NUMPY: dict[torch.dtype, Any] = {torch.float64: np.float64, torch.float16: np.float16}


def _stacked(columns: list[Any], like: Any, rows: int) -> Any:
    if not columns:
        return like.new_empty(rows, 0) if isinstance(like, Tensor) else np.empty((rows, 0), like.dtype)
    return torch.stack(columns, 1) if isinstance(columns[0], Tensor) else np.stack(columns, 1)


def softmax_note(reached: Reached) -> tuple[str, ...]:
    """Say that attention ran on the math backend, when the graph can hold attention at all."""
    if reached.has("Softmax", "SafeSoftmax"):
        return (MATH_NOTE,)
    return ()


class HessianOperator(LinearOperator):
    """The Hessian of a loss, by double backward through a graph that is built once.

    Each product costs one backward through the graph of the gradient. Dropout keeps the mask and BatchNorm the batch of
    the one forward; its running statistics move once, as in any forward.

    Args:
        loss: one number with its graph, or a function that computes it. A function without arguments uses `params`
            itself; one that must be given arguments is called with copies of `params`. It runs with the math backend
            of attention, since the fused kernels have no second derivative.
        params: a module (its trainable parameters), tensors by name, an iterable of tensors, or one tensor.
        unused: "zeros" gives zeros for what the loss does not depend on, "error" refuses it.

    Raises:
        NoSecondDerivative: an operation of the graph has no derivative of its backward, or drops terms of it.
        UsageError: the loss is not one number, or does not depend on the parameters.
    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian"; by double backward instead of an R-operator.
    """

    method = "double backward"

    def __init__(self, loss: Loss, params: Wanted, *, unused: Unused = "zeros") -> None:
        own = not isinstance(loss, Tensor)
        function, of = bound(loss, params, called="params") if own else (None, variables(params))
        super().__init__(of, of)
        value = scalar(run(function) if function is not None else loss)
        reached = walk([value], of.tensors)
        hold_used(reached, of, unused, what="loss")
        refuse_no_second_derivative(reached, of.tensors)
        self.notes = notes_of(reached, of.tensors) + (softmax_note(reached) if own else ())
        self._own_graph = own
        self._used = [number for number, used in enumerate(reached.used) if used]
        self._inputs = [of.tensors[number] for number in self._used]
        with torch.enable_grad(), plain_arithmetic(of.device):
            self._gradients = differentiate(
                lambda: torch.autograd.grad(value, self._inputs, create_graph=True), again="the operator"
            )
        self._live = [number for number, gradient in enumerate(self._gradients) if gradient.requires_grad]
        self.loss = value.detach()

    @property
    def gradient(self) -> Any:
        """The gradient at the same place, in the structure of the parameters."""
        return self._rows.pack(self._spread(self._gradients))

    def _spread(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(self._columns.tensors)
        for number, value in zip(self._used, values, strict=True):
            found[number] = value
        return zeros_for(found, self._columns.tensors)

    def _forth(self, v: Values) -> Values:
        return self._times(v, keep=True)

    def _back(self, u: Values) -> Values:
        return self._times(u, keep=True)

    def _times(self, v: Values, *, keep: bool) -> Values:
        self._hold_unchanged()
        if not self._live:
            return self._spread([None] * len(self._used))
        with plain_arithmetic(self._columns.device):
            return self._spread(
                differentiate(
                    lambda: torch.autograd.grad(
                        [self._gradients[number] for number in self._live],
                        self._inputs,
                        [v[self._used[number]] for number in self._live],
                        retain_graph=keep or not self._own_graph,
                        allow_unused=True,
                    ),
                    again="the operator",
                )
            )


class GGNOperator(LinearOperator):
    """The generalised Gauss-Newton matrix J' H J of a loss: J of the network's outputs, H of the loss in them.

    The outputs are found for the losses that are known: cross entropy, squared error, binary cross entropy, Huber and
    what is summed and scaled of them. For any other they are named.

    Args:
        loss: one number with its graph; or a function that returns it, or `(loss, outputs)`. See `HessianOperator`.
        params: as for `HessianOperator`.
        outputs: what the loss is computed from, when it cannot be seen from the graph: a tensor or several.
        unused: as for `HessianOperator`.

    Raises:
        NoSecondDerivative: an operation of the graph has no derivative of its backward, or drops terms of it.
        UsageError: the outputs cannot be found, or a part of the loss reaches the parameters without passing them.
    Source: Schraudolph 2002, "Fast curvature matrix-vector products"; both products by backward, as in R-operators.
    """

    method = "double-vjp"

    def __init__(
        self, loss: Loss, params: Wanted, *, outputs: Tensor | Sequence[Tensor] | None = None, unused: Unused = "zeros"
    ) -> None:
        own = not isinstance(loss, Tensor)
        function, of = bound(loss, params, called="params") if own else (None, variables(params))
        super().__init__(of, of)
        value, given = loss_and_outputs(run(function) if function is not None else loss, outputs, own=own)
        reached = walk([value], of.tensors)
        hold_used(reached, of, unused, what="loss")
        refuse_no_second_derivative(reached, of.tensors)
        self.notes = notes_of(reached, of.tensors) + (softmax_note(reached) if own else ())
        self._edges = split(value, given, of.tensors)

        def build() -> tuple[tuple[Tensor, ...], TwiceBackward]:
            cotangents = torch.autograd.grad(value, self._edges, create_graph=True)
            return cotangents, TwiceBackward(self._edges, cotangents, of.tensors)

        with torch.enable_grad(), plain_arithmetic(of.device):
            self._cotangents, self._jacobian = differentiate(build, again="the operator")
        self._curved = [number for number, each in enumerate(self._cotangents) if each.requires_grad]
        self.loss = value.detach()

    def _forth(self, v: Values) -> Values:
        self._hold_unchanged()
        with plain_arithmetic(self._columns.device):
            return differentiate(lambda: self._times(v), again="the operator")

    def _times(self, v: Values) -> Values:
        moved = self._jacobian.forth(v)
        if not self._curved:
            return zeros_for([None] * len(self._columns.tensors), self._columns.tensors)
        bent = torch.autograd.grad(
            [self._cotangents[number] for number in self._curved],
            self._edges,
            [moved[number] for number in self._curved],
            retain_graph=True,
            allow_unused=True,
        )
        return zeros_for(self._jacobian.back(zeros_for(bent, moved)), self._columns.tensors)

    def _back(self, u: Values) -> Values:
        return self._forth(u)


def loss_and_outputs(
    found: Any, outputs: Tensor | Sequence[Tensor] | None, *, own: bool
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Return the loss, and the outputs when they were given: beside the loss, or returned with it.

    Raises:
        UsageError: both, or what came back is neither a loss nor a loss and outputs.
    """
    if own and isinstance(found, tuple):
        pair = cast("tuple[Any, ...]", found)
        if len(pair) != 2 or outputs is not None:
            raise UsageError(
                "the function returned a tuple" + (f" of {len(pair)}" if len(pair) != 2 else " and outputs= is given"),
                fix="return the loss, or (loss, outputs)",
            )
        found, outputs = pair
    elif own and outputs is not None:
        raise UsageError(
            "outputs= is for a loss that is computed already",
            why="the function computes new ones",
            fix="return (loss, outputs) from it",
        )
    value = scalar(found)
    if outputs is None:
        return value, None
    return value, [outputs] if isinstance(outputs, Tensor) else list(outputs)


class JacobianOperator(LinearOperator):
    """The Jacobian of outputs with respect to inputs or parameters, known by its products in both directions.

    Products with the matrix are by backward through the transposed product, those with the transpose by backward.

    Args:
        outputs: a tensor, several, or tensors by name, with their graph; or a function that computes them. See
            `HessianOperator`.
        inputs: a module (its trainable parameters), tensors by name, an iterable of tensors, or one tensor.
        unused: "zeros" gives zeros for what the outputs do not depend on, "error" refuses it.

    Raises:
        UsageError: the outputs have no history, or do not depend on the inputs.
    """

    method = "double-vjp"

    def __init__(
        self,
        outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Callable[..., Any],
        inputs: Wanted,
        *,
        unused: Unused = "zeros",
    ) -> None:
        function, of = (
            bound(outputs, inputs, called="inputs") if callable(outputs) else (None, variables(inputs, called="inputs"))
        )
        found = run(function) if function is not None else outputs
        to = variables(cast("Wanted", found), called="outputs", needs_grad=False)
        with_graph(to.tensors, called="output")
        super().__init__(to, of)
        self._reached = walk(to.tensors, of.tensors)
        hold_used(self._reached, of, unused, what="output")
        self.notes = notes_of(self._reached, of.tensors) + (softmax_note(self._reached) if function else ())
        self._outputs = [output for output in to.tensors if output.requires_grad]
        self._live = [number for number, output in enumerate(to.tensors) if output.requires_grad]
        self._twice: TwiceBackward | None = None
        self.outputs = to.pack([output.detach() for output in to.tensors])
        self.dense_method: str | None = None

    def dense(self, *, batch: Literal["none", "samples"] = "none", method: Method = "auto") -> Any:
        """Return the whole Jacobian; see `gradctl.jacobian`. `dense_method` says how it was computed."""
        found, self.dense_method = dense(self._rows, self._columns, self._reached, batch=batch, method=method)
        return found

    def _forth(self, v: Values) -> Values:
        self._hold_unchanged()

        def product() -> list[Tensor]:
            if self._twice is None:
                refuse_no_second_derivative(self._reached, self._columns.tensors)
                self._twice = TwiceBackward(self._outputs, self._outputs, self._columns.tensors)
            return self._twice.forth(v)

        with plain_arithmetic(self._columns.device):
            moved = differentiate(product, again="the operator")
        found: list[Tensor | None] = [None] * len(self._rows.tensors)
        for number, value in zip(self._live, moved, strict=True):
            found[number] = value
        return zeros_for(found, self._rows.tensors)

    def _back(self, u: Values) -> Values:
        self._hold_unchanged()
        with plain_arithmetic(self._columns.device):
            found = differentiate(
                lambda: torch.autograd.grad(
                    self._outputs,
                    self._columns.tensors,
                    [u[number] for number in self._live],
                    retain_graph=True,
                    allow_unused=True,
                ),
                again="the operator",
            )
        return zeros_for(found, self._columns.tensors)
