"""Message passing in plain torch."""

import torch
from torch import nn
from torch.nn import functional as F

from mixins import ResidualMixin, ScatterMixin, SparsityMixin

LAYERS = {}


def layer(name):
    def register(cls):
        LAYERS[name] = cls
        return cls

    return register


@layer("gated")
class GatedConv(SparsityMixin, ScatterMixin, ResidualMixin, nn.Module):
    def __init__(self, cin, cout, edge_dim):
        super().__init__()
        self.message = nn.Linear(cin + edge_dim, cout)
        self.gate = nn.Linear(2 * cin + edge_dim, 1)
        self.update = nn.Linear(cin + cout, cout)
        self.shortcut = nn.Linear(cin, cout, bias=False) if cin != cout else None

    def forward(self, x, edge_index, edge_attr):
        src, dst = edge_index
        gate = torch.sigmoid(self.gate(torch.cat([x[src], x[dst], edge_attr], dim=1)))
        gate = self.sparsify(gate)
        message = F.relu(self.message(torch.cat([x[src], edge_attr], dim=1)))
        pooled = self.scatter_sum(gate * message, dst, x.shape[0])
        return self.residual(x, F.relu(self.update(torch.cat([x, pooled], dim=1))))


@layer("attention")
class AttentionConv(ScatterMixin, ResidualMixin, nn.Module):
    def __init__(self, cin, cout, edge_dim):
        super().__init__()
        self.value = nn.Linear(cin, cout)
        self.score = nn.Linear(2 * cin + edge_dim, 1)
        self.shortcut = nn.Linear(cin, cout, bias=False) if cin != cout else None

    def forward(self, x, edge_index, edge_attr):
        src, dst = edge_index
        score = F.leaky_relu(self.score(torch.cat([x[src], x[dst], edge_attr], dim=1)), 0.2)
        score = score - self.scatter_max(score, dst, x.shape[0])[dst]
        weight = score.exp()
        total = self.scatter_sum(weight, dst, x.shape[0])
        alpha = weight / total[dst].clamp(min=1e-9)
        return self.residual(x, self.scatter_sum(alpha * self.value(x)[src], dst, x.shape[0]))


class TrafficNet(nn.Module):
    def __init__(self, plan, node_dim=4, edge_dim=2, width=16, dropout=0.05):
        super().__init__()
        widths = [node_dim, *[width] * len(plan)]
        self.layers = nn.ModuleList(
            LAYERS[kind](cin, cout, edge_dim) for kind, cin, cout in zip(plan, widths, widths[1:])
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in plan)
        self.drop = nn.Dropout(dropout)
        self.readout = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, graph):
        x = graph.x
        for conv, norm in zip(self.layers, self.norms):
            x = self.drop(norm(conv(x, graph.edge_index, graph.edge_attr)))
        return self.readout(x).squeeze(-1)

    def set_sparsity(self, threshold):
        for conv in self.layers:
            if hasattr(conv, "set_sparsity"):
                conv.set_sparsity(threshold)
