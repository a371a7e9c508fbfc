"""Two-stage transfer to a small leaf-disease data set."""

import argparse
import logging
import os
import tempfile

import torch
from torch import nn

from backbone import Backbone, Classifier, pretrained_state
from plan import default_plan
from stages import StageRunner

log = logging.getLogger("leaf")


def leaves(count, generator, size=20, classes=5):
    """Green discs with class-dependent spots."""
    y = torch.randint(0, classes, (count,), generator=generator)
    axis = torch.linspace(-1, 1, size)
    gy, gx = torch.meshgrid(axis, axis, indexing="ij")
    disc = (gx**2 + gy**2 < 0.8).float()
    freq = 2.0 + 1.5 * y.float()[:, None, None]
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    spots = torch.relu(torch.sin(freq * gx * 3 + phase) * torch.cos(freq * gy * 3))
    x = torch.stack([spots, disc.expand_as(spots) - 0.5 * spots, 0.3 * disc.expand_as(spots)], 1)
    return x + 0.1 * torch.randn(x.shape, generator=generator), y


def loader(x, y, batch, generator):
    order = torch.randperm(len(x), generator=generator)
    for start in range(0, len(x) - batch + 1, batch):
        pick = order[start : start + batch]
        flip = torch.rand((), generator=generator) < 0.5
        yield (x[pick].flip(-1) if flip else x[pick]), y[pick]


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--frozen-stages", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed)

    train, held = leaves(144, gen), leaves(96, gen)
    backbone = Backbone(frozen_stages=args.frozen_stages)
    backbone.load_state_dict(pretrained_state(backbone, seed=1))
    model = Classifier(backbone, classes=5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    runner = StageRunner(model)
    per_epoch = len(train[0]) // args.batch
    best = 0.0

    with tempfile.TemporaryDirectory() as folder:
        for stage in default_plan():
            runner.enter(stage, steps=stage.epochs * per_epoch)
            for epoch in range(1, stage.epochs + 1):
                model.train()
                total = 0.0
                for x, y in loader(*train, args.batch, gen):
                    loss = criterion(model(x), y)
                    runner.step(loss)
                    total += loss.item()
                score = accuracy(model, *held)
                log.info("%s %d loss %.3f accuracy %.3f", stage.name, epoch, total / per_epoch, score)
                if score >= best:
                    best = score
                    torch.save(model.state_dict(), os.path.join(folder, "best.pt"))
    log.info("best accuracy %.3f", best)


if __name__ == "__main__":
    main()
