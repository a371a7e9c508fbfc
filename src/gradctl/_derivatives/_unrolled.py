"""Inner loops of training steps through which an outer gradient flows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from gradctl._derivatives._batch import Generators
from gradctl._derivatives._graph import differentiate, math_attention, refuse_no_second_derivative
from gradctl._derivatives._graph import walk as walk_graph
from gradctl._errors import GradctlError, UsageError
from gradctl._saved import storage_keys, walk

State = dict[str, Tensor]
Update = Callable[[State, State, Any], tuple[State, Any]]
InnerLoss = Callable[..., Tensor]
Rate = float | Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The end of an inner loop, as a function of where it began.

    Args:
        params: the last parameters by name, with graph; [T, ...] over tasks.
        losses: the inner loss before each step, detached, [steps]; [T, steps] over tasks. Empty with "step".
        gradient_norm: of the last inner gradient, detached, [] or [T]: a hypergradient is that of a minimum only
            where this is small. None with "step" or without steps.
        method: "vmap" or "loop" over tasks, "single" without tasks.
        why: what vmap said when it could not run the tasks; empty otherwise.
    """

    params: State
    losses: Tensor
    gradient_norm: Tensor | None
    method: str
    why: str

    @property
    def saved_bytes(self) -> int:
        """Bytes that the graph of the loop keeps alive for the outer backward; it grows with the steps."""
        given = storage_keys(list(self.params.values()))
        return walk(list(self.params.values()), given, seconds=60.0, nodes=10_000_000).total


def unrolled(
    inner: Callable[..., Any],
    params: Mapping[str, Tensor],
    steps: int,
    *,
    optimizer: Literal["sgd", "momentum", "adam", "step"] | Update = "sgd",
    lr: Rate = 0.1,
    momentum: float | Tensor = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    batch: Sequence[Tensor] | Callable[[int], Sequence[Tensor]] = (),
    tasks: Literal["none", "auto", "vmap", "loop"] = "none",
    truncate: int | None = None,
) -> Unrolled:
    """Run `steps` of an inner optimisation so that the outer gradient flows through every one of them.

    The graph begins at `params` themselves, never at a copy, so that an outer loss differentiates the initialisation
    (MAML) and everything else that `inner` uses: learning rates, weights of samples, a learnt loss. Adam's root holds
    `eps**2` inside: an exactly zero second moment has finite derivatives, and values differ from torch.optim.Adam's
    by less than `eps` in the denominator. Memory grows with the steps that are differentiated (`.saved_bytes`).

    Args:
        inner: `inner(params, *batch)` returns the inner loss, shape []; use `torch.func.functional_call` for a module.
            With optimizer "step" it is the step itself: `inner(params, *batch)` returns the next params.
        params: tensors by name where the loop begins.
        steps: number of inner steps.
        optimizer: "sgd", "momentum" (heavy ball, as torch.optim.SGD), "adam", "step", or a function
            `(params, grads, state) -> (params, state)`; its state is None at the first step.
        lr: one number or tensor for all parameters, or a tensor by name (Meta-SGD).
        momentum: of "momentum".
        betas: of "adam".
        eps: of "adam".
        weight_decay: added to the gradient, times the parameter; a tensor when it is learnt.
        batch: what `inner` takes behind the parameters: the same at every step, or a function of the step's number.
        tasks: "none", or one loop for each row of the batch's tensors, all from the same `params`: batched by "vmap",
            one after the other by "loop", "auto" for vmap where it can run `inner`.
        truncate: differentiate the last so many steps only; the steps before keep no graph, and what depends on
            `params` through them is lost.
    Returns:
        The last parameters with their graph, and what was seen on the way.
    Raises:
        UsageError: no parameter requires or can take gradients, a loss that is not one number, or wrong counts.
        NoSecondDerivative: `inner` uses an operation that cannot be differentiated twice.
    Source: Finn et al. 2017, arXiv:1703.03400; Maclaurin et al. 2015, arXiv:1502.03492; truncation: Shaban et al.
        2019, arXiv:1810.10667.
    """
    start = dict(params)
    _require(start, steps, optimizer, tasks, truncate)
    update = _updates(optimizer, lr, momentum, betas, eps, weight_decay)
    feed = batch if callable(batch) else None
    batches = [tuple(feed(index)) if feed else tuple(cast("Sequence[Tensor]", batch)) for index in range(steps)]
    cut = steps - truncate if truncate is not None else 0
    loop = _Loop(inner, update, cut)
    if tasks == "none":
        found = loop.run(start, batches)
        return _result(found, "single", "")
    count = _count_tasks(batches)
    why = ""
    if tasks != "loop":
        try:
            return _result(_mapped(loop, start, batches), "vmap", "")
        except (RuntimeError, NotImplementedError) as error:
            if tasks == "vmap" or isinstance(error, GradctlError):
                raise
            why = str(error).strip().partition("\n")[0]
    ends = [loop.run(start, [tuple(one[task] for one in some) for some in batches]) for task in range(count)]
    return _result(_stacked(ends), "loop", why)


@dataclass(frozen=True, slots=True)
class _End:
    params: State
    losses: list[Tensor]
    gradient: State | None


@dataclass(frozen=True, slots=True)
class _Loop:
    """Steps in order; those before `cut` keep no graph."""

    inner: Callable[..., Any]
    update: Update | None
    cut: int

    def run(self, start: State, batches: list[tuple[Tensor, ...]], *, functional: bool = False) -> _End:
        values, state, last = start, None, None
        losses: list[Tensor] = []
        for index, batch in enumerate(batches):
            early = index < self.cut
            if self.update is None:
                values = dict(self.inner(values, *batch))
            else:
                differentiated = _functional if functional else _taped
                gradient, loss = differentiated(self.inner, values, batch, graph=not early, first=last is None)
                losses.append(loss.detach())
                last = gradient
                values, state = self.update(values, gradient, state)
            if early:
                values, state = _detached(values), _detached(state)
        return _End(values, losses, last)


def _taped(
    inner: InnerLoss, values: State, batch: tuple[Tensor, ...], *, graph: bool, first: bool
) -> tuple[State, Tensor]:
    """The gradient by autograd, as a part of the graph."""
    taken = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in values.items()}
    # A fused attention kernel has no derivative of its backward.
    with torch.enable_grad(), math_attention():
        loss = _scalar(inner(taken, *batch))
        if first:
            _look_at(loss, taken)
        found = differentiate(
            lambda: torch.autograd.grad(
                loss, list(taken.values()), create_graph=graph, allow_unused=True, materialize_grads=True
            ),
            again="the inner loss",
        )
    return dict(zip(taken, cast("Sequence[Tensor]", found), strict=True)), loss


def _functional(
    inner: InnerLoss, values: State, batch: tuple[Tensor, ...], *, graph: bool, first: bool
) -> tuple[State, Tensor]:
    """The gradient by torch.func, which vmap can batch."""
    gradient, loss = grad_and_value(lambda taken: _scalar(inner(taken, *batch)))(values)
    return cast("State", gradient), cast("Tensor", loss)


def _mapped(loop: _Loop, start: State, batches: list[tuple[Tensor, ...]]) -> _End:
    if loop.update is not None and batches:
        # Under vmap the graph of the inner loss is out of sight: look at one task's.
        generators = Generators(start)
        taken = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in start.items()}
        with torch.enable_grad(), math_attention():
            _look_at(_scalar(loop.inner(taken, *(one[0] for one in batches[0]))), taken)
        generators.put_back()

    def one(flat: list[tuple[Tensor, ...]]) -> tuple[State, list[Tensor], State]:
        end = loop.run(start, flat, functional=True)
        return end.params, end.losses, end.gradient or {}

    with math_attention():
        params, losses, gradient = vmap(one, randomness="different")(batches)
    return _End(params, list(losses), gradient or None)


def _look_at(loss: Tensor, taken: State) -> None:
    """Refuse an inner loss that does not depend on the parameters, or cannot be differentiated twice."""
    if not loss.requires_grad:
        raise _unused()
    values = list(taken.values())
    reached = walk_graph([loss], values)
    if not any(reached.used):
        raise _unused()
    refuse_no_second_derivative(reached, values)


def _stacked(ends: list[_End]) -> _End:
    first = ends[0]
    params = {name: torch.stack([end.params[name] for end in ends]) for name in first.params}
    losses = [torch.stack([end.losses[index] for end in ends]) for index in range(len(first.losses))]
    gradient = None
    if first.gradient is not None:
        gradient = {name: torch.stack([cast("State", end.gradient)[name] for end in ends]) for name in first.gradient}
    return _End(params, losses, gradient)


def _result(end: _End, method: str, why: str) -> Unrolled:
    over = 0 if method == "single" else 1
    norm = None
    if end.gradient:
        squares = [
            g.detach().square().flatten(over).sum(-1) if g.dim() > over else g.detach().square()
            for g in end.gradient.values()
        ]
        norm = torch.stack(squares).sum(0).sqrt()
    losses = torch.stack(end.losses, -1) if end.losses else torch.zeros(0)
    return Unrolled(end.params, losses, norm, method, why)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(one) for name, one in cast("Mapping[Any, Any]", value).items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(one) for one in value)
    return value


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"the inner loss is {shown}, not one number",
            what="inner(params, *batch) returns the loss, shape []",
            fix="reduce it; optimizer='step' takes a function that returns the next params",
        )
    return loss.reshape(())


def _unused() -> UsageError:
    return UsageError(
        "the inner loss uses none of params",
        what="it does not depend on what inner was called with",
        why="inner calls a module with its own parameters",
        fix="call it with these: torch.func.functional_call(model, params, (x,))",
    )


def _require(params: State, steps: int, optimizer: object, tasks: str, truncate: int | None) -> None:
    if not params:
        raise UsageError("unrolled got no params", fix="pass dict(model.named_parameters())")
    for name, value in params.items():
        if not (value.is_floating_point() or value.is_complex()):
            raise UsageError(f"{name} has dtype {value.dtype}, which takes no gradient", fix="leave it out of params")
    if steps < 0:
        raise UsageError(f"steps is the number of inner steps, got {steps}")
    if truncate is not None and truncate < 1:
        raise UsageError(f"truncate is the number of last steps to differentiate, got {truncate}")
    if not callable(optimizer) and optimizer not in ("sgd", "momentum", "adam", "step"):
        raise UsageError(f"optimizer is 'sgd', 'momentum', 'adam', 'step' or a function, got {optimizer!r}")
    if tasks not in ("none", "auto", "vmap", "loop"):
        raise UsageError(f"tasks is 'none', 'auto', 'vmap' or 'loop', got {tasks!r}")


def _count_tasks(batches: list[tuple[Tensor, ...]]) -> int:
    sizes = {one.shape[0] if one.dim() else 0 for some in batches for one in some}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            "the tensors of the batch do not agree on the number of tasks",
            what=f"their first dims are {sorted(sizes)}; with tasks, dim 0 counts the tasks",
            fix="stack the tasks' batches: x of shape [T, B, ...], y of shape [T, B]",
        )
    return sizes.pop()


def _updates(
    optimizer: str | Update,
    lr: Rate,
    momentum: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
) -> Update | None:
    """The inner optimizer as a function; None for a step of the caller's."""
    if optimizer == "step":
        return None
    if callable(optimizer):
        return optimizer

    def rate(name: str) -> float | Tensor:
        return lr[name] if isinstance(lr, Mapping) else lr

    def decayed(params: State, grads: State) -> State:
        if not isinstance(weight_decay, Tensor) and weight_decay == 0:
            return grads
        return {name: g + weight_decay * params[name] for name, g in grads.items()}

    def sgd(params: State, grads: State, state: Any) -> tuple[State, Any]:
        grads = decayed(params, grads)
        return {name: p - rate(name) * grads[name] for name, p in params.items()}, None

    def heavy_ball(params: State, grads: State, state: Any) -> tuple[State, Any]:
        grads = decayed(params, grads)
        velocity = grads if state is None else {name: momentum * state[name] + g for name, g in grads.items()}
        return {name: p - rate(name) * velocity[name] for name, p in params.items()}, velocity

    def adam(params: State, grads: State, state: Any) -> tuple[State, Any]:
        grads = decayed(params, grads)
        first, second = betas
        step = 1 if state is None else state["step"] + 1
        mean = {n: (1 - first) * g + (first * state["mean"][n] if state else 0) for n, g in grads.items()}
        square = {n: (1 - second) * g * g + (second * state["square"][n] if state else 0) for n, g in grads.items()}
        end: State = {}
        for name, p in params.items():
            corrected = square[name] / (1 - second**step)
            # eps inside of the root: the derivative of a root at zero is infinite, and times zero it is nan.
            end[name] = p - rate(name) * (mean[name] / (1 - first**step)) / (corrected + eps * eps).sqrt()
        return end, {"mean": mean, "square": square, "step": step}

    return {"sgd": sgd, "momentum": heavy_ball, "adam": adam}[str(optimizer)]
