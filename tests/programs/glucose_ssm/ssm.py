"""A diagonal state-space model with input-dependent step size."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from discretise import RULES


class SelectiveSSM(nn.Module):
    def __init__(self, width, state=8, rule="zoh"):
        super().__init__()
        self.rule = RULES[rule]
        self.log_rate = nn.Parameter(torch.linspace(math.log(0.1), math.log(2.0), state).repeat(width, 1))
        self.to_step = nn.Linear(width, width)
        self.to_b = nn.Linear(width, state, bias=False)
        self.to_c = nn.Linear(width, state, bias=False)
        self.skip = nn.Parameter(torch.ones(width))
        self.to_step.bias.data.fill_(math.log(math.e - 1))

    def forward(self, u, delta, valid):
        batch, steps, width = u.shape
        stretch = F.softplus(self.to_step(u)) * delta[..., None]
        decay, gain = self.rule(-self.log_rate.exp(), stretch[..., None])
        b, c = self.to_b(u), self.to_c(u)
        h = u.new_zeros(batch, width, self.log_rate.shape[1])
        out = []
        for t in range(steps):
            new = decay[:, t] * h + gain[:, t] * b[:, t, None, :] * u[:, t, :, None]
            h = torch.where(valid[:, t, None, None], new, h)
            out.append((h * c[:, t, None, :]).sum(-1))
        return torch.stack(out, dim=1) + self.skip * u


class Block(nn.Module):
    def __init__(self, width, rule, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ssm = SelectiveSSM(width, rule=rule)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, delta, valid):
        u = self.norm(x)
        y = self.ssm(u, delta, valid) * torch.sigmoid(self.gate(u))
        return x + self.drop(self.out(y))


class AttentivePool(nn.Module):
    """Softmax over the valid steps."""

    def __init__(self, width):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x, valid):
        score = self.score(x).squeeze(-1).masked_fill(~valid, float("-inf"))
        return (score.softmax(dim=1)[..., None] * x).sum(dim=1)


class GlucoseNet(nn.Module):
    def __init__(self, channels=3, width=12, depth=2, rule="zoh", dropout=0.05):
        super().__init__()
        self.embed = nn.Linear(2 * channels + 1, width)
        self.blocks = nn.ModuleList(Block(width, rule, dropout) for _ in range(depth))
        self.pool = AttentivePool(width)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, batch):
        gaps = torch.log1p(batch.delta)[..., None]
        x = self.embed(torch.cat([batch.value, batch.seen, gaps], dim=-1))
        for block in self.blocks:
            x = block(x, batch.delta, batch.valid)
        last = x[torch.arange(len(x)), batch.length - 1]
        return self.head(torch.cat([last, self.pool(x, batch.valid)], dim=-1)).squeeze(-1)
