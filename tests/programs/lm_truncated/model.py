"""Recurrent language model: the output layer shares the embedding's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from options import Options
from torch import nn

State = tuple[torch.Tensor, ...] | torch.Tensor
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class LockedDropout(nn.Module):
    """The same units are dropped at all times of a window."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        mask = torch.empty(1, *x.shape[1:]).bernoulli_(1.0 - self.p).div_(1.0 - self.p)
        return x * mask


class StyleHead(nn.Module):
    """A unit vector per text, from the mean of the hidden states."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.proj(hidden.mean(dim=0)), dim=-1)


class LanguageModel(nn.Module):
    def __init__(self, opt: Options):
        super().__init__()
        self.embed = nn.Embedding(opt.vocab, opt.width)
        self.rnn = CELLS[opt.cell](opt.width, opt.width, num_layers=opt.layers)
        self.drop = LockedDropout(opt.dropout)
        self.skip = nn.Parameter(torch.zeros(()))
        self.decoder = nn.Linear(opt.width, opt.vocab)
        self.decoder.weight = self.embed.weight
        self.style = StyleHead(opt.width, opt.style_width)
        self.reset()

    def reset(self) -> None:
        self.embed.weight.data.uniform_(-0.5, 0.5)
        self.decoder.bias.data.zero_()
        for name, p in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(p)

    @staticmethod
    def cut(state: State | None) -> State | None:
        """The state as a constant for the next window."""
        if state is None:
            return None
        if isinstance(state, torch.Tensor):
            return state.detach()
        return tuple(s.detach() for s in state)

    def forward(self, tokens: torch.Tensor, state: State | None) -> dict[str, torch.Tensor | State]:
        x = self.drop(self.embed(tokens))
        hidden, state = self.rnn(x, state)
        dropped = self.drop(hidden)
        logits = self.decoder(dropped + self.skip * x)
        return {"logits": logits, "hidden": hidden, "dropped": dropped, "state": state}
