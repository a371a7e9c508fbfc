"""Synthetic road networks: sensors as nodes, directed segments as edges."""

from dataclasses import dataclass

import torch


@dataclass
class RoadGraph:
    x: torch.Tensor
    edge_index: torch.Tensor
    edge_attr: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor

    @property
    def num_nodes(self):
        return self.x.shape[0]


def make_graph(generator, nodes=40, neighbours=4):
    pos = torch.rand(nodes, 2, generator=generator)
    dist = torch.cdist(pos, pos)
    near = dist.topk(neighbours + 1, largest=False).indices[:, 1:]
    dst = torch.arange(nodes).repeat_interleave(neighbours)
    src = near.reshape(-1)
    length = dist[src, dst][:, None]
    lanes = torch.randint(1, 4, (len(src), 1), generator=generator).float()
    load = torch.rand(nodes, 1, generator=generator)
    hour = torch.rand(1, generator=generator).expand(nodes, 1)
    incoming = torch.zeros(nodes, 1).index_add_(0, dst, load[src] * lanes / (1 + 10 * length))
    y = (0.6 * load + 0.25 * incoming + 0.2 * torch.sin(6.28 * hour)).squeeze(1)
    mask = torch.rand(nodes, generator=generator) > 0.2
    return RoadGraph(torch.cat([pos, load, hour], 1), torch.stack([src, dst]),
                     torch.cat([length, lanes], 1), y, mask)


def collate(graphs):
    """Disjoint union of several graphs."""
    offset, edges = 0, []
    for g in graphs:
        edges.append(g.edge_index + offset)
        offset += g.num_nodes
    cat = {k: torch.cat([getattr(g, k) for g in graphs]) for k in ("x", "edge_attr", "y", "mask")}
    return RoadGraph(edge_index=torch.cat(edges, 1), **cat)
