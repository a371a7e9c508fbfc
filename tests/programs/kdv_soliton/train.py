"""Physics-informed solution of the Korteweg-de Vries equation u_t + 6 u u_x + u_xxx = 0."""

import argparse
import logging
import os
import tempfile
from dataclasses import dataclass, field

import torch
from torch import nn

from network import WaveNet
from operators import Field, Residual, gradient

log = logging.getLogger("kdv")


@dataclass
class KdvConfig:
    seed: int = 2
    steps: int = 36
    interior: int = 192
    lr: float = 3e-3
    speed: float = 4.0
    span: tuple = (6.0, 0.5)
    equation: list = field(
        default_factory=lambda: [("time", 1.0), ("advection", 6.0), ("dispersion", 1.0)]
    )
    weights: dict = field(default_factory=lambda: {"pde": 0.02, "initial": 1.0, "edge": 0.2})


def soliton(x, t, c):
    return 0.5 * c / torch.cosh(0.5 * c**0.5 * (x - c * t)) ** 2


class Points:
    """Collocation points: uniform, with part of them resampled where the residual was large."""

    def __init__(self, cfg, generator):
        self.cfg, self.gen = cfg, generator
        self.hard = None

    def interior(self):
        x = self.cfg.span[0] * (2 * torch.rand(self.cfg.interior, 1, generator=self.gen) - 1)
        t = self.cfg.span[1] * torch.rand(self.cfg.interior, 1, generator=self.gen)
        points = torch.cat([x, t], dim=1)
        if self.hard is not None:
            points[: len(self.hard)] = self.hard
        return points

    def remember(self, points, residual, share=0.1):
        k = int(share * len(points))
        worst = residual.detach().abs().squeeze(1).topk(k).indices
        self.hard = points.detach()[worst].clone()

    def initial(self, count=96):
        x = self.cfg.span[0] * (2 * torch.rand(count, 1, generator=self.gen) - 1)
        return torch.cat([x, torch.zeros_like(x)], dim=1)

    def edge(self, count=32):
        t = self.cfg.span[1] * torch.rand(count, 1, generator=self.gen)
        side = torch.where(torch.rand(count, 1, generator=self.gen) < 0.5, -1.0, 1.0)
        return torch.cat([side * self.cfg.span[0], t], dim=1)


def losses(net, points, residual, cfg):
    inner = points.interior()
    pde = residual(Field(net, inner.clone()))
    points.remember(inner, pde)
    start = points.initial()
    first = net(start) - soliton(start[:, :1], start[:, 1:], cfg.speed)
    border = Field(net, points.edge())
    flat = gradient(border.value, border.axes["x"])
    return {"pde": pde.square().mean(), "initial": first.square().mean(),
            "edge": (border.value.square() + flat.square()).mean()}


@torch.no_grad()
def relative_error(net, cfg, count=64):
    x = torch.linspace(-cfg.span[0], cfg.span[0], count)
    grid = torch.cartesian_prod(x, torch.linspace(0, cfg.span[1], 5))
    exact = soliton(grid[:, :1], grid[:, 1:], cfg.speed)
    return ((net(grid) - exact).norm() / exact.norm()).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=KdvConfig.steps)
    parser.add_argument("--seed", type=int, default=KdvConfig.seed)
    cfg = KdvConfig(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)

    net = WaveNet(span=cfg.span, seed=cfg.seed)
    points = Points(cfg, torch.Generator().manual_seed(cfg.seed))
    residual = Residual(cfg.equation)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)

    for step in range(1, cfg.steps + 1):
        parts = losses(net, points, residual, cfg)
        loss = sum(cfg.weights[k] * v for k, v in parts.items())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 9 == 0:
            shown = {k: round(v.item(), 4) for k, v in parts.items()}
            log.info("step %2d loss %.4f %s error %.3f", step, loss.item(), shown, relative_error(net, cfg))
            log.info("   residual parts %s", {k: round(v, 3) for k, v in residual.last.items()})

    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), os.path.join(folder, "kdv.pt"))


if __name__ == "__main__":
    main()
