"""What `gradctl.off` refuses, and the words that it refuses with: a gradient that is asked for is never zeros."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import gradctl
from recording import in_thread, leaf, records

# torch's own, when it loads the derivatives of forward mode, and when anything is scripted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def _square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum()


def test_a_refused_backward_names_the_call_the_thread_and_the_line_that_switched_off() -> None:
    w = leaf()
    y = _square(w)

    def serve() -> None:
        y.backward()  # the refused call

    with gradctl.off():  # the line that switched off
        with pytest.raises(gradctl.BackwardRefused) as refused:
            in_thread(serve)
        refused_line = inspect.getsourcelines(serve)[1] + 1
    message = str(refused.value)
    assert message.splitlines()[0] == "backward refused: gradients are switched off for this process"
    assert re.search(rf"what  \S*test_off_refusals\.py:{refused_line} in serve: y\.backward\(\)", message)
    assert "[thread worker-7]" in message
    assert re.search(r"why   switched off at \S*test_off_refusals\.py:\d+ in test_\w+: with gradctl\.off\(\):", message)
    assert "\n  fix   " in message
    assert isinstance(refused.value, gradctl.GradctlError)


def test_the_outermost_line_that_switched_off_is_named() -> None:
    def inner() -> None:
        with gradctl.off():  # inner
            _square(leaf()).backward()

    with pytest.raises(gradctl.BackwardRefused, match="# outer"), gradctl.off():  # outer
        inner()
    with pytest.raises(gradctl.BackwardRefused, match="# inner"):
        inner()


def test_a_decorated_function_is_named_by_the_line_that_called_it() -> None:
    @gradctl.off
    def evaluate() -> None:
        _square(leaf()).backward()

    with pytest.raises(gradctl.BackwardRefused, match=r"in test_\w+: evaluate\(\)  # the call"):
        evaluate()  # the call


def test_a_refused_graph_survives_and_its_gradients_are_those_it_would_have_had() -> None:
    w = leaf()
    y = _square(w)
    with gradctl.off():
        for ask in (y.backward, lambda: torch.autograd.grad(y, w), lambda: torch.autograd.backward(y)):
            with pytest.raises(gradctl.BackwardRefused):
                ask()
        assert w.grad is None
    y.backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_a_hook_of_a_refused_backward_does_not_run() -> None:
    ran: list[int] = []
    w = leaf()
    y = _square(w)
    w.register_hook(lambda grad: ran.append(1))
    with gradctl.off(), pytest.raises(gradctl.BackwardRefused):
        y.backward()
    assert ran == []


def test_every_door_to_the_engine_is_shut() -> None:
    engine = torch.autograd.Variable._execution_engine
    w = leaf()
    y = _square(w)

    def through(door: Any) -> None:
        door.run_backward((y,), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True)

    with gradctl.off():
        for ask in (
            lambda: through(engine),
            lambda: through(torch._C._ImperativeEngine()),
            lambda: torch.ops.aten._backward(y, [], torch.ones(()), True, False),
        ):
            with pytest.raises(RuntimeError, match="gradients are switched off"):
                ask()
            with pytest.raises(RuntimeError, match="gradients are switched off"):
                in_thread(ask)
    assert w.grad is None


def test_a_scripted_backward_is_refused() -> None:
    @torch.jit.script
    def scripted(x: torch.Tensor) -> None:
        y = (x * x).sum()
        y.backward()

    w = leaf()
    with gradctl.off(), pytest.raises(RuntimeError):
        scripted(w)
    assert w.grad is None
    scripted(w)
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


FUNCTIONAL: dict[str, Callable[[], Any]] = {
    "grad": lambda: torch.func.grad(_square)(torch.ones(3)),
    "vjp": lambda: torch.func.vjp(_square, torch.ones(3)),
    "jvp": lambda: torch.func.jvp(_square, (torch.ones(3),), (torch.ones(3),)),
    "jacrev": lambda: torch.func.jacrev(torch.sin)(torch.ones(3)),
    "jacfwd": lambda: torch.func.jacfwd(torch.sin)(torch.ones(3)),
    "hessian": lambda: torch.func.hessian(_square)(torch.ones(3)),
    "linearize": lambda: torch.func.linearize(torch.sin, torch.ones(3)),
    "vmap of grad": lambda: torch.func.vmap(torch.func.grad(_square))(torch.ones(2, 3)),
    "functional.jacobian": lambda: torch.autograd.functional.jacobian(torch.sin, torch.ones(3)),
    "functional.hessian": lambda: torch.autograd.functional.hessian(_square, torch.ones(3)),
    "functional.vjp": lambda: torch.autograd.functional.vjp(_square, torch.ones(3)),
    "functional.jvp": lambda: torch.autograd.functional.jvp(torch.sin, torch.ones(3), torch.ones(3)),
    "functional.hvp": lambda: torch.autograd.functional.hvp(_square, torch.ones(3), torch.ones(3)),
    "forward_ad": lambda: forward_ad.dual_level().__enter__(),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_derivatives_raise_and_are_never_zeros(name: str) -> None:
    with gradctl.off():
        with pytest.raises(gradctl.BackwardRefused, match=r"test_off_refusals\.py"):
            FUNCTIONAL[name]()
        with pytest.raises(gradctl.BackwardRefused):
            in_thread(FUNCTIONAL[name])
    if name != "forward_ad":
        FUNCTIONAL[name]()


def test_transforms_made_before_are_refused_and_right_afterwards() -> None:
    gradient = torch.func.grad(_square)
    _, pullback = torch.func.vjp(_square, torch.ones(3))
    with gradctl.off():
        for ask in (lambda: gradient(torch.ones(3)), lambda: pullback(torch.ones(()))):
            with pytest.raises(gradctl.BackwardRefused):
                ask()
    assert torch.equal(gradient(torch.ones(3)), torch.full((3,), 2.0))


def test_vmap_without_a_derivative_is_not_refused() -> None:
    with gradctl.off():
        assert torch.equal(torch.func.vmap(_square)(torch.ones(2, 3)), torch.full((2,), 3.0))


def test_a_forward_mode_level_entered_before_gives_no_tangent_inside_and_the_right_one_afterwards() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.full((2,), 3.0), torch.ones(2))
        with gradctl.off():
            square = dual * dual
            with pytest.raises(gradctl.BackwardRefused, match="forward-mode AD"):
                forward_ad.unpack_dual(square)
            with pytest.raises(gradctl.BackwardRefused, match="forward-mode AD"):
                forward_ad.make_dual(torch.ones(2), torch.ones(2))
        tangent = forward_ad.unpack_dual(square).tangent
        assert tangent is not None
        assert torch.equal(tangent, torch.full((2,), 6.0))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS], ids=["SGD", "LBFGS"])
def test_a_step_with_a_closure_is_refused_and_changes_nothing(make: Callable[..., torch.optim.Optimizer]) -> None:
    w = leaf()
    optimizer = make([w], lr=0.1)

    def closure() -> torch.Tensor:
        loss = _square(w)
        loss.backward()
        return loss

    with gradctl.off(), pytest.raises((gradctl.BackwardRefused, RuntimeError)):
        optimizer.step(closure)
    assert w.grad is None
    assert torch.equal(w.detach(), torch.ones(3))
    optimizer.step(closure)
    assert not torch.equal(w.detach(), torch.ones(3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_an_older_graph_is_refused(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    w = leaf()
    calls: list[int] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (x * x).sum()

    y = checkpoint(part, w, use_reentrant=reentrant)
    assert isinstance(y, torch.Tensor)
    with gradctl.off():
        with pytest.raises(gradctl.BackwardRefused):
            y.backward()
        inside = checkpoint(part, w, use_reentrant=reentrant)
        assert isinstance(inside, torch.Tensor)
        assert inside.grad_fn is None
    assert len(calls) == 2
    y.backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_retain_grad_does_nothing_on_a_leaf_and_is_refused_on_an_older_tensor() -> None:
    w = leaf()
    y = w * 2
    with gradctl.off():
        w.retain_grad()
        with pytest.raises(gradctl.BackwardRefused, match="retain_grad"):
            y.retain_grad()
        with pytest.raises(RuntimeError, match="requires_grad=False"):
            torch.ones(3).retain_grad()
    y.retain_grad()
    y.sum().backward()
    assert torch.equal(y.grad, torch.ones(3))  # type: ignore[arg-type]


# a script module keeps its flags or is not written


def _flags(buffer: io.BytesIO) -> list[bool]:
    buffer.seek(0)
    return [p.requires_grad for p in torch.jit.load(buffer).parameters()]


def test_a_script_module_is_saved_with_its_flags_or_refused() -> None:
    nested = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    buffer = io.BytesIO()
    with gradctl.off():
        for save in (lambda: torch.jit.save(nested, buffer), nested.save_to_buffer, lambda: nested._c.save("x.pt")):
            with pytest.raises(gradctl.BackwardRefused, match=r"0\.weight would be written as not requiring"):
                save()
        assert not buffer.getvalue()
    torch.jit.save(nested, buffer)
    assert _flags(buffer) == [True, True]
    buffer = io.BytesIO()
    for parameter in nested.parameters():
        parameter.requires_grad_(False)
    with gradctl.off():
        torch.jit.save(nested, buffer)
    assert _flags(buffer) == [False, False]


# strict


def test_strict_refuses_asking_for_a_gradient_at_the_call() -> None:
    x, model = torch.ones(3), torch.nn.Linear(2, 2).requires_grad_(False)

    def assign() -> None:
        x.requires_grad = True

    asks: tuple[Callable[[], Any], ...] = (
        lambda: x.requires_grad_(),  # looked up at the call: a bound method would be the one from before
        lambda: x.requires_grad_(True),
        assign,
        lambda: model.requires_grad_(),
        lambda: torch.nn.Parameter(torch.ones(2)),
        lambda: torch.nn.Linear(2, 2),
    )
    with gradctl.off(strict=True):
        for ask in asks:
            with pytest.raises(gradctl.BackwardRefused, match=r"test_off_refusals\.py"):
                ask()
        assert not x.requires_grad
        assert leaf().requires_grad
        x.requires_grad = False
        x.requires_grad_(False)
        model.requires_grad_(False)
        torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with gradctl.off():
        for ask in asks:
            ask()
    assert x.requires_grad


def test_strict_lasts_as_long_as_somebody_holds_it_strictly() -> None:
    with gradctl.off():
        torch.ones(3).requires_grad_()
        with gradctl.off(strict=True), pytest.raises(gradctl.BackwardRefused):
            torch.ones(3).requires_grad_()
        torch.ones(3).requires_grad_()
        assert not records()


# compiled autograd of the program's own


def test_compiled_autograd_that_the_program_turns_on_meanwhile_is_kept_until_gradients_are_back() -> None:
    compiled = torch._C._dynamo.compiled_autograd
    w = leaf()
    y = _square(w)
    asked: list[str] = []

    def compiler(*_: Any) -> Any:
        asked.append("compiler")
        raise RuntimeError("the program's compiler")

    with gradctl.off():
        before = compiled.set_autograd_compiler(compiler, False)
        assert before == (None, False)
        with pytest.raises(RuntimeError, match="gradients are switched off"):
            torch.ops.aten._backward(y, [], torch.ones(()), True, False)
        assert asked == []
    with pytest.raises(RuntimeError, match="the program's compiler"):
        torch.ops.aten._backward(y, [], torch.ones(()), True, False)
    assert compiled.set_autograd_compiler(*before) == (compiler, False)
    with gradctl.off():
        before = compiled.set_autograd_compiler(compiler, False)
        compiled.set_autograd_compiler(*before)
    assert compiled.set_autograd_compiler(None, False) == (None, False)


def test_distributed_backward_is_refused() -> None:
    import torch.distributed.autograd as autograd

    with gradctl.off(), pytest.raises(gradctl.BackwardRefused, match="distributed backward"):
        autograd.backward(0, [leaf().sum()])


def test_calling_a_node_by_hand_is_the_documented_gap() -> None:
    from gradctl import _off

    w = leaf()
    y = w * 2
    with gradctl.off():
        (grad, _) = y.grad_fn(torch.ones(3))  # type: ignore[misc]
    assert torch.equal(grad, torch.full((3,), 2.0))
    assert any("by hand" in gap for gap in _off.engine_report().not_covered)
