"""per_sample_grads: each row is that sample's gradient, or the call refuses and names why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradctl
from sampled_nets import KINDS, B, D, Of, alone, build, ce


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(found) == list(expected)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_the_gradient_of_that_sample_alone(kind: str) -> None:
    model, inputs, targets = build(kind)
    found = gradctl.per_sample_grads(model, ce, (inputs, targets))
    assert worst(found, alone(model, ce, inputs, targets)) < 1e-12
    later = gradctl.per_sample_grads(model, ce, (inputs, targets))
    assert worst(later, found) < 1e-12
    assert later.method == found.method


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_add_up_to_the_gradient_of_the_batch(kind: str) -> None:
    model, inputs, targets = build(kind)
    found = gradctl.per_sample_grads(model, summed, (inputs, targets), reduction="sum")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    whole = torch.autograd.grad(
        summed(model(*arguments), targets), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    scale = max(float(g.abs().max()) for g in whole)
    for rows, g in zip(found.values(), whole, strict=True):
        assert float((rows.sum(0) - g).abs().max()) < 1e-12 * max(scale, 1)


@pytest.mark.parametrize("method", ["graph", "vmap", "loop"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer", "tied"])
def test_every_method_finds_the_same(kind: str, method: Any) -> None:
    model, inputs, targets = build(kind)
    found = gradctl.per_sample_grads(model, ce, (inputs, targets), method=method)
    assert found.method == method
    assert worst(found, alone(model, ce, inputs, targets)) < 1e-12


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 1, 2]), st.sampled_from(["graph", "vmap"]))
@settings(max_examples=15)
def test_any_batch_size_and_chunk_gives_the_same_rows(size: int, wide: int, chunk: int | None, method: Any) -> None:
    torch.manual_seed(size)
    model = nn.Sequential(nn.Linear(wide, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(size, wide).double(), torch.randint(2, (size,))
    found = gradctl.per_sample_grads(model, ce, (x, y), chunk=chunk, method=method)
    assert worst(found, alone(model, ce, x, y)) < 1e-12


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer", "lstm"])
def test_float32_is_as_near_as_rounding(kind: str) -> None:
    model, inputs, targets = build(kind)
    expected = alone(model, ce, inputs, targets)
    found = gradctl.per_sample_grads(model.float(), ce, (inputs.float(), targets))
    scale = max(float(g.abs().max()) for g in expected.values())
    assert max(float((found[n].double() - g).abs().max()) for n, g in expected.items()) < 2e-6 * scale


def test_vmap_cannot_run_it_and_the_exact_loop_does() -> None:
    model, inputs, targets = build("modern")
    torch.nn.utils.parametrizations.weight_norm(model.layer)  # which the graph method has no rule for
    found = gradctl.per_sample_grads(model, ce, (inputs, targets))
    assert found.method == "loop"
    assert "vmap" in found.why
    assert worst(found, alone(model, ce, inputs, targets)) < 1e-12
    assert gradctl.per_sample_grads(model, ce, (inputs, targets)).why == found.why


def test_a_method_that_cannot_is_refused_by_name() -> None:
    model, inputs, targets = build("modern")
    with pytest.raises(gradctl.NotPerSample, match="vmap cannot run this model"):
        gradctl.per_sample_grads(model, ce, (inputs, targets), method="vmap")
    model, inputs, targets = build("weight norm")
    with pytest.raises(gradctl.NotPerSample, match=r"original0 is used by WeightNormInterfaceBackward"):
        gradctl.per_sample_grads(model, ce, (inputs, targets), method="graph")


# ---- what is wrong in silence elsewhere


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_batch_norm_in_training_mode_is_refused_by_module(method: Any) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 3))
    data = torch.randn(B, D), torch.randint(3, (B,))
    with pytest.raises(gradctl.NotPerSample) as caught:
        gradctl.per_sample_grads(model, ce, data, method=method)
    assert caught.value.headline == "1 (BatchNorm1d) normalises with the statistics of the batch"
    assert "training mode" in str(caught.value.why)
    gradctl.per_sample_grads(model.eval(), ce, data, method=method)


def test_batch_norm_without_statistics_is_refused_in_eval_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(D, track_running_stats=False), nn.Linear(D, 3)).eval()
    with pytest.raises(gradctl.NotPerSample, match=r"0 \(BatchNorm1d\)"):
        gradctl.per_sample_grads(model, ce, (torch.randn(B, D), torch.randint(3, (B,))))


@pytest.mark.parametrize("reduction", ["mean", "share"])
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_a_module_that_mixes_samples_is_named(method: Any, reduction: Any) -> None:
    model = Of(
        lambda p, x: p[2](p[1](p[0](x)).tanh()), nn.Linear(D, D), Of(lambda _, x: x - x.mean(0)), nn.Linear(D, 3)
    )
    with pytest.raises(gradctl.NotPerSample) as caught:
        gradctl.per_sample_grads(
            model, ce, (torch.randn(B, D), torch.randint(3, (B,))), method=method, reduction=reduction
        )
    assert caught.value.headline == "parts.1 (Of) mixes the samples of the batch"


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_a_reduction_that_the_loss_does_not_do_is_an_error(method: Any) -> None:
    model, x, y = build("mlp")
    with pytest.raises(gradctl.UsageError, match="reduction='mean' was said, but loss_fn sums over its batch"):
        gradctl.per_sample_grads(model, summed, (x, y), method=method)
    with pytest.raises(gradctl.UsageError, match="reduction='sum' was said, but loss_fn averages over its batch"):
        gradctl.per_sample_grads(model, ce, (x, y), reduction="sum", method=method)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 5.0]).to(outputs))


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_class_weights_with_a_mean_ask_which_is_meant(method: Any) -> None:
    model, x, y = build("mlp")
    with pytest.raises(gradctl.UsageError, match="no plain mean or sum over the samples") as caught:
        gradctl.per_sample_grads(model, weighted, (x, y), method=method)
    assert "reduction='share'" in str(caught.value.fix)
    whole = torch.autograd.grad(weighted(model(x), y), list(model.parameters()))
    shares = gradctl.per_sample_grads(model, weighted, (x, y), reduction="share", method=method)
    assert max(float((s.sum(0) - g).abs().max()) for s, g in zip(shares.values(), whole, strict=True)) < 1e-12
    by_itself = gradctl.per_sample_grads(model, weighted, (x, y), check="off", method=method)
    if method != "auto":
        assert worst(by_itself, alone(model, weighted, x, y)) < 1e-12


def test_ignored_rows_ask_which_is_meant() -> None:
    model, x, y = build("mlp")
    y[2] = -100
    with pytest.raises(gradctl.UsageError, match="no plain mean or sum over the samples"):
        gradctl.per_sample_grads(model, ce, (x, y))
    shares = gradctl.per_sample_grads(model, ce, (x, y), reduction="share")
    assert all(float(rows[2].abs().max()) == 0 for rows in shares.values())


def test_a_loss_between_samples_has_shares() -> None:
    model, x, y = build("mlp")

    def contrast(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs @ outputs.t()).logsumexp(1).mean()

    with pytest.raises(gradctl.UsageError, match="no plain mean"):
        gradctl.per_sample_grads(model, contrast, (x, y))
    shares = gradctl.per_sample_grads(model, contrast, (x, y), reduction="share")
    whole = torch.autograd.grad(contrast(model(x), y), list(model.parameters()))
    assert max(float((s.sum(0) - g).abs().max()) for s, g in zip(shares.values(), whole, strict=True)) < 1e-12


@pytest.mark.parametrize("method", ["graph", "vmap"])
def test_every_sample_has_a_dropout_mask_of_its_own(method: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.ones(B, 64).double()
    found = gradctl.per_sample_grads(model, lambda o, _: o.mean(), (x, torch.zeros(B)), method=method)
    masks = found["1.weight"][:, 0] != 0
    assert len({tuple(row.tolist()) for row in masks}) == B


@pytest.mark.parametrize("method", ["graph", "vmap", "loop"])
@pytest.mark.parametrize("check", ["first", "off"])
def test_generators_end_where_one_plain_call_leaves_them(method: Any, check: Any) -> None:
    model = nn.Sequential(nn.Linear(D, 9), nn.Dropout(0.5), nn.Linear(9, 3), nn.Dropout(0.1))
    data = torch.randn(B, D), torch.randint(3, (B,))
    start = torch.get_rng_state()
    model(data[0])
    plain = torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(start)
        gradctl.per_sample_grads(model, ce, data, method=method, check=check)
        assert torch.equal(torch.get_rng_state(), plain)


def test_shares_with_masks_that_cannot_be_drawn_again_are_refused() -> None:
    model = nn.Sequential(nn.Linear(D, 9), nn.Dropout(0.5), nn.Linear(9, 9), nn.Dropout(0.5), nn.Linear(9, 3))
    data = torch.randn(B, D), torch.randint(3, (B,))
    for check in ("first", "off"):
        with pytest.raises(gradctl.NotPerSample, match="dropout masks of the batch"):
            gradctl.per_sample_grads(model, ce, data, reduction="share", method="loop", check=check)
    start = torch.get_rng_state()
    whole = torch.autograd.grad(ce(model(data[0]), data[1]), list(model.parameters()))
    torch.set_rng_state(start)
    found = gradctl.per_sample_grads(model, ce, data, reduction="share")
    assert max(float((s.sum(0) - g).abs().max()) for s, g in zip(found.values(), whole, strict=True)) < 1e-6


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_nothing_of_the_model_is_touched(method: Any) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    model = nn.Sequential(Counting(), nn.Dropout(0.5))
    model[0].layer.weight.grad = torch.full((3, D), 7.0)
    gradctl.per_sample_grads(model, ce, (torch.randn(B, D), torch.randint(3, (B,))), method=method)
    assert float(model[0].calls) == 0
    assert model.training
    assert model[1].training
    assert torch.equal(model[0].layer.weight.grad, torch.full((3, D), 7.0))
    assert model[0].layer.bias.grad is None


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = Of(
        lambda p, x: p[1](checkpoint(p[0], x.requires_grad_(), use_reentrant=True)), nn.Linear(D, D), nn.Linear(D, 3)
    )
    with pytest.raises(gradctl.NotPerSample, match="reentrant activation checkpointing"):
        gradctl.per_sample_grads(model, ce, (torch.randn(B, D), torch.randint(3, (B,))))


def test_a_gradient_hook_that_vmap_ignores_is_named() -> None:
    model, x, y = build("weight norm")
    handle = model[2].weight.register_hook(lambda g: g * 0)
    with pytest.raises(gradctl.NotPerSample, match=r"2\.weight has a gradient hook"):
        gradctl.per_sample_grads(model, ce, (x, y), method="vmap")
    found = gradctl.per_sample_grads(model, ce, (x, y))
    assert found.method == "loop"
    assert float(found["2.weight"].abs().max()) == 0
    handle.remove()


def test_a_weight_that_the_loss_itself_takes_is_differentiated_too() -> None:
    model, x, y = build("mlp")

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return ce(outputs, targets) + 0.1 * model[0].weight.square().sum()

    found = gradctl.per_sample_grads(model, decayed, (x, y))
    assert (found.method, found.why) == ("loop", "vmap found other gradients than plain autograd")
    assert worst(found, alone(model, decayed, x, y)) < 1e-12


def test_sparse_embeddings_have_dense_rows() -> None:
    model = Of(lambda p, i: p[1](p[0](i).mean(1)), nn.Embedding(11, D, sparse=True), nn.Linear(D, 3)).double()
    tokens, y = torch.randint(11, (B, 5)), torch.randint(3, (B,))
    found = gradctl.per_sample_grads(model, ce, (tokens, y))
    dense = Of(model.call, nn.Embedding(11, D), nn.Linear(D, 3)).double()
    dense.load_state_dict(model.state_dict())
    assert worst(found, alone(dense, ce, tokens, y)) < 1e-12


def test_frozen_parameters_are_left_out() -> None:
    model, x, y = build("mlp")
    model[0].requires_grad_(False)
    for method in ("graph", "vmap", "loop"):
        assert list(gradctl.per_sample_grads(model, ce, (x, y), method=method)) == ["2.weight", "2.bias"]


def test_it_works_where_the_caller_has_switched_recording_off() -> None:
    model, x, y = build("mlp")
    expected = alone(model, ce, x, y)
    with torch.no_grad():
        for method in ("graph", "vmap", "loop"):
            assert worst(gradctl.per_sample_grads(model, ce, (x, y), method=method), expected) < 1e-12


def test_inputs_may_be_named_and_nested() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, 3)

        def forward(self, *, pair: tuple[Tensor, Tensor], scale: float) -> dict[str, Tensor]:
            return {"logits": self.layer(pair[0] + scale * pair[1])}

    model, a, b, y = Net().double(), torch.randn(B, D).double(), torch.randn(B, D).double(), torch.randint(3, (B,))
    inputs = {"pair": (a, b), "scale": 0.5}
    found = gradctl.per_sample_grads(model, lambda o, t: ce(o["logits"], t), (inputs, y))
    expected = alone(model.layer, ce, a + 0.5 * b, y)
    assert worst({n.removeprefix("layer."): g for n, g in found.items()}, expected) < 1e-12


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ((torch.zeros(0, D), torch.zeros(0)), "the batch has no samples"),
        ((torch.zeros(4, D), torch.zeros(3)), "tensor 1 of the batch has 3 rows, the first has 4"),
        ((), "the batch is empty"),
        ((3.0, "labels"), "the batch holds no tensor with rows"),
        ((nn.utils.rnn.pack_sequence([torch.zeros(2, D)]), torch.zeros(1)), "a PackedSequence has no rows"),
    ],
)
def test_a_batch_without_rows_is_refused(batch: Any, sentence: str) -> None:
    with pytest.raises(gradctl.UsageError, match=sentence):
        gradctl.per_sample_grads(nn.Linear(D, 3), ce, batch)


def test_other_bad_input_has_its_sentence() -> None:
    model, data = nn.Linear(D, 3), (torch.randn(B, D), torch.randint(3, (B,)))
    call = gradctl.per_sample_grads
    with pytest.raises(gradctl.UsageError, match=r"loss_fn returned shape \[6\], not one number"):
        call(model, lambda o, t: F.cross_entropy(o, t, reduction="none"), data)
    with pytest.raises(gradctl.UsageError, match="per_sample_grads takes a module, got function"):
        call(lambda x: x, ce, data)  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match="no parameter of the model takes gradients"):
        call(nn.Linear(D, 3).requires_grad_(False), ce, data)
    with pytest.raises(gradctl.UsageError, match="reduction is 'mean', 'sum' or 'share', got 'none'"):
        call(model, ce, data, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match=r"method is .* got 'hooks'"):
        call(model, ce, data, method="hooks")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match=r"check is .* got 'never'"):
        call(model, ce, data, check="never")  # type: ignore[arg-type]
    with pytest.raises(gradctl.UsageError, match="chunk is the most samples at a time, got 0"):
        call(model, ce, data, chunk=0)


def test_a_class_weight_that_comes_later_is_caught_by_check_always() -> None:
    model, x, y = build("mlp")
    gradctl.per_sample_grads(model, ce, (x, y))
    y[1] = -100
    with pytest.raises(gradctl.UsageError, match="no plain mean"):
        gradctl.per_sample_grads(model, ce, (x, y), check="always")
