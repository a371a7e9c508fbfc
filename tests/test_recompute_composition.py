"""Regions among other mechanisms: torch's checkpoints and hooks, compilers, scalers, transforms, gradctl's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import gradctl
import settled
from gradctl import UsageError
from gradctl._recompute import recompute

settled.compiling()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.2, self.training))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def trained(
    model: nn.Module, steps: int = 3, forward: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Train for some steps and return the losses, the last gradients, and every number of the model."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(64, 32)
        loss = (forward(model, x) if forward is not None else model(x)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*losses, *grads, *(value.clone() for value in model.state_dict().values())]


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return len(ours) == len(plain) and all(map(torch.equal, ours, plain))


def recomputed(keep: Any = "nothing") -> nn.Sequential:
    model = net()
    for block in model:
        recompute(block, keep=keep)
    return model


# -- torch's checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["nothing", "matmul"])
@pytest.mark.parametrize("early", [True, False])
def test_inside_of_a_checkpoint_of_torch(keep: str, early: bool) -> None:
    # BatchNorm would move twice under torch's checkpoint: the plain program is that one without regions.
    def around(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, early_stop=early)

    assert same(trained(recomputed(keep), forward=around), trained(net(), forward=around))


def test_around_a_checkpoint_of_torch() -> None:
    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net().eval()
        first = wrap(lambda x: checkpoint(model[0], x, use_reentrant=False).sin())
        return trained(model, forward=lambda m, x: m[1](first(x)))

    assert same(program(recompute), program(lambda f: f))


def test_around_a_selective_checkpoint_of_torch() -> None:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])

    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net().eval()
        first = wrap(lambda x: checkpoint(model[0], x, use_reentrant=False, context_fn=contexts).sin())
        return trained(model, forward=lambda m, x: m[1](first(x)))

    assert same(program(recompute), program(lambda f: f))


def test_a_reentrant_checkpoint_inside() -> None:
    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net().eval()
        first = wrap(lambda x: checkpoint(model[0], x.requires_grad_(), use_reentrant=True).sin())
        return trained(model, forward=lambda m, x: m[1](first(x)))

    assert same(program(recompute), program(lambda f: f))


# -- hooks of saved tensors ------------------------------------------------------------------------------------------


def test_inside_of_save_on_cpu() -> None:
    def around(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert same(trained(recomputed("matmul"), forward=around), trained(net()))


def test_around_save_on_cpu() -> None:
    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net()

        def part(x: Tensor) -> Tensor:
            y = model[0](x).tanh()
            with torch.autograd.graph.save_on_cpu():
                y = model[1](y)
            return y.sin()

        region = wrap(part)
        return trained(model, forward=lambda m, x: region(x))

    assert same(program(recompute), program(lambda f: f))


def test_where_hooks_are_disabled_it_is_torch_that_refuses() -> None:
    model = recomputed()
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        pytest.raises(RuntimeError, match="not here"),
    ):
        model(torch.randn(4, 32))
    assert same(trained(recomputed()), trained(net()))


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_part_inside() -> None:
    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net().eval()
        part = torch.compile(model[0], backend="aot_eager")
        region = wrap(lambda x: model[1](part(x).tanh()))
        return trained(model, forward=lambda m, x: region(x))

    plain, ours = program(lambda f: f), program(recompute)
    torch._dynamo.reset()
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# The compiler looks at the gradient of what it is given after a break, leaf or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.slow
def test_regions_inside_of_a_compiled_model() -> None:
    def compiled(model: nn.Module) -> list[Tensor]:
        run = torch.compile(model, backend="aot_eager")
        return trained(model, forward=lambda m, x: run(x))

    model = nn.Sequential(net().eval(), recomputed().eval(), net().eval())
    plain = nn.Sequential(net().eval(), net().eval(), net().eval())
    ours, expected = compiled(model), trained(plain)
    torch._dynamo.reset()
    for one, other in zip(ours, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_whole_graph_is_refused_by_the_compiler_that_asks_for_one() -> None:
    model = torch.compile(recomputed().eval(), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.randn(4, 32))
    torch._dynamo.reset()


# -- training loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_whole_step(dtype: torch.dtype) -> None:
    def around(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    assert same(trained(recomputed(), forward=around), trained(net(), forward=around))


def test_a_model_in_bfloat16() -> None:
    def cast(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.bfloat16())

    assert same(trained(recomputed().bfloat16(), forward=cast), trained(net().bfloat16(), forward=cast))


def test_a_grad_scaler_scales_and_skips_as_it_does() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
        scales: list[Tensor] = []
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(torch.randn(64, 32))
            loss = out.float().square().mean() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        return [*scales, *model.state_dict().values()]

    ours, plain = program(recomputed()), program(net())
    assert ours[2] == 2.0
    assert same(ours, plain)


def test_gradients_accumulate_over_microbatches() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        losses = [model(torch.randn(16, 32)).square().mean() for _ in range(3)]  # three graphs alive at once
        for loss in reversed(losses):
            loss.backward()
        return [*(p.grad for p in model.parameters()), *model.state_dict().values()]

    assert same(program(recomputed()), program(net()))


def test_the_optimizer_steps_in_backward() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)

        def update(p: Tensor) -> None:
            with torch.no_grad():
                p.sub_(0.01 * p.grad)
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
        for _ in range(3):
            model(torch.randn(64, 32)).square().mean().backward()
        for handle in handles:
            handle.remove()
        return list(model.state_dict().values())

    assert same(program(recomputed()), program(net()))


def test_parameters_of_functional_call_are_those_that_get_the_gradient() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        params = {name: p.detach().mul(1.5).requires_grad_() for name, p in model.named_parameters()}
        out: list[Tensor] = []
        for _ in range(3):
            loss = torch.func.functional_call(model, params, torch.randn(64, 32)).square().mean()
            out += torch.autograd.grad(loss, list(params.values()))
        return out

    assert same(program(recomputed()), program(net()))


# -- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "vjp", "jacrev", "hessian"])
def test_transforms_of_torch_func_are_refused_with_the_way_out(name: str) -> None:
    model, x = recomputed().eval(), torch.randn(4, 32)

    def loss(x: Tensor) -> Tensor:
        return model(x).sum()

    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vmap": lambda: torch.func.vmap(model)(x[None]),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "hessian": lambda: torch.func.hessian(loss)(x),
    }
    with pytest.raises(UsageError, match=r"inside of a torch\.func transform") as caught:
        calls[name]()
    assert "handle.remove()" in str(caught.value)


# -- gradctl's own parts ---------------------------------------------------------------------------------------------


def test_switched_off_nothing_is_noted() -> None:
    model = recomputed()
    with gradctl.off():
        assert not model(torch.randn(4, 32)).requires_grad
    assert not model[0].forward.run._plans
    model(torch.randn(4, 32)).sum().backward()
    assert model[0].forward.run._plans


def test_frozen_layers_get_no_gradient_and_the_rest_the_plain_one() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        with gradctl.freeze(model, "0.*"):
            return trained(model)

    assert same(program(recomputed()), program(net()))


def test_a_norm_layer_that_freezing_keeps_still_stands_still() -> None:
    model = recomputed()
    with gradctl.freeze(model, "0.*"):
        before = [b.clone() for b in model[0].buffers()]
        model(torch.randn(64, 32)).sum().backward()
        assert same(list(model[0].buffers()), before)


def test_changed_gradients_inside_of_a_region() -> None:
    def program(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = net()
        region = wrap(lambda x: gradctl.scale(gradctl.reverse(model[0](x)).tanh(), 0.5).sin())
        return trained(model, forward=lambda m, x: m[1](region(x)))

    assert same(program(recompute), program(lambda f: f))


def test_explain_finds_the_same_in_a_recomputed_model() -> None:
    found: list[list[str]] = []
    for model in (net(), recomputed()):
        torch.manual_seed(1)
        loss = model(torch.randn(64, 32)).detach().square().mean()
        found.append([finding.slug for finding in gradctl.explain(loss, model)])
    assert found[0] == found[1]


def test_hessian_products_are_the_plain_ones() -> None:
    def program(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        x, v = torch.randn(16, 32), [torch.randn_like(p) for p in model.parameters()]
        loss = model.eval()(x).square().mean()
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return list(torch.autograd.grad(first, list(model.parameters()), v))

    assert same(program(recomputed()), program(net()))
