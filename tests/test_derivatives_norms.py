"""per_sample_norms: the norms of the per-sample gradients, which are never formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradctl
from sampled_nets import KINDS, B, D, Of, T, alone, build, ce, norms
from test_derivatives_per_sample import summed, weighted

FORMED = {"weight norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}}


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_gradients_of_each_sample_alone(kind: str) -> None:
    model, inputs, targets = build(kind)
    expected = norms(alone(model, ce, inputs, targets))
    methods: dict[str, str] = {}
    for _ in range(2):
        found = gradctl.per_sample_norms(model, ce, (inputs, targets), methods=methods)
        assert float(((found - expected) / expected).abs().max()) < 1e-12
    assert {name for name, how in methods.items() if how.startswith("formed")} == FORMED.get(kind, set())


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tied", "lstm", "weight norm"])
def test_norms_by_parameter_are_those_of_each_parameter(kind: str) -> None:
    model, inputs, targets = build(kind)
    found = gradctl.per_sample_norms(model, summed, (inputs, targets), reduction="sum", per="parameter")
    expected = alone(model, summed, inputs, targets)
    assert list(found) == list(expected)
    for name, g in expected.items():
        assert float((found[name] - g.flatten(1).norm(dim=1)).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer", "gru", "tied"])
def test_norms_in_float32_are_as_near_as_rounding(kind: str) -> None:
    model, inputs, targets = build(kind)
    expected = norms(alone(model, ce, inputs, targets))
    narrow = inputs.float() if inputs.is_floating_point() else inputs
    found = gradctl.per_sample_norms(model.float(), ce, (narrow, targets))
    assert float(((found.double() - expected) / expected).abs().max()) < 5e-6


def test_norms_in_bfloat16_find_the_owner_of_every_row() -> None:
    model, x, y = build("time first")
    methods: dict[str, str] = {}
    found = gradctl.per_sample_norms(model.bfloat16(), ce, (x.bfloat16(), y), methods=methods)
    expected = norms(alone(model.float(), ce, x.bfloat16().float(), y))
    assert float(((found.float() - expected) / expected).abs().max()) < 0.1
    assert not any(how.startswith("formed") for how in methods.values())


def test_norms_under_autocast_are_those_of_the_gradients_there() -> None:
    model, x, y = build("mlp")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradctl.per_sample_norms(model, ce, (x, y))
        expected = norms(gradctl.per_sample_grads(model, ce, (x, y), method="loop"))
    assert float(((found - expected) / expected).abs().max()) < 5e-3


@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_samples_first_or_last_are_told_apart_at_every_size(size: int, steps: int, last: bool, bias: bool) -> None:
    torch.manual_seed(7 * size + steps)

    def forward(parts: nn.ModuleList, x: Tensor) -> Tensor:
        out = parts[0](x.transpose(0, 1) if last else x).tanh()
        return parts[1](out.transpose(0, 1) if last else out).mean(1)

    model = Of(forward, nn.Linear(3, 4, bias=bias), nn.Linear(4, 2, bias=bias)).double()
    x, y = torch.randn(size, steps, 3).double(), torch.randint(2, (size,))
    found = gradctl.per_sample_norms(model, ce, (x, y), check="off")
    assert float((found - norms(alone(model, ce, x, y))).abs().max()) < 1e-12


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_single_position_of_a_sequence_is_told_apart(place: int) -> None:
    torch.manual_seed(0)  # B + 1 positions: the rows of either order agree with both at position 0
    model = Of(lambda p, x: p[1](p[0](x)[:, place].tanh()), nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(4, 5, 3).double(), torch.randint(2, (4,))
    found = gradctl.per_sample_norms(model, ce, (x, y), check="off")
    assert float((found - norms(alone(model, ce, x, y))).abs().max()) < 1e-12


def test_rows_in_no_order_find_their_samples() -> None:
    torch.manual_seed(0)
    model, lengths = (
        Of(lambda p, x, n: _packed(p, x, n), nn.LSTM(D, 5, batch_first=True), nn.Linear(5, 3)),
        [7, 5, 5, 3, 2, 1],
    )
    model = model.double()
    x, y = torch.randn(B, T, D).double(), torch.randint(3, (B,))
    found = gradctl.per_sample_norms(model, ce, ((x, torch.tensor(lengths)), y))
    expected = norms(alone(model, ce, (x, torch.tensor(lengths)), y))
    assert float(((found - expected) / expected).abs().max()) < 1e-12


def _packed(parts: nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return parts[1](parts[0](packed)[1][0][-1])


# ---- memory


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            # Views and broadcasts hold no memory of their own.
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.untyped_storage().nbytes() // one.element_size())
        return out


def test_no_per_sample_gradient_of_a_layer_is_formed() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.randn(128, 256), torch.randint(10, (128,))
    with Largest() as seen:
        gradctl.per_sample_norms(model, ce, (x, y))
    assert seen.numel <= sum(p.numel() for p in model.parameters())  # all per-sample gradients: 128 times as many


def test_no_per_sample_gradient_of_a_convolution_is_formed() -> None:
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 10))
    x, y = torch.randn(64, 8, 8, 8), torch.randint(10, (64,))
    with Largest() as seen:
        gradctl.per_sample_norms(model, ce, (x, y), check="off")
    assert seen.numel < 64 * 64 * 8 * 9


def test_no_table_of_tokens_is_formed_for_each_sample() -> None:
    model = Of(lambda p, i: F.linear(p[0](i), p[0].weight).transpose(1, 2), nn.Embedding(500, 16))
    tokens = torch.randint(500, (32, 5))
    with Largest() as seen:
        gradctl.per_sample_norms(model, ce, (tokens, tokens))
    assert seen.numel <= 32 * 5 * 500  # the logits


# ---- refusals


def test_batch_norm_in_training_mode_has_no_norms() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 3))
    with pytest.raises(gradctl.NotPerSample, match=r"1 \(BatchNorm1d\) normalises with the statistics of the batch"):
        gradctl.per_sample_norms(model, ce, (torch.randn(B, D), torch.randint(3, (B,))))


def test_a_module_that_mixes_samples_has_no_norms() -> None:
    model = Of(
        lambda p, x: p[2](p[1](p[0](x)).tanh()), nn.Linear(D, D), Of(lambda _, x: x - x.mean(0)), nn.Linear(D, 3)
    )
    with pytest.raises(gradctl.NotPerSample, match=r"parts\.1 \(Of\) mixes the samples of the batch"):
        gradctl.per_sample_norms(model, ce, (torch.randn(B, D), torch.randint(3, (B,))))


def test_a_wrong_reduction_has_no_norms() -> None:
    model, x, y = build("mlp")
    with pytest.raises(gradctl.UsageError, match="loss_fn sums over its batch"):
        gradctl.per_sample_norms(model, summed, (x, y))
    with pytest.raises(gradctl.UsageError, match="loss_fn averages over its batch"):
        gradctl.per_sample_norms(model, ce, (x, y), reduction="sum")
    with pytest.raises(gradctl.UsageError, match="no plain mean or sum over the samples"):
        gradctl.per_sample_norms(model, weighted, (x, y))
    y[2] = -100
    with pytest.raises(gradctl.UsageError, match="no plain mean or sum over the samples"):
        gradctl.per_sample_norms(model, ce, (x, y))


def test_norms_of_shares_are_those_of_the_shares() -> None:
    model, x, y = build("mlp")
    found = gradctl.per_sample_norms(model, weighted, (x, y), reduction="share")
    shares = gradctl.per_sample_grads(model, weighted, (x, y), reduction="share", method="loop")
    assert float((found - norms(shares)).abs().max()) < 1e-12


def test_other_bad_input_of_norms_has_its_sentence() -> None:
    data = torch.randn(B, D), torch.randint(3, (B,))
    with pytest.raises(gradctl.UsageError, match="per is 'sample' or 'parameter', got 'layer'"):
        gradctl.per_sample_norms(nn.Linear(D, 3), ce, data, per="layer")  # type: ignore[call-overload]
    with pytest.raises(gradctl.UsageError, match="reduction is"):
        gradctl.per_sample_norms(nn.Linear(D, 3), ce, data, reduction="none")  # type: ignore[call-overload]
    with pytest.raises(gradctl.UsageError, match="check is"):
        gradctl.per_sample_norms(nn.Linear(D, 3), ce, data, check="never")  # type: ignore[call-overload]


def test_a_weight_in_the_loss_counts_too() -> None:
    model, x, y = build("mlp")

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return ce(outputs, targets) + 0.1 * model[0].weight.square().sum()

    expected = norms(alone(model, decayed, x, y))
    found = gradctl.per_sample_norms(model, decayed, (x, y))
    assert float(((found - expected) / expected).abs().max()) < 1e-12


# ---- what stays as it was


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_norms_leave_generators_and_backends_as_one_plain_call_does(kind: str) -> None:
    model, x, y = build(kind)
    model = Of(lambda p, x: p[1](p[0](x)), model.float(), nn.Dropout(0.5))
    start, onednn = torch.get_rng_state(), torch.backends.mkldnn.enabled
    model(x.float())
    plain = torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(start)
        gradctl.per_sample_norms(model, ce, (x.float(), y))
        assert torch.equal(torch.get_rng_state(), plain)
    assert torch.backends.mkldnn.enabled is onednn
    assert all(p.grad is None for p in model.parameters())


def test_norms_with_dropout_are_those_of_the_masks_of_the_plain_call() -> None:
    model = nn.Sequential(nn.Linear(D, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    x, y = torch.randn(B, D).double(), torch.randint(3, (B,))
    start = torch.get_rng_state()
    outputs = model(x)
    losses = F.cross_entropy(outputs, y, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    torch.set_rng_state(start)
    assert float((gradctl.per_sample_norms(model, ce, (x, y)) - expected).abs().max()) < 1e-12


def test_a_weight_that_begins_at_zero_is_seen_when_its_gradient_wakes() -> None:
    model = Of(lambda p, x: p[1](p[0](x)), nn.Linear(D, 5), nn.Linear(5, 3)).double()
    x, y = torch.randn(B, D).double(), torch.randint(3, (B,))
    nn.init.zeros_(model.parts[1].weight)
    for _ in range(2):
        expected = norms(alone(model, ce, x, y))
        assert float((gradctl.per_sample_norms(model, ce, (x, y)) - expected).abs().max()) < 1e-12
        nn.init.normal_(model.parts[1].weight)
