"""The call `recompute`: what it takes and refuses, its handle, policies, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl import UsageError
from gradctl._recompute import Made, recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + self.drop(self.b(F.gelu(self.a(x)))) * scale


def grads(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(x, **kwargs).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd was really given to keep: hooks around the region are handed them."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    params = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(size for pointer, size in seen.items() if pointer not in params)


def test_a_module_is_recomputed_until_its_handle_is_removed() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(64, 16)
    plain, before = grads(model, x), dict(model.__dict__)
    handle = recompute(model)
    assert saved_bytes(model, x) == 0
    for _ in range(3):
        assert all(map(torch.equal, grads(model, x), plain))
    handle.remove()
    handle.remove()
    assert model.__dict__.keys() == before.keys()
    assert "forward" not in model.__dict__
    assert saved_bytes(model, x) > 0


def test_as_a_context_it_is_undone_at_the_end_also_after_an_error() -> None:
    model = Block()
    with recompute(model) as handle:
        assert "forward" in model.__dict__
        assert handle.module is model
    assert "forward" not in model.__dict__
    with pytest.raises(KeyError), recompute(model):
        raise KeyError
    assert "forward" not in model.__dict__


def test_a_forward_of_the_instance_is_put_back() -> None:
    model = Block()
    own = model.forward
    model.forward = lambda x: own(x) * 2
    kept, x = model.forward, torch.randn(4, 16)
    plain = grads(model, x)
    with recompute(model):
        assert all(map(torch.equal, grads(model, x), plain))
    assert model.__dict__["forward"] is kept


def test_a_forward_that_another_library_wrapped_since_is_not_taken_away() -> None:
    model = Block()
    handle = recompute(model)
    ours = model.forward
    model.forward = lambda x: ours(x)
    with pytest.raises(UsageError, match="was wrapped by something else since") as caught:
        handle.remove()
    assert "undo that first" in str(caught.value)
    model.forward = ours
    handle.remove()
    assert "forward" not in model.__dict__


def test_a_second_time_is_refused() -> None:
    model = Block()
    with recompute(model):
        with pytest.raises(UsageError, match="this Block is recomputed already"):
            recompute(model)
        with pytest.raises(UsageError, match="this Block is recomputed already"):
            recompute(model, keep="matmul")


def test_hooks_names_and_state_dict_are_those_of_the_module() -> None:
    model, seen = Block(), list[str]()
    model.register_forward_hook(lambda m, args, out: seen.append("hook"))
    keys = list(model.state_dict())
    with recompute(model):
        model(torch.randn(2, 16), scale=0.5)
        assert list(model.state_dict()) == keys
        assert model.forward.__name__ == "forward"
        assert seen == ["hook"]


def test_it_decorates_a_function_and_a_method() -> None:
    class Net(Block):
        @recompute
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            """Say what it does."""
            return super().forward(x, scale=scale)

    torch.manual_seed(0)
    plain = Block()
    ours = Net()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(8, 16)
    assert all(map(torch.equal, grads(ours, x, scale=2.0), grads(plain, x, scale=2.0)))
    assert saved_bytes(ours, x) == 0
    assert Net.forward.__doc__ == "Say what it does."

    @recompute
    def double(t: Tensor) -> Tensor:
        return (t * 2).exp()

    assert double.__name__ == "double"
    assert torch.equal(double(x), (x * 2).exp())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (3, "a int cannot be recomputed"),
        (nn.ModuleList([nn.Linear(2, 2)]), "ModuleList has no forward"),
        (nn.ModuleDict(), "ModuleDict has no forward"),
        (nn.Linear, "Linear is a class"),
    ],
)
def test_what_has_nothing_to_recompute_is_refused(target: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        recompute(target)
    assert caught.value.fix


def test_generators_and_coroutines_are_refused() -> None:
    def numbers() -> Any:
        yield 1

    async def later() -> int:
        return 1

    for function in (numbers, later):
        with pytest.raises(UsageError, match="returns before it has run"):
            recompute(function)


def test_words_that_are_no_policy_are_refused() -> None:
    with pytest.raises(UsageError, match="keep='everything' is no policy"):
        recompute(Block(), keep="everything")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="verify='always' is not"):
        recompute(Block(), verify="always")  # type: ignore[call-overload]


def test_policies_keep_what_they_say() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 8, 2, 24).transpose(1, 2).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 16).tanh())

    torch.manual_seed(0)
    model, x = Attends(), torch.randn(2, 8, 16)
    plain, everything = grads(model, x), saved_bytes(model, x)
    found: dict[str, int] = {}
    for name in ("nothing", "attention", "matmul"):
        with recompute(model, keep=name):  # type: ignore[call-overload]
            for _ in range(2):
                assert all(map(torch.equal, grads(model, x), plain))
            found[name] = saved_bytes(model, x)
    assert found["nothing"] == 0
    attention = x.nbytes + 2 * 2 * 8 * 4  # the output, and one number for each head and position
    assert found["attention"] == attention
    assert found["matmul"] == attention + 3 * x.nbytes
    assert found["matmul"] < everything


def test_a_predicate_sees_each_saved_result() -> None:
    seen: list[Made] = []

    def policy(made: Made) -> bool:
        seen.append(made)
        return made.nbytes >= 4096

    torch.manual_seed(0)
    model, x = Block(), torch.randn(64, 16)
    plain = grads(model, x)
    with recompute(model, keep=policy):
        assert all(map(torch.equal, grads(model, x), plain))
    assert {"aten.addmm", "aten.gelu"} <= {made.name for made in seen}
    (wide,) = {made.shape for made in seen if made.name == "aten.addmm"} - {(64, 16)}
    assert wide == (64, 32)
    assert all(made.nbytes == 4 * made.shape[0] * made.shape[1] for made in seen)
    assert {made.line[0] for made in seen if made.line} == {__file__}


def test_outputs_that_need_no_gradient_gain_none() -> None:
    model = Block().requires_grad_(False)
    with recompute(model):
        assert not model(torch.randn(2, 16)).requires_grad
        with torch.no_grad():
            assert not model(torch.randn(2, 16).requires_grad_()).requires_grad


def test_without_gradients_nothing_is_noted() -> None:
    model = Block()
    with recompute(model):
        with torch.no_grad():
            model(torch.randn(2, 16))
        with torch.inference_mode():
            assert model(torch.randn(2, 16)).is_inference()
        assert not model.forward.run._plans


def test_copies_are_recomputed_by_themselves() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 16)
    plain = grads(model, x)
    handle = recompute(model)
    grads(model, x)
    twin = copy.deepcopy(model)
    handle.remove()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert saved_bytes(twin, x) == 0
    assert all(map(torch.equal, grads(twin, x), plain))
    assert all(p.grad is not None for p in twin.parameters())


def test_a_copy_of_a_model_copies_regions_inside() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    plain = grads(model, x)
    for block in model:
        recompute(block)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert all(map(torch.equal, grads(twin, x), plain))


def test_a_pickled_module_comes_back_recomputed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 16)
    plain = grads(model, x)
    for block in model:
        recompute(block, keep="matmul")
    grads(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert all(map(torch.equal, grads(twin, x), plain))
        assert 0 < saved_bytes(twin, x) < saved_bytes(nn.Sequential(Block(), Block()), x)
        assert twin[0].forward.run.function.__self__ is twin[0]


def test_a_module_that_calls_itself_is_right_whatever_it_learned() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(16, 16)
            self.depth = 2

        def forward(self, x: Tensor) -> Tensor:
            self.depth -= 1
            y = self.w(x).tanh()
            y = self(y) if self.depth > 0 else y.sin()
            self.depth += 1
            return y * x

    torch.manual_seed(0)
    model, x = Tree(), torch.randn(8, 16)
    for depth in (2, 3, 1, 4, 2):
        model.depth = depth
        plain = grads(model, x)
        handle = recompute(model)
        for again in (depth, depth, depth + 1, depth):
            model.depth = again
            ours = grads(model, x)
        handle.remove()
        assert all(map(torch.equal, ours, plain))


def test_shapes_that_change_from_call_to_call_are_right() -> None:
    torch.manual_seed(0)
    model = Block()
    inputs = [torch.randn(n, 16) for n in (3, 8, 3, 1, 20, 8, 5, 6, 7, 9, 10, 11, 3)]
    plain = [grads(model, x) for x in inputs]
    with recompute(model):
        for x, expected in zip(inputs, plain, strict=True):
            assert all(map(torch.equal, grads(model, x), expected))
