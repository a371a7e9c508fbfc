"""Aligns pictures, captions and calls of birds in one embedding space."""
import argparse
import copy
import logging
import os
import tempfile

import torch

from config import ContrastiveConfig
from data import BirdSource
from losses import NegativeQueue, contrastive
from models import MultiModal

torch.set_num_threads(1)
log = logging.getLogger("birds")


def parameter_groups(model, cfg):
    groups = []
    for name, tower in model.towers.items():
        scale = cfg.towers[name].lr_scale
        groups.append({"params": tower.parameters(), "lr": cfg.lr * scale})
    groups.append({"params": [model.log_temperature], "lr": cfg.lr, "weight_decay": 0.0})
    return groups


@torch.no_grad()
def recall(model, source, pairs, size=64):
    model.eval()
    batch, kind = source.batch(size)
    views = model(batch)
    scores = {}
    for left, right in pairs:
        best = (views[left] @ views[right].t()).argmax(1)
        scores[f"{left}-{right}"] = (kind[best] == kind).float().mean().item()
    model.train()
    return scores


@torch.no_grad()
def follow(average, model, decay):
    for slow, fast in zip(average.parameters(), model.parameters()):
        slow.lerp_(fast, 1.0 - decay)
    for slow, fast in zip(average.buffers(), model.buffers()):
        slow.copy_(fast)


def fit(cfg):
    source, held_out = BirdSource(cfg, cfg.seed), BirdSource(cfg, cfg.seed + 1)
    model = MultiModal(cfg)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg), weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / cfg.warmup))
    queue = NegativeQueue(cfg.towers, cfg.queue)
    for step in range(1, cfg.steps + 1):
        batch, kind = source.batch(cfg.batch_size)
        views = model(batch)
        loss, terms = contrastive(views, kind, cfg.pairs, queue, model.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        queue.push(views, kind)
        follow(average, model, cfg.ema)
        if step % 6 == 0:
            text = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
            log.info("step %d: loss %.4f, temperature %.3f, %s", step, loss.item(),
                     model.temperature.item(), text)
    return average, recall(average, held_out, cfg.pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=ContrastiveConfig.steps)
    parser.add_argument("--seed", type=int, default=ContrastiveConfig.seed)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = ContrastiveConfig(steps=options.steps, seed=options.seed)
    torch.manual_seed(cfg.seed)
    model, scores = fit(cfg)
    for pair, value in scores.items():
        log.info("recall %s %.3f", pair, value)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), os.path.join(folder, "towers.pt"))


if __name__ == "__main__":
    main()
