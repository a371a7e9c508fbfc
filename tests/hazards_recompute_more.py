"""More programs for regions: what other mechanisms refuse or answer wrongly, and what people write. See the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards_recompute import HAZARDS, Program, Region, Size, hazard

__all__ = ["HAZARDS"]


# -- autocast --------------------------------------------------------------------------------------------------------


@hazard()
def a_cast_weight_was_cached_before_the_region(s: Size) -> Program:
    model, x = nn.Linear(s.width, s.width), s.input().requires_grad_()

    def step(region: Region) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = region(lambda t: model(t).relu(), model(x))
        return z.float().sum()

    return Program([model, x], step)


@hazard()
def two_regions_share_a_cast_weight(s: Size) -> Program:
    model, x = nn.Linear(s.width, s.width), s.input().requires_grad_()

    def step(region: Region) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = region(lambda t: model(t).relu(), region(lambda t: model(t).relu(), x))
        return z.float().sum()

    return Program([model, x], step)


@hazard()
def autocast_is_switched_inside(s: Size) -> Program:
    model, x = nn.Linear(s.width, s.width), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(t).relu()
            with torch.autocast("cpu", enabled=False):
                y = model(y.float()).exp()
            return (model(y) * y).tanh()

    return Program([model, x], lambda region: region(forward, x).float().sum())


# -- modules of torch ------------------------------------------------------------------------------------------------


@hazard()
def a_transformer_layer(s: Size) -> Program:
    model = nn.TransformerEncoderLayer(s.width, 4, 2 * s.width, dropout=0.1, batch_first=True)
    x = torch.randn(4, s.rows, s.width, requires_grad=True)
    return Program([model, x], lambda region: region(model, x).square().sum())


@hazard()
def two_layers_of_gru(s: Size) -> Program:
    model, x = nn.GRU(s.width, s.width, 2, dropout=0.2), torch.randn(5, s.rows, s.width, requires_grad=True)
    return Program([model, x], lambda region: region(lambda t: model(t)[0], x).sum())


@hazard()
def two_layers_of_lstm(s: Size) -> Program:
    model, x = nn.LSTM(s.width, s.width, 2, dropout=0.2), torch.randn(5, s.rows, s.width, requires_grad=True)
    return Program([model, x], lambda region: region(lambda t: model(t)[0], x).sum())


@hazard()
def cells_of_an_lstm(s: Size) -> Program:
    cell, x = nn.LSTMCell(s.width, s.width), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        state = None
        for _ in range(3):
            state = cell(t, state)
        return state[0]

    return Program([cell, x], lambda region: region(forward, x).sum())


@hazard()
def a_bag_of_embeddings(s: Size) -> Program:
    bag, w, rows = nn.EmbeddingBag(50, s.width, mode="mean"), s.weight(), torch.randint(0, 50, (4, 3))
    return Program([bag, w], lambda region: region(lambda i: (bag(i) @ w).tanh(), rows).sum())


@hazard()
def a_convolution_in_channels_last(s: Size) -> Program:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1)
    model = nn.Sequential(*layers)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, s.width, s.width).to(memory_format=torch.channels_last)
    return Program([model], lambda region: region(model, x).square().sum())


@hazard()
def a_tied_weight(s: Size) -> Program:
    table, rows = nn.Embedding(s.rows, s.width), torch.arange(s.rows)

    def forward(i: Tensor) -> Tensor:
        return (table(i).tanh() @ table.weight.t()).log_softmax(1)

    return Program([table], lambda region: region(forward, rows).sum())


@hazard()
def a_frozen_base_with_adapters(s: Size) -> Program:
    base, down, up = nn.Linear(s.width, s.width), nn.Linear(s.width, 2), nn.Linear(2, s.width)
    base.requires_grad_(False)
    x = s.input()

    def forward(t: Tensor) -> Tensor:
        return F.gelu(base(t) + up(down(F.dropout(t, 0.1))))

    return Program([base, down, up], lambda region: region(forward, region(forward, x)).sum())


# -- in place, views, layouts ----------------------------------------------------------------------------------------


@hazard()
def chunks_that_are_overwritten(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        a, b = torch.unsafe_chunk(t @ w, 2, 1)
        return a.sigmoid_() * b.tanh_()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def a_product_that_is_overwritten(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()
    return Program([w, x], lambda region: region(lambda t: (t @ w).sigmoid_().sin(), x).sum())


@hazard()
def writes_through_views(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        y = t @ w
        z = y + 1
        z[:, 1::2] *= 2
        z.t()[0].mul_(3)
        z[1:].view(-1)[::3].add_(1)
        y[0] = z[1]
        return z.sin() + y.cos() + y[1:, 1:].sum().tanh()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def rows_at_odd_offsets(s: Size) -> Program:
    w, x = nn.Parameter(torch.randn(s.width, s.width + 1) / s.width), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).bfloat16()
        return sum(row.sin() for row in (t @ w)[1:6]).sum() + y[1].tanh().sum() + y[3, 1:].exp().sum()

    return Program([w, x], lambda region: region(forward, x))


@hazard()
def expanded_and_broadcast(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh()
        wide = y[:, None, :].expand(s.rows, 9, s.width)
        return (wide * wide.transpose(0, 1).contiguous().transpose(0, 1)).sin() + wide.sigmoid()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def a_buffer_that_is_filled_piece_by_piece(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        out = t.new_empty(3, s.rows, s.width)
        for i in range(3):
            t = (t @ w).tanh()
            out[i] = t
        return out.sin()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def a_static_cache_over_several_calls(s: Size) -> Program:
    w, x, cache = s.weight(), s.input(), torch.zeros(3, s.rows, s.width)

    def attend(t: Tensor, at: int) -> Tensor:
        key = t @ w
        with torch.no_grad():
            cache[at] = key
        seen = cache[: at + 1].clone()
        return (seen * key).softmax(0).sum(0)

    return Program([w], lambda region: sum(region(attend, x * (i + 1), i).sin().sum() for i in range(3)))


@hazard()
def the_spectrum(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()
    return Program([w, x], lambda region: region(lambda t: (torch.fft.rfft(t @ w).abs().sum(-1) + 1).log(), x).sum())


@hazard()
def complex_numbers_conjugated(s: Size) -> Program:
    w = nn.Parameter(torch.randn(s.width, s.width, dtype=torch.complex64))
    x = torch.randn(s.rows, s.width, dtype=torch.complex64)

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).conj()
        z = torch.view_as_real(y.resolve_conj() * y.exp().conj()).sin() + y.imag.unsqueeze(-1).tanh()
        return z.sum() + (y.mH @ y).abs().sqrt().sum()

    return Program([w], lambda region: region(forward, x))


@hazard()
def sparse_matrices(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh()
        mask = (y.detach() > 0.3).float().to_sparse()
        return torch.sparse.mm(mask, (y @ w).t().sin()[: s.width].expand(s.width, s.rows).clone()).cos()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def routing_by_the_data(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        y = (t + torch.randn_like(t)) @ w
        chosen = (y.sum(1) > 0).nonzero().squeeze(1)
        return torch.zeros_like(y).index_add(0, chosen, y[chosen].tanh()) * y

    return Program([w, x], lambda region: region(forward, x).sum())


# -- functions, hooks, backward in the forward -----------------------------------------------------------------------


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        inside = x.exp()
        ctx.save_for_backward(inside, x)
        ctx.by, ctx.aside = by, inside * 2
        return inside.sin() * by

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inside, x = ctx.saved_tensors
        again, _ = ctx.saved_tensors
        return grad * ctx.by * inside.cos() * (ctx.aside / 2) + 0 * x + 0 * again, None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2).tanh_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * 2 * (1 - y * y)


@hazard()
def functions_of_the_users_own(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        return _InPlace.apply(_Scale.apply((t @ w).tanh(), 1.5) * 1).sin()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def hooks_that_change_what_passes(s: Size) -> Program:
    model, x, seen = nn.Sequential(nn.Linear(s.width, s.width), nn.Tanh()), s.input().requires_grad_(), list[float]()

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out.data.mul_(1.25)
        out.register_hook(lambda grad: grad * 0.5)
        seen.append(1.0)
        return out.mul(2)

    model[0].register_forward_hook(after)
    model[1].register_forward_pre_hook(lambda module, args: (args[0].clamp_(min=-1),))
    model.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    return Program([model, x], lambda region: region(lambda t: model(t).sin(), x).sum(), effects=lambda: list(seen))


@hazard()
def a_gradient_taken_inside(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor) -> Tensor:
        energy = (t @ w).tanh().sin().sum()
        (grad,) = torch.autograd.grad(energy, t, create_graph=True)
        return (t - 0.1 * grad).cos()

    return Program([w, x], lambda region: region(forward, x).sum())


@hazard()
def a_graph_that_is_used_up_inside(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def forward(t: Tensor) -> Tensor:
        y = (t @ w).tanh()
        u = y.detach() * 2
        torch.autograd.grad(y.sin().sum(), w)
        return (u.exp() @ w).sin() * u.cos()

    return Program([w], lambda region: region(forward, x).sum())


@hazard()
def a_training_step_inside(s: Size) -> Program:
    outer, inner, x = s.weight(), s.weight(), s.input()

    def forward(t: Tensor) -> Tensor:
        fast = inner
        for _ in range(2):
            (grad,) = torch.autograd.grad((t @ fast).sin().sum(), fast, create_graph=True)
            fast = fast - 0.1 * grad
        return (t @ fast @ outer).tanh()

    return Program([outer, inner], lambda region: region(forward, x).sum())


# -- nesting, recursion, several calls -------------------------------------------------------------------------------


@hazard()
def regions_three_deep(s: Size) -> Program:
    w, u, x = s.weight(), s.weight(), s.input().requires_grad_()

    def step(region: Region) -> Tensor:
        def inner(t: Tensor) -> Tensor:
            return F.dropout((t @ w).tanh(), 0.3).sin()

        def middle(t: Tensor) -> Tensor:
            return region(inner, (t @ u).sigmoid_()).exp() * region(inner, t)

        def outer(t: Tensor) -> Tensor:
            return region(middle, t.cos()).sin() + region(middle, t.sin())

        return region(outer, x).sum()

    return Program([w, u, x], step)


@hazard()
def inputs_and_constants_come_back(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def forward(t: Tensor, flag: bool, extra: dict[str, Any]) -> dict[str, Any]:
        y = (t @ w).tanh()
        return {"same": t, "view": t[:, 1:], "y": y, "cut": y.detach(), "mask": y > 0, "n": 3, "extra": extra, "w": w}

    def step(region: Region) -> Tensor:
        out = region(forward, x, True, extra={"k": [x, None]})
        assert out["same"] is x
        assert out["extra"]["k"][0] is x
        assert out["w"] is w
        assert not out["cut"].requires_grad
        assert not out["mask"].requires_grad
        return (out["y"].sin() * out["mask"] + out["cut"]).sum() + out["view"].pow(2).sum()

    return Program([w, x], step)


@hazard()
def outputs_overwritten_by_the_next_layer(s: Size) -> Program:
    w, x = s.weight(), s.input().requires_grad_()

    def step(region: Region) -> Tensor:
        out = region(lambda t: (t @ w) + 1, x)
        out.relu_()
        return region(lambda t: (t @ w).sin(), out).sum()

    return Program([w, x], step)


@hazard()
def parts_without_gradients(s: Size) -> Program:
    w, x = s.weight(), s.input()

    def forward(t: Tensor) -> Tensor:
        with torch.no_grad():
            target = (t @ w).softmax(1)
        with torch.inference_mode():
            scale = (t @ w).abs().mean()
        return (t @ w).log_softmax(1) * target * scale.clone()

    return Program([w], lambda region: region(forward, x).sum())


@hazard()
def an_input_from_inference_mode(s: Size) -> Program:
    w = s.weight()
    with torch.inference_mode():
        x = s.input()
    return Program([w], lambda region: region(lambda t: ((t * 2 + 1).clone() @ w).tanh(), x).sum())


@hazard()
def forward_mode_inside(s: Size) -> Program:
    w, x, v = s.weight(), s.input(), s.input()

    def forward(t: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(t, v)
            primal, tangent = torch.autograd.forward_ad.unpack_dual((dual @ w).tanh().sin())
            return primal + tangent

    return Program([w], lambda region: region(forward, x).sum())
