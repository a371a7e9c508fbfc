"""Freezing models of transformers and adapters of peft, by the names that these give their parts."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import gradctl
from gradctl import FreezeRefused, PatternMatchesNothing


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_adapters_of_peft_are_frozen_by_their_names_and_its_own_flags_are_told() -> None:
    model = peft.get_peft_model(Reader(), peft.LoraConfig(target_modules=["0", "1"], r=2, modules_to_save=["head"]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(PatternMatchesNothing, match=r"did you mean 'base_model.model.encoder.\*'"):
        gradctl.freeze(model, "encoder.*")
    with gradctl.freeze(model, "*.lora_A") as frozen:
        assert len(frozen.names) == 2
        model(torch.randn(3, 4)).sum().backward()
        with_gradient = {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {"lora_B", "modules_to_save"}
        told = {row.name: row.why for row in gradctl.trainable(model).rows}
        base = "base_model.model.encoder.0.base_layer.weight"
        assert told[base] == "requires_grad=False, set outside of gradctl"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_the_two_names_of_a_tied_language_model_are_both_said() -> None:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(FreezeRefused, match=r"transformer.wte.weight is tied to lm_head.weight"):
        gradctl.freeze(model, "transformer.*")
    with gradctl.freeze(model, "transformer.*", "!transformer.wte", "!transformer.h.1", dropout="off") as frozen:
        assert not any("h.1." in name or "wte" in name for name in frozen.names)
        model.train()
        assert not model.transformer.h[0].training
        assert model.transformer.h[1].training
        loss = model(torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradctl.trainable(model).names())
