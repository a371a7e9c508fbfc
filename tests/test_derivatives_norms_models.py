"""per_sample_norms on models of transformers: tied tables, learned positions, attention masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gradctl
from sampled_nets import ce, norms

# Looked up here: what they import on first use would count as a leak of the test.
GPT2, Bert = transformers.GPT2LMHeadModel, transformers.BertForSequenceClassification


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_models_of_transformers_need_no_gradient_formed(kind: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(100, (5, 12))
    if kind == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=32, **none))
        data: Any = ({"input_ids": tokens}, tokens)

        def loss_fn(out: Any, y: Tensor) -> Tensor:
            return ce(out.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = Bert(transformers.BertConfig(**sizes, vocab_size=100, num_labels=3)).eval()
        mask = (torch.arange(12) < torch.tensor([[12], [6], [3], [12], [5]])).long()
        data = ({"input_ids": tokens, "attention_mask": mask}, torch.randint(3, (5,)))

        def loss_fn(out: Any, y: Tensor) -> Tensor:
            return ce(out.logits, y)

    methods: dict[str, str] = {}
    found = gradctl.per_sample_norms(model, loss_fn, data, methods=methods)
    expected = norms(gradctl.per_sample_grads(model, loss_fn, data, method="loop"))
    assert float(((found - expected) / expected).abs().max()) < 1e-5
    assert not any(how.startswith("formed") for how in methods.values())
    assert gradctl.per_sample_grads(model, loss_fn, data).method == "graph"
