"""Models to be fitted, small enough for a test: each with the loss of one fixed batch as its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A transformer block as GPT-2 has it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(c, 2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop1(self.out(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.drop2(self.down(functional.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A small language model; `tied` gives the head the embedding's weight."""

    def __init__(self, *, blocks: int = 4, width: int = 64, vocabulary: int = 211, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(128, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width, 4, 0.1) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        x = self.drop(self.words(words) + self.places(torch.arange(words.shape[1], device=words.device)))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut, with activations in place."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.c1, self.b1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c3, self.b3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.short = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            if stride != 1 or before != after
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.b1(self.c1(x)))
        y = self.b3(self.c3(self.relu(self.b2(self.c2(y)))))
        y += self.short(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A residual network in the manner of ResNet-50, narrower."""

    def __init__(self, *, layers: tuple[int, ...] = (2, 2, 2), width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks: list[nn.Module] = []
        before = width
        for i, count in enumerate(layers):
            for j in range(count):
                blocks.append(Bottleneck(before, width << i, 2 if i and not j else 1))
                before = 4 * (width << i)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.blocks(self.stem(x)).mean((2, 3))), targets)


def _twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """An encoder and a decoder with skips between them."""

    def __init__(self, *, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList([_twice(1, width), *(_twice(width << i, width << (i + 1)) for i in range(depth))])
        self.pool = nn.MaxPool2d(2)
        self.rise = nn.ModuleList(
            nn.ConvTranspose2d(width << (i + 1), width << i, 2, 2) for i in reversed(range(depth))
        )
        self.up = nn.ModuleList(_twice(width << (i + 1), width << i) for i in reversed(range(depth)))
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, stage in enumerate(self.down):
            x = stage(self.pool(x) if i else x)
            skips.append(x)
        skips.pop()
        for rise, stage in zip(self.rise, self.up, strict=True):
            x = stage(torch.cat([rise(x), skips.pop()], 1))
        return functional.cross_entropy(self.out(x), targets)


class Cells(nn.Module):
    """Two layers of LSTM cells, unrolled in Python: many small operations."""

    def __init__(self, *, width: int = 48, words: int = 101) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.cells = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, words)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        x = self.words(words)
        zeros = x.new_zeros(x.shape[1], x.shape[2])
        states = [(zeros, zeros), (zeros, zeros)]
        outputs: list[Tensor] = []
        for step in x:
            y = step
            for i, cell in enumerate(self.cells):
                states[i] = cell(y, states[i])
                y = self.drop(states[i][0])
            outputs.append(y)
        return functional.cross_entropy(self.head(torch.stack(outputs)).flatten(0, 1), targets.flatten())


@dataclass
class Training:
    """A model, its batch and its optimizer; call it for one step."""

    model: Any
    inputs: tuple[Any, ...]
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[Any], Tensor] = lambda out: out if isinstance(out, Tensor) else out.loss

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        inputs = self.inputs
        out = self.model(**inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], dict) else self.model(*inputs)
        loss = self.loss_of(out)
        loss.backward()
        self.optimizer.step()
        return loss


def _t5() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=211, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    words = torch.randint(1, 211, (4, 48))
    return T5ForConditionalGeneration(config), ({"input_ids": words, "labels": words.flip(1)},)


def _vit() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=48,
        patch_size=8, num_labels=5, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config), (
        {"pixel_values": torch.randn(8, 3, 48, 48), "labels": torch.randint(0, 5, (8,))},
    )


def _made(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name == "gpt":
        return GPT(), (torch.randint(0, 211, (4, 64)), torch.randint(0, 211, (4, 64)))
    if name == "tied":
        return GPT(tied=True), (torch.randint(0, 211, (4, 64)), torch.randint(0, 211, (4, 64)))
    if name == "resnet":
        return ResNet(), (torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,)))
    if name == "unet":
        return UNet(), (torch.randn(4, 1, 64, 64), torch.randint(0, 2, (4, 64, 64)))
    if name == "cells":
        return Cells(), (torch.randint(0, 101, (24, 16)), torch.randint(0, 101, (24, 16)))
    if name == "t5":
        return _t5()
    assert name == "vit"
    return _vit()


MODELS = ("gpt", "resnet", "unet", "cells", "t5", "vit")


def training(name: str, *, rate: float = 1e-3) -> Training:
    """Return a training of that model, the same each time, after one step: its optimizer has its state."""
    torch.manual_seed(0)
    model, inputs = _made(name)
    model.train()
    made = Training(model, inputs, torch.optim.AdamW(model.parameters(), lr=rate))
    made()
    return made
