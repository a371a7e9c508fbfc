"""One product each: hvp, ggnvp, jvp, vjp. Operators keep the graph for many (`_operators.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from gradctl._derivatives._forward import Buffers, bound, scalar, tangent_of, tangents, with_graph
from gradctl._derivatives._graph import differentiate, math_attention, plain_arithmetic, walk
from gradctl._derivatives._operators import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    Loss,
    loss_and_outputs,
)
from gradctl._derivatives._split import softmax_head, split
from gradctl._derivatives._twice import zeros_for
from gradctl._derivatives._used import Unused, hold_used
from gradctl._derivatives._variables import Variables, Wanted, variables
from gradctl._errors import UsageError

Outputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Callable[..., Any]


def hvp(loss: Loss, params: Wanted, v: Any, *, unused: Unused = "zeros") -> Any:
    """Return the product of the Hessian of a loss with a vector, exactly, by double backward.

    Neither `.grad` nor the graph of a loss that is passed is touched. For many products build a `HessianOperator`.

    Args:
        loss: one number with its graph, or a function that computes it. A function without arguments uses `params`
            itself; one that must be given arguments is called with copies of `params`. It runs with the math backend
            of attention, since the fused kernels have no second derivative.
        params: a module (its trainable parameters), tensors by name, an iterable of tensors, or one tensor.
        v: values in the structure of `params` (of a module: by name), or one flat vector [number of elements].
        unused: "zeros" gives zeros for what the loss does not depend on, "error" refuses it.
    Returns:
        The product in the structure of `params`; a flat vector for a flat `v`.
    Raises:
        NoSecondDerivative: an operation of the graph has no derivative of its backward, or drops terms of it.
        UsageError: the loss is not one number, does not depend on the parameters, or `v` does not fit them.
    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian"; by double backward instead of an R-operator.
    """
    operator = HessianOperator(loss, params, unused=unused)
    return operator._product(v, operator._columns, operator._rows, lambda values: operator._times(values, keep=False))


def ggnvp(
    loss: Loss,
    params: Wanted,
    v: Any,
    *,
    outputs: Tensor | Sequence[Tensor] | None = None,
    method: Literal["auto", "dual", "double-vjp"] = "auto",
    unused: Unused = "zeros",
) -> Any:
    """Return the product of the generalised Gauss-Newton matrix J' H J of a loss with a vector, exactly.

    J is the Jacobian of the network's outputs, H the Hessian of the loss in them. The outputs are found for the losses
    that are known (cross entropy, squared error, binary cross entropy, Huber, sums and multiples of them).

    Args:
        loss: one number with its graph; or a function that returns it, or `(loss, outputs)`. See `hvp`.
        params: as for `hvp`.
        v: as for `hvp`.
        outputs: what the loss is computed from, when it cannot be seen from the graph: a tensor or several.
        method: "dual" carries `v` forward as a tangent and needs a function; "double-vjp" needs only a graph; "auto"
            takes "dual" where the function allows it: no operation without forward-mode derivative, no part under
            no_grad, which a tangent would pass.
        unused: as for `hvp`.
    Returns:
        As for `hvp`.
    Raises:
        NoSecondDerivative: an operation of the graph has no derivative that the method needs.
        UsageError: the outputs cannot be found, or a part of the loss reaches the parameters without passing them.
    Source: Schraudolph 2002, "Fast curvature matrix-vector products". Differs: the forward product is by dual numbers.
    """
    if not isinstance(loss, Tensor) and outputs is None and method != "double-vjp":
        function, of = bound(loss, params, called="params")
        values = of.unpack(v)
        state = Buffers(of.device)
        found = _carried(
            lambda: _ggn_dual(function, of, values, state, unused),
            method,
            needs="a forward-mode derivative",
        )
        if found is not None:
            return of.flat(found) if of.is_flat(v) and isinstance(v, Tensor) else _as_given(of, found, v)
        state.restore()
        again = GGNOperator(_Called(function), of.pack(of.tensors), unused=unused)
        return _as_given(of, again._forth(values), v)
    if method == "dual":
        raise UsageError(
            "method='dual' needs a function that computes the loss",
            why="a tangent has to be there before the forward",
            fix="pass a function, or method='double-vjp'",
        )
    return GGNOperator(loss, params, outputs=outputs, unused=unused)(v)


def jvp(
    outputs: Outputs,
    inputs: Wanted,
    v: Any,
    *,
    method: Literal["auto", "forward", "double-vjp"] = "auto",
    unused: Unused = "zeros",
) -> Any:
    """Return the derivative of outputs along a direction of the inputs: J v.

    Args:
        outputs: a tensor, several, or tensors by name, with their graph; or a function that computes them (of inputs
            that it must be given, or of `inputs` themselves when it takes none).
        inputs: a module (its trainable parameters), tensors by name, an iterable of tensors, or one tensor.
        v: a direction: values in the structure of `inputs`, or one flat vector.
        method: "forward" carries `v` along and needs a function; "double-vjp" differentiates the transposed product;
            "auto" takes "forward" where the function allows it.
        unused: "zeros" gives zeros for what the outputs do not depend on, "error" refuses it.
    Returns:
        The derivative, in the structure of the outputs; a flat vector for a flat `v`.
    Raises:
        NoSecondDerivative: an operation has no derivative that the method needs.
        UsageError: the outputs do not depend on the inputs, or `v` does not fit them.
    """
    if callable(outputs) and method != "double-vjp":
        function, of = bound(outputs, inputs, called="inputs")
        values = of.unpack(v)
        state = Buffers(of.device)
        found = _carried(
            lambda: _jvp_forward(function, of, values, state, unused), method, needs="a forward-mode derivative"
        )
        if found is not None:
            to, moved = found
            return _as_given(to, moved, v, flat=of.is_flat(v))
        state.restore()
        again = JacobianOperator(_Called(function), of.pack(of.tensors), unused=unused)
        return _as_given(again._rows, again._forth(values), v, flat=of.is_flat(v))
    if method == "forward":
        raise UsageError(
            "method='forward' needs a function that computes the outputs",
            why="a tangent has to be there before the forward",
            fix="pass a function, or method='double-vjp'",
        )
    return JacobianOperator(outputs, inputs, unused=unused)(v)


def vjp(outputs: Outputs, inputs: Wanted, u: Any, *, unused: Unused = "zeros") -> Any:
    """Return the gradient of the outputs weighted with `u`: J' u.

    Args:
        outputs: as for `jvp`; a graph that is passed is kept.
        inputs: as for `jvp`.
        u: weights: values in the structure of the outputs, or one flat vector.
        unused: as for `jvp`.
    Returns:
        The product, in the structure of `inputs`; a flat vector for a flat `u`.
    Raises:
        UsageError: the outputs do not depend on the inputs, or `u` does not fit the outputs.
    """
    if not callable(outputs):
        return JacobianOperator(outputs, inputs, unused=unused).transposed(u)
    function, of = bound(outputs, inputs, called="inputs")
    with torch.enable_grad():
        found = function()
    to = variables(cast("Wanted", found), called="outputs", needs_grad=False)
    with_graph(to.tensors, called="output")
    weights = to.unpack(u, called="u")
    hold_used(walk(to.tensors, of.tensors), of, unused, what="output")
    live = [number for number, output in enumerate(to.tensors) if output.requires_grad]
    with plain_arithmetic(of.device):
        back = differentiate(
            lambda: torch.autograd.grad(
                [to.tensors[number] for number in live],
                of.tensors,
                [weights[number] for number in live],
                allow_unused=True,
            ),
            again="the outputs",
        )
    return _as_given(of, zeros_for(back, of.tensors), u, flat=to.is_flat(u))


class _Called:
    """A function that is already bound to its inputs: takes none."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __call__(self) -> Any:
        return self._function()


def _as_given(to: Variables, values: Sequence[Tensor], v: Any, *, flat: bool | None = None) -> Any:
    """Return values in their structure, or flat for a flat vector, as a NumPy array for an array."""
    if not (to.is_flat(v) if flat is None else flat):
        return to.pack(values)
    found = to.flat(values)
    return found if isinstance(v, Tensor) else found.cpu().numpy()


class _NotCarried(Exception):
    """A tangent cannot be carried through this function, or would not be what the graph says."""


class _Watch(TorchFunctionMode):
    """Sees whether a function switches gradients off, where a tangent would pass; and what enters its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = False
        self.entering: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0]:
            self.cut = True
        elif getattr(func, "__name__", None) in _LOSSES and args and isinstance(args[0], Tensor):
            self.entering.append(args[0])
        return func(*args, **(kwargs or {}))


_LOSSES = frozenset(
    (
        "cross_entropy",
        "log_softmax",
        "mse_loss",
        "binary_cross_entropy_with_logits",
        "huber_loss",
        "smooth_l1_loss",
        "soft_margin_loss",
    )
)


def _carried(compute: Callable[[], Any], method: str, *, needs: str) -> Any:
    """Return what `compute` finds by a tangent, or None when it cannot and another method may."""
    if method != "auto":
        try:
            return differentiate(compute, again="the loss")
        except _NotCarried as error:
            raise UsageError(
                f"method={method!r} cannot be used here",
                what=str(error),
                fix="take method='auto' or 'double-vjp'",
            ) from error
    try:
        return compute()
    except (RuntimeError, NotImplementedError, _NotCarried) as error:
        if isinstance(error, UsageError):
            raise
        return None


def _watched(function: Callable[[], Any], state: Buffers, *, graph: bool) -> tuple[Any, list[Tensor]]:
    with state.remembering(), torch.set_grad_enabled(graph), math_attention(), _Watch() as watch:
        found = function()
    if watch.cut:
        raise _NotCarried("a part of the function runs under no_grad, which a tangent would pass")
    return found, watch.entering


def _ggn_dual(
    function: Callable[[], Any], of: Variables, values: Sequence[Tensor], state: Buffers, unused: Unused
) -> list[Tensor]:
    with tangents(of.tensors, values):
        found, entering = _watched(function, state, graph=True)
        loss, outputs = loss_and_outputs(found, None, own=True)
        edges = split(loss, outputs, of.tensors)
        at = {(each.grad_fn, each.output_nr): each for each in (outputs or entering)}
        seen = [at.get((edge.node, edge.output_nr)) for edge in edges]
        moved = [None if output is None else tangent_of(output) for output in seen]
        if None in seen:
            # Forward over reverse, of the loss alone: the tangent of its gradient is H J v. Slower for small outputs.
            with plain_arithmetic(of.device):
                bent = [tangent_of(each) for each in torch.autograd.grad(loss, edges, retain_graph=True)]
        else:
            bent = None
    if unused == "error":
        hold_used(walk([loss], of.tensors), of, unused, what="loss")
    with plain_arithmetic(of.device):
        if bent is None:
            bent = _bend(loss, edges, moved, found=outputs is None)
        live = [number for number, each in enumerate(bent) if each is not None]
        back: Sequence[Tensor | None] = [None] * len(of.tensors)
        if live:
            back = torch.autograd.grad(
                [edges[number] for number in live], of.tensors, [bent[number] for number in live], allow_unused=True
            )
    if not any(isinstance(each, Tensor) for each in back):
        hold_used(walk([scalar(loss)], of.tensors), of, unused, what="loss")
    return zeros_for(back, of.tensors)


def _bend(loss: Tensor, edges: Sequence[Any], moved: Sequence[Tensor | None], *, found: bool) -> list[Tensor | None]:
    """Return the Hessian of the loss in the outputs, times how they move; None where it is zero."""
    head = softmax_head(loss, edges) if found and len(edges) == 1 else None
    if head is not None and moved[0] is not None:
        # Above the softmax the loss is linear: with weights u on log p its Hessian is -sum(u) (diag p - p p').
        (weights,) = torch.autograd.grad(loss, [GradientEdge(head, 0)], retain_graph=True)
        dim = head._saved_dim - (1 << 64 if head._saved_dim >= 1 << 63 else 0)
        p = head._saved_result.detach().exp()
        away = moved[0] - (p * moved[0]).sum(dim, keepdim=True)
        return [p.mul_(away).mul_(-weights.sum(dim, keepdim=True))]
    with torch.enable_grad():
        cotangents = torch.autograd.grad(loss, edges, create_graph=True)
    pairs = [(each, way) for each, way in zip(cotangents, moved, strict=True) if each.requires_grad and way is not None]
    if not pairs:
        return [None] * len(edges)
    return list(
        torch.autograd.grad(
            [each for each, _ in pairs], edges, [way for _, way in pairs], retain_graph=True, allow_unused=True
        )
    )


def _jvp_forward(
    function: Callable[[], Any], of: Variables, values: Sequence[Tensor], state: Buffers, unused: Unused
) -> tuple[Variables, list[Tensor]]:
    with tangents(of.tensors, values):
        # Without a graph, unless it must be known what is used: it would cost as much again.
        found, _ = _watched(function, state, graph=unused == "error")
        to = variables(cast("Wanted", found), called="outputs", needs_grad=False)
        if unused == "error":
            hold_used(walk(to.tensors, of.tensors), of, unused, what="output")
        moved = [tangent_of(output) for output in to.tensors]
    if not any(isinstance(each, Tensor) for each in moved):
        raise _NotCarried("no output moves with the inputs")  # the other method finds out why
    return Variables(tuple(output.detach() for output in to.tensors), to.names, to.form), zeros_for(moved, to.tensors)
