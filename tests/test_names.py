"""Names are those of `named_parameters`, found without the model, without running its code, holding nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim.swa_utils import AveragedModel

from gradctl._names import NameBook


@pytest.fixture
def book():
    book = NameBook()
    book.start()
    yield book
    book.stop()
    assert book.faults == []


class Block(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleDict({"in": nn.Linear(width, width), "out": nn.Linear(width, width, bias=False)})
        self.extra = nn.ParameterList([torch.zeros(2), torch.zeros(2)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)


class Other(Net):
    pass


def expected(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def hidden(model: nn.Module) -> list[torch.Tensor]:
    """The parameters of a model that only a slotted object holds: no variable leads to it."""
    return list(model.parameters())


class Slot:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model


trees = st.recursive(
    st.sampled_from(["linear", "norm", "block", "empty"]),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "module", "0"]), inner, min_size=1, max_size=3),
    max_leaves=8,
)


def build(tree: Any) -> nn.Module:
    if isinstance(tree, dict):
        module = nn.Module()
        for name, inner in tree.items():
            module.add_module(name, build(inner))
        return module
    return {"linear": nn.Linear(2, 3), "norm": nn.LayerNorm(2), "block": Block(2), "empty": nn.Identity()}[tree]


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_names_of_any_module_tree_are_those_of_named_parameters(tree):
    book = NameBook()
    book.start()
    try:
        root = nn.Module()
        root.add_module("first", build(tree))
        root.add_module("second", nn.Linear(1, 1))
        naming = book.names_for(list(root.parameters()))
    finally:
        book.stop()
    assert naming.names == expected(root)
    assert naming.how == "registration"


def test_a_copied_model_is_found_through_the_variable_that_holds_it(book):
    model = copy.deepcopy(Block())
    naming = book.names_for(list(model.parameters()))
    assert naming.names == expected(model)
    assert naming.roots == [("Block", 6)]


def test_layers_copied_into_a_registered_model_need_no_scan(book):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    naming = book.names_for(list(model.parameters()))
    assert naming.names == expected(model)
    assert naming.how == "registration"


def test_an_unpickled_model_that_no_variable_leads_to_is_found_by_a_scan(book):
    slot = Slot(pickle.loads(pickle.dumps(Block())))
    naming = book.names_for(hidden(slot.model))
    assert naming.names == expected(slot.model)
    assert naming.how == "scan"


def test_a_model_built_before_we_listened_is_found():
    slot = Slot(Block())
    book = NameBook()
    naming = book.names_for(hidden(slot.model))
    assert naming.names == expected(slot.model)
    assert naming.how == "scan"


def test_objects_hidden_by_gc_freeze_are_reported_as_not_named():
    slot = Slot(Block())
    gc.collect()
    gc.freeze()
    try:
        naming = NameBook().names_for(hidden(slot.model))
    finally:
        gc.unfreeze()
    assert naming.how == "none"
    assert naming.names == [None] * 6


def test_a_scan_that_found_nothing_is_not_repeated_at_once(monkeypatch):
    scans = []
    original = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda *args: scans.append(1) or original(*args))
    book = NameBook()
    for _ in range(5):
        book.names_for([nn.Parameter(torch.zeros(2))])
    assert len(scans) == 1


def test_a_tied_parameter_keeps_its_first_name_and_the_others_as_aliases(book):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    naming = book.names_for(list(model.parameters()))
    assert naming.names == ["embed.weight"]
    assert naming.aliases == {"embed.weight": ("head.weight",)}


class Parallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


# The first call makes torch itself patch LBFGS.step for good: before any test looks for leaks.
compiled(nn.Identity())


@pytest.mark.parametrize("wrap", [Parallel, compiled, lambda module: Parallel(compiled(module))])
def test_the_names_that_wrappers_add_are_taken_off(book, wrap):
    model = Block()
    wrapped = wrap(model)
    naming = book.names_for(list(wrapped.parameters()))
    assert naming.names == expected(model)
    assert naming.roots == [("Block", 6)]


def test_a_compiled_or_recomputed_layer_inside_keeps_its_plain_name(book):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    names = expected(model)
    model[1] = compiled(model[1])
    model[2] = checkpoint_wrapper(model[2])
    assert book.names_for(list(model.parameters())).names == names


def test_two_trained_models_with_equal_names_are_told_apart_by_their_variables(book):
    generator, critic = Net(), Other()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (generator, critic)]
    names = [book.names_for(optimizer.param_groups[0]["params"]).names for optimizer in optimizers]
    assert names == [["generator.net.weight", "generator.net.bias"], ["critic.net.weight", "critic.net.bias"]]


def test_two_models_in_one_optimizer_are_told_apart(book):
    encoder, decoder = Net(), Net()
    params = [*encoder.parameters(), *decoder.parameters()]
    assert book.names_for(params).names == [
        "encoder.net.weight",
        "encoder.net.bias",
        "decoder.net.weight",
        "decoder.net.bias",
    ]


def test_models_that_no_variable_names_are_told_apart_by_class_and_number(book):
    hold = [Slot(Net()), Slot(Net()), Slot(Other())]
    params = [param for slot in hold for param in slot.model.parameters()]
    names = book.names_for(params).names
    assert sorted(name for name in names if name.endswith("bias")) == [
        "Net#2.net.bias",
        "Net.net.bias",
        "Other.net.bias",
    ]


def test_a_loop_variable_does_not_name_the_last_model_of_a_list(book):
    nets = [Net() for _ in range(2)]
    names = []
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        names += book.names_for(optimizer.param_groups[0]["params"]).names
    assert names[2:] == ["nets.1.net.weight", "nets.1.net.bias"]
    assert len(set(names)) == 4


def test_parameters_that_are_variables_need_no_scan(book, monkeypatch):
    monkeypatch.delattr(gc, "get_objects")
    theta, scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(1))
    assert book.names_for([theta, scale]).names == ["theta", "scale"]


def test_modules_in_a_plain_list_are_named_by_the_list(book):
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(1, 1), nn.Linear(1, 1)]

    model = Hidden()
    params = [param for layer in model.layers for param in layer.parameters()]
    names = book.names_for(params).names
    assert names == ["model.layers.0.weight", "model.layers.0.bias", "model.layers.1.weight", "model.layers.1.bias"]


def test_an_averaged_copy_or_a_frozen_teacher_changes_no_name(book):
    student = Net()
    teacher, average = copy.deepcopy(student).requires_grad_(False), AveragedModel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    names = book.names_for(optimizer.param_groups[0]["params"]).names
    assert names == expected(student)
    assert len(expected(teacher)) == len(expected(average.module)) == 2


def test_a_list_that_holds_the_layers_of_the_model_as_well_changes_no_name(book):
    layers = nn.ModuleList(Net() for _ in range(3))
    model = nn.Sequential(nn.Linear(2, 2), *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert book.names_for(optimizer.param_groups[0]["params"]).names == expected(model)


def test_names_stay_the_same_on_every_request(book):
    first, second = Net(), Net()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    requests = [[book.names_for(o.param_groups[0]["params"]).names for o in optimizers] for _ in range(3)]
    assert requests[0] == requests[1] == requests[2]


def test_the_outermost_of_nested_models_gives_the_names(book):
    class System(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.loss = nn.CrossEntropyLoss()

    inner = Net()
    system = System(inner)
    assert book.names_for(list(inner.parameters())).names == expected(system)


def test_modules_that_hold_each_other_are_still_named(book):
    parent, child = nn.Module(), Net()
    parent.child = child
    child.parent = parent
    names = book.names_for(list(child.parameters())).names
    assert names in (["net.weight", "net.bias"], ["child.net.weight", "child.net.bias"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_model_is_named(book):
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    assert book.names_for(list(model.parameters())).names == expected(model)


def test_bare_tensors_are_named_by_their_variables(book):
    weight = torch.zeros(3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    params = [weight, bias]
    assert book.names_for(params).names == ["weight", "bias"]


def test_bare_tensors_are_named_by_what_holds_them(book):
    class Learner:
        def __init__(self) -> None:
            self.table = torch.zeros(3, requires_grad=True)
            self.layers = [{"w": torch.zeros(1, requires_grad=True)} for _ in range(2)]

    learner = Learner()
    for layer in learner.layers:
        w = layer["w"]
        w.sum()
    del layer, w
    naming = book.names_for([learner.table, *(layer["w"] for layer in learner.layers)])
    assert naming.names == ["learner.table", "learner.layers.0.w", "learner.layers.1.w"]


def test_a_name_that_the_program_gave_is_used_for_a_tensor_that_nothing_else_names(book):
    naming = book.names_for([torch.zeros(1), torch.zeros(1)], given=["theta", None])
    assert naming.names == ["theta", None]


def test_no_code_of_the_module_runs(book):
    class Touchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("named_parameters was called")

        def __getattr__(self, name: str) -> Any:
            if name in ("_modules", "_parameters", "inner", "module"):
                raise AssertionError(f"{name} was read")
            return super().__getattr__(name)

        @property
        def device(self) -> Any:
            raise AssertionError("a property was read")

        def __len__(self) -> int:
            raise AssertionError("len was taken")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = nn.Module.__hash__

    class Proxy:
        @property
        def __class__(self) -> Any:  # type: ignore[override]
            raise AssertionError("the class of a lazy proxy was asked for")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} of a lazy proxy was read")

    proxy = Proxy()
    model = Touchy()
    params = list(nn.Module.__getattr__(model, "inner").parameters())
    naming = NameBook().names_for(params)
    assert naming.names == ["inner.weight", "inner.bias"]
    assert book.names_for(params).names == ["inner.weight", "inner.bias"]
    assert type(proxy) is Proxy


def test_nothing_is_kept_alive(book):
    model = Block()
    params = list(model.parameters())
    book.names_for(params)
    references = [weakref.ref(thing) for thing in (model, model.layers, params[0])]
    del model, params
    assert [reference() for reference in references] == [None, None, None]


def test_reading_the_variables_of_a_function_leaves_them_to_it():
    class Big:
        pass

    def train() -> Any:
        weight = torch.zeros(2, requires_grad=True)
        batch = Big()
        reference = weakref.ref(batch)
        assert NameBook().names_for([weight]).names == ["weight"]
        del batch
        return reference()

    assert train() is None


def test_a_snapshot_of_locals_that_the_program_took_does_not_change():
    def train() -> tuple[int, int]:
        width = 3
        config = locals()
        before = len(config)
        weight = torch.zeros(width, requires_grad=True)
        NameBook().names_for([weight])
        return before, len(config)

    before, after = train()
    assert before == after == 1


def test_registration_from_many_threads_is_remembered(book):
    models: list[nn.Module] = []

    def work() -> None:
        models.extend(Slot(Block()).model for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = Slot(nn.ModuleList(models))
    naming = book.names_for(hidden(holder.model))
    assert naming.names == expected(holder.model)
    assert naming.how == "registration"


def test_stop_takes_the_hooks_back():
    before = (
        dict(module_hooks._global_parameter_registration_hooks),
        dict(module_hooks._global_module_registration_hooks),
    )
    book = NameBook()
    book.start()
    book.start()
    assert len(module_hooks._global_parameter_registration_hooks) == len(before[0]) + 1
    book.stop()
    after = (
        dict(module_hooks._global_parameter_registration_hooks),
        dict(module_hooks._global_module_registration_hooks),
    )
    assert after == before


def test_parameters_replaced_after_the_first_request_are_named_again(book):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    book.names_for(list(model.parameters()))
    model[1] = nn.Linear(2, 3)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert book.names_for(list(model.parameters())).names == expected(model)


def test_modules_are_named_as_named_modules_does(book):
    model = Block()
    book.names_for(list(model.parameters()))
    found = book.modules()
    for name, module in model.named_modules():
        assert found[id(module)] == (name or "Block")


def test_a_model_loaded_from_a_file_is_named(book):
    file = io.BytesIO()
    torch.save(Block(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert book.names_for(list(loaded.parameters())).names == expected(loaded)
