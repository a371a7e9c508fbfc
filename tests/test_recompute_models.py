"""Regions around the blocks of `transformers` models: keyword arguments, tuples, `ModelOutput`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gradctl._recompute import recompute

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def gpt2() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    model, ids = transformers.GPT2LMHeadModel(config), torch.randint(0, 64, (2, 16))
    return model, list(model.transformer.h), {"input_ids": ids, "labels": ids}


def t5() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    config = transformers.T5Config(num_layers=2, d_model=32, d_kv=16, d_ff=64, num_heads=2, vocab_size=64)
    config.decoder_start_token_id = config.pad_token_id = 0
    model, ids = transformers.T5ForConditionalGeneration(config), torch.randint(0, 64, (2, 12))
    return model, [*model.encoder.block, *model.decoder.block], {"input_ids": ids, "labels": ids}


def vit() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    blocks = [m for m in model.modules() if type(m).__name__ == "ViTLayer"]
    return model, blocks, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("where", ["blocks", "model", "both"])
@pytest.mark.parametrize("build", [gpt2, t5, vit])
def test_gradients_are_the_plain_ones(build: Callable[[], Any], where: str) -> None:
    def grads(wrapped: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, blocks, inputs = build()
        assert blocks
        model.train()
        if wrapped:
            for part in (*(blocks if where != "model" else ()), *((model,) if where != "blocks" else ())):
                recompute(part)
        found: list[Tensor] = []
        for _ in range(3):
            model.zero_grad()
            out = model(**inputs)
            out.loss.backward()
            found += [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return found

    plain, ours = grads(False), grads(True)
    assert len(plain) == len(ours)
    assert all(map(torch.equal, ours, plain))
