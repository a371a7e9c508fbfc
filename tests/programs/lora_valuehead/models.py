"""GPT-2 with LoRA adapters and a head that scores the whole sequence."""
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def build_backbone(cfg, adapter):
    base = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.positions,
        n_embd=cfg.width,
        n_layer=cfg.layers,
        n_head=cfg.heads,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ))
    return get_peft_model(base, LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        fan_in_fan_out=True,
    ))


class ScoredLM(nn.Module):
    def __init__(self, cfg, adapter):
        super().__init__()
        self.backbone = build_backbone(cfg, adapter)
        self.score = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, 16), nn.Tanh(),
                                   nn.Linear(16, 1))
        self.score[-1].weight.data.mul_(0.5)

    def forward(self, tokens):
        out = self.backbone(input_ids=tokens, labels=tokens, output_hidden_states=True)
        pooled = out.hidden_states[-1].mean(1)
        return out.loss, self.score(pooled).squeeze(-1)

    def trainable(self):
        return [p for p in self.parameters() if p.requires_grad]

    def groups(self, cfg):
        adapters = [p for p in self.backbone.parameters() if p.requires_grad]
        return [
            {"params": adapters, "lr": cfg.lr, "weight_decay": 0.01},
            {"params": self.score.parameters(), "lr": cfg.head_lr, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def adapter_norm(self):
        squares = [p.pow(2).sum() for n, p in self.backbone.named_parameters() if "lora_" in n]
        return torch.stack(squares).sum().sqrt().item()
