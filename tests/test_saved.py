"""Saved bytes are those that saved-tensor hooks count; reading them runs nothing of the program."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradctl import _saved, _taps
from gradctl._names import NameBook

_autograd = torch._C._autograd


class Tap:
    """Where torch switches saved-tensor hooks off, as `arm_lines` takes it."""

    def subscribe(self, wrap: Any, /) -> Any:
        return _taps.saved_hooks_disabled.subscribe(wrap, order="measure")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """What torch and transformers patch for good at first use, before any test looks for leaks."""
    import transformers  # noqa: F401

    torch.compile(lambda x: x.sin().sum(), backend="aot_eager")(torch.ones(2, requires_grad=True))
    torch.compiler.reset()


def by_hooks(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the distinct storages that saved-tensor hooks are shown, parameters excluded."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(storage.nbytes() for storage in found.values())


def by_walk(forward: Callable[[], torch.Tensor], model: nn.Module) -> _saved.SavedBytes:
    torch.manual_seed(0)
    loss = forward()
    return _saved.walk(loss.grad_fn, _saved.storage_keys(model.parameters()))


def by_lines(forward: Callable[[], torch.Tensor], model: nn.Module) -> _saved.SavedBytes:
    watch = _saved.arm_lines(_saved.storage_keys(model.parameters()))
    assert watch is not None
    torch.manual_seed(0)
    loss = forward()
    counted = watch.disarm()
    loss.backward()
    return counted


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(24, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


def lstm() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model, ids = Recurrent(), torch.randint(0, 40, (4, 12))
    return model, lambda: nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def gpt2() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model, ids = GPT2LMHeadModel(config), torch.randint(1, 97, (4, 24))
    return model, lambda: nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())


def resnet() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    model, images = ResNetForImageClassification(config), torch.randn(2, 3, 32, 32)
    return model, lambda: nn.functional.cross_entropy(model(images).logits, torch.tensor([0, 2]))


@pytest.mark.parametrize("make", [lstm, gpt2, resnet])
def test_walk_and_lines_count_the_bytes_that_hooks_count(make):
    model, forward = make()
    oracle = by_hooks(forward, model)
    walked, lines = by_walk(forward, model), by_lines(forward, model)
    assert abs(walked.total - oracle) <= oracle * 0.001
    assert abs(lines.total - oracle) <= oracle * 0.001
    for counted in (walked, lines):
        assert sum(row.bytes for row in counted.rows) == counted.total
        assert sum(row.count for row in counted.rows) == counted.count
        assert counted.complete
        assert counted.fault is None
        assert counted.notes == ()


OPERATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.exp,
    torch.tanh,
    torch.relu,
    lambda x: x @ x.T @ x,
    lambda x: x * x,
    lambda x: x.softmax(1),
    lambda x: torch.cat([x, x.sin()]),
    lambda x: x[:, torch.tensor([0, 2, 1])],
    lambda x: nn.functional.dropout(x, 0.5),
    lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    lambda x: torch.stack(x.unbind(0)).cumsum(0),
    lambda x: x.sort(1).values,
    lambda x: x.std(1, keepdim=True) * x,
]


@given(picks=st.lists(st.integers(0, len(OPERATIONS) - 1), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_chain_of_operations_is_counted_as_by_hooks(picks, seed):
    torch.manual_seed(seed)
    start = nn.ParameterList([torch.randn(3, 3)])

    def forward() -> torch.Tensor:
        x = start[0] * 2
        for pick in picks:
            x = OPERATIONS[pick](x)
        return x.sum()

    oracle = by_hooks(forward, start)
    # A Python number in a product is saved as a scalar that hooks are not shown: eight bytes each.
    assert 0 <= by_walk(forward, start).total - oracle <= 8 * (len(picks) + 1)


def test_parameters_count_nothing_however_they_are_viewed():
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)
    loss = (x @ weight.T @ weight[:, :4]).sum()
    assert _saved.walk(loss.grad_fn).total > weight.nbytes
    counted = _saved.walk(loss.grad_fn, _saved.storage_keys([weight]))
    assert counted.total == x.nbytes + 4 * 8 * 4


def test_a_freed_graph_holds_nothing():
    x = torch.randn(5, requires_grad=True)
    loss = x.exp().sin().sum()
    loss.backward()
    counted = _saved.walk(loss.grad_fn)
    assert (counted.total, counted.fault) == (0, None)
    assert counted.nodes == 4


def test_hooks_of_the_program_are_not_run():
    calls: list[str] = []

    def unpack(packed: Any) -> torch.Tensor:
        calls.append("unpack")
        return torch.zeros(packed)

    x = torch.randn(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, unpack):
        loss = x.exp().sum()
    counted = _saved.walk(loss.grad_fn)
    assert calls == []
    assert (counted.total, counted.packed) == (0, 1)
    assert "hooks of the program" in counted.notes[0]


def test_what_a_pack_hook_moved_elsewhere_is_counted_where_it_lies():
    x = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = x.exp().sum()
    assert _saved.walk(loss.grad_fn).total == 64 * 4


def test_activation_checkpointing_is_not_recomputed():
    runs: list[int] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.exp().sin().cos()

    x = torch.randn(32, requires_grad=True)
    loss = checkpoint(body, x * 2, use_reentrant=False).sum()
    state = torch.get_rng_state()
    counted = _saved.walk(loss.grad_fn)
    assert runs == [1]
    assert counted.packed == 3
    assert counted.fault is None
    assert torch.equal(state, torch.get_rng_state())
    loss.backward()
    assert runs == [1, 1]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.table = torch.ones(100)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def test_a_custom_function_shows_what_it_saved_and_what_it_keeps_on_ctx():
    x = torch.randn(10, requires_grad=True)
    counted = _saved.walk(Doubled.apply(x).sum().grad_fn)
    assert {(row.where, row.bytes) for row in counted.rows} == {
        ("DoubledBackward", 40),
        ("DoubledBackward (kept on ctx)", 400),
    }


def test_a_graph_of_aot_autograd_is_read():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    x = torch.randn(32, 8)
    compiled = torch.compile(lambda value: model(value).sum(), backend="aot_eager")
    counted = _saved.walk(compiled(x).grad_fn, _saved.storage_keys(model.parameters()))
    assert counted.total >= x.nbytes
    assert counted.fault is None
    torch.compiler.reset()


def test_values_changed_in_place_are_read_without_complaint():
    x = torch.randn(6, requires_grad=True)
    y = x.exp()
    loss = y.sum()
    y.detach().add_(1)
    counted = _saved.walk(loss.grad_fn)
    assert (counted.total, counted.fault) == (24, None)


def test_a_long_graph_is_read_only_so_far_and_says_so():
    x = torch.randn(1, requires_grad=True)
    y = x
    for _ in range(3000):
        y = y.sin()
    counted = _saved.walk(y.grad_fn, nodes=1000)
    assert (counted.nodes, counted.complete) == (1000, False)
    assert counted.total == 1000 * 4
    assert "first 1000 nodes" in counted.notes[0]
    assert not _saved.walk(y.grad_fn, seconds=0.0).complete


def test_sparse_nested_and_opaque_values_do_not_disturb():
    sparse = torch.eye(4).to_sparse().requires_grad_()
    dense = torch.randn(4, 4, requires_grad=True)
    product = torch.sparse.mm(sparse, dense).sum()
    counted = _saved.walk(product.grad_fn)
    assert counted.total == 2 * 4 * 8 + 4 * 4 + 64
    assert counted.fault is None
    dull = (dense.to_mkldnn() * 1).to_dense().sum()
    assert _saved.walk(dull.grad_fn).fault is None


def test_a_tensor_subclass_is_not_asked():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    calls: list[Any] = []
    x = torch.randn(5).as_subclass(Loud).requires_grad_()
    loss = x.exp().sum()
    node = loss.grad_fn
    calls.clear()
    assert _saved.walk(node).total == 20
    assert len(_saved.leaves(node)) == 1
    assert calls == []


@pytest.mark.parametrize("root", [None, (), object(), "loss", 3])
def test_a_root_that_is_no_graph_raises_nothing(root):
    assert _saved.walk(root).total == 0


def test_rows_name_the_nearest_module_and_write_indexes_as_stars():
    book = NameBook()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    params = list(model.parameters())
    names = {id(param): name for param, name in zip(params, book.names_for(params).names, strict=True)}
    loss = model(torch.randn(2, 4)).sum()
    counted = _saved.walk(loss.grad_fn, _saved.storage_keys(params), names=names)
    rows = {(row.where, row.module): row.count for row in counted.rows}
    assert rows == {("TanhBackward0", "*.*"): 3, ("AddmmBackward0", "*.*"): 3}


def test_leaves_are_the_tensors_that_backward_gives_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    unused = nn.Linear(3, 3)
    model[0].bias.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    loss = model(x).sum()
    found = _saved.leaves(loss.grad_fn)
    loss.backward()
    everything = [x, *model.parameters(), *unused.parameters()]
    assert {id(leaf) for leaf in found} == {id(tensor) for tensor in everything if tensor.grad is not None}
    assert len(found) == 4
    assert _saved.leaves(x) == [x]
    assert len(_saved.leaves([loss, x.sum(), unused.weight.sum()])) == 5


def test_leaves_of_a_chain_of_layers_come_in_the_order_of_its_parameters():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(2, 2), nn.Tanh())))
    found = _saved.leaves(model(torch.randn(1, 2)).sum())
    assert [id(leaf) for leaf in found] == [id(param) for param in model.parameters()]


def test_lines_name_the_line_that_saved_and_the_module_that_ran():
    class Wave(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(torch.exp(x))

    model = nn.Sequential(Wave())
    x = torch.randn(100, requires_grad=True)
    watch = _saved.arm_lines(modules={id(module): name for name, module in model.named_modules()})
    assert watch is not None
    loss = model(x).sum()
    row = watch.disarm().rows[0]
    line = inspect.getsourcelines(Wave.forward)[1] + 1
    assert row.where.endswith(f"test_saved.py:{line} forward")
    assert (row.module, row.bytes, row.count) == ("*", 400, 2)
    loss.backward()
    assert x.grad is not None


def test_lines_leave_the_stack_of_hooks_as_it_was():
    watch = _saved.arm_lines()
    assert watch is not None
    assert not watch.gone
    assert _autograd._top_saved_tensors_default_hooks(True) is not None
    watch.disarm()
    assert watch.gone
    assert _autograd._top_saved_tensors_default_hooks(True) is None


def test_lines_are_not_armed_over_hooks_of_the_program():
    with torch.autograd.graph.save_on_cpu():
        assert _saved.arm_lines() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert _saved.arm_lines() is None


def test_hooks_of_the_program_on_top_are_never_popped():
    watch = _saved.arm_lines()
    assert watch is not None
    x = torch.randn(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 1, lambda tensor: tensor):
        top = _autograd._top_saved_tensors_default_hooks(True)
        watch.disarm()
        assert not watch.gone
        assert _autograd._top_saved_tensors_default_hooks(True)[0] is top[0]
        x.exp().sum().backward()
    watch.disarm()
    assert watch.gone


def test_another_thread_cannot_take_the_hooks_away():
    watch = _saved.arm_lines()
    assert watch is not None
    thread = threading.Thread(target=watch.disarm)
    thread.start()
    thread.join()
    assert not watch.gone
    watch.disarm()
    assert watch.gone


def test_torch_func_runs_while_lines_are_armed():
    x = torch.randn(8)
    expected = torch.func.vmap(torch.func.grad(lambda v: v.sin()))(x)
    watch = _saved.arm_lines(hooks_disabled=Tap())
    assert watch is not None
    before = (torch.randn(4, requires_grad=True)).exp()
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda v: v.sin()))(x), expected)
    counted = watch.disarm()
    assert watch.gone
    assert not counted.complete
    assert counted.total == before.nbytes
    assert "stepped aside for torch.func" in counted.notes[0]
    assert _taps.installed() == []


def test_a_value_changed_in_place_is_still_refused_by_backward():
    x = torch.randn(4, requires_grad=True)
    watch = _saved.arm_lines()
    assert watch is not None
    y = x.exp()
    loss = y.sum()
    watch.disarm()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_saved_while_armed_does_not_hold_its_own_graph():
    x = torch.randn(4, requires_grad=True)
    watch = _saved.arm_lines()
    assert watch is not None
    y = x.exp()
    watch.disarm()
    reference = weakref.ref(y)
    del y
    assert reference() is None


def test_gradients_while_armed_are_bitwise_those_without():
    model, forward = lstm()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        forward().backward()
        return [param.grad.clone() for param in model.parameters() if param.grad is not None]

    plain = gradients()
    watch = _saved.arm_lines()
    assert watch is not None
    armed = gradients()
    watch.disarm()
    assert all(torch.equal(a, b) for a, b in zip(plain, armed, strict=True))


def test_double_backward_works_while_armed():
    x = torch.tensor([0.5], requires_grad=True)
    watch = _saved.arm_lines()
    assert watch is not None
    first = torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first, x)[0]
    watch.disarm()
    assert second.item() == pytest.approx(3.0)
