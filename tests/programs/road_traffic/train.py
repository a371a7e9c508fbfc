"""Forecast the load of road sensors from their surroundings."""

import argparse
import logging
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from graphs import collate, make_graph
from layers import TrafficNet

log = logging.getLogger("traffic")


@dataclass
class TrafficConfig:
    seed: int = 5
    steps: int = 24
    batch: int = 4
    lr: float = 4e-3
    accumulate: int = 2
    dense_steps: int = 9
    threshold: float = 0.45
    plan: tuple = ("gated", "attention", "gated")


class SparsitySchedule:
    """Raises the gate threshold linearly after the dense phase."""

    def __init__(self, model, start, stop, final):
        self.model, self.start, self.stop, self.final = model, start, stop, final

    def __call__(self, step):
        share = (step - self.start) / max(1, self.stop - self.start)
        self.model.set_sparsity(self.final * min(1.0, max(0.0, share)) if step > self.start else 0.0)


@torch.no_grad()
def evaluate(model, graph):
    model.eval()
    pred = model(graph)
    model.train()
    error = (pred - graph.y).abs()
    return {"mae": error.mean().item(), "p90": error.quantile(0.9).item()}


def masked_huber(pred, graph):
    per_node = F.huber_loss(pred, graph.y, reduction="none", delta=0.5)
    return (per_node * graph.mask).sum() / graph.mask.sum()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=TrafficConfig.steps)
    parser.add_argument("--seed", type=int, default=TrafficConfig.seed)
    parser.add_argument("--plan", nargs="+", default=TrafficConfig.plan)
    cfg = TrafficConfig(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    gen = torch.Generator().manual_seed(cfg.seed)

    pool = [make_graph(gen) for _ in range(24)]
    held = collate([make_graph(gen) for _ in range(4)])
    model = TrafficNet(cfg.plan)
    optimizer = torch.optim.RAdam(model.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.steps)
    sparsity = SparsitySchedule(model, cfg.dense_steps, cfg.steps, cfg.threshold)

    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, cfg.steps + 1):
            sparsity(step)
            optimizer.zero_grad(set_to_none=True)
            running = 0.0
            for _ in range(cfg.accumulate):
                pick = torch.randperm(len(pool), generator=gen)[: cfg.batch].tolist()
                graph = collate([pool[i] for i in pick])
                loss = masked_huber(model(graph), graph) / cfg.accumulate
                loss.backward()
                running += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 4 == 0:
                log.info("step %2d loss %.4f %s", step, running, evaluate(model, held))
                torch.save(model.state_dict(), os.path.join(folder, f"step{step}.pt"))
    log.info("final %s", evaluate(model, held))


if __name__ == "__main__":
    main()
