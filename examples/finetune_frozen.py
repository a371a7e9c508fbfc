"""Fine-tune a small net on few images with its encoder frozen, then unfreezing it layer by layer.

The net first learns the digits 0 to 4. Then it is to read 5 to 9, of which it sees 40 images. Three ways are compared:
everything trains at once; only the head does; the head does, and layers of the encoder join at a step each.

    python examples/finetune_frozen.py
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradctl


class DigitNet(nn.Module):
    """An encoder of three convolutions with BatchNorm, and a linear head, for images of shape [batch, 1, 8, 8]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            self.block(1, width),
            self.block(width, 2 * width),
            nn.Sequential(nn.MaxPool2d(2), *self.block(2 * width, 2 * width), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 5))

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def digits(first: int, *, num_train: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images and labels of five digits from `first` on, counted from 0."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= first) & (labels < first + 5)
    x = torch.tensor(images[chosen], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    y = torch.tensor(labels[chosen] - first, dtype=torch.long)
    train, test = train_test_split(range(len(y)), train_size=num_train, stratify=y, random_state=seed)
    return x[train], y[train], x[test], y[test]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    model.train()  # what gradctl holds in evaluation mode stays there
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model reads rightly."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def pretrain(seed: int) -> DigitNet:
    model = DigitNet()
    images, labels, *_ = digits(0, num_train=700, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(4):
        for batch in torch.randperm(len(labels)).split(70):
            step(model, optimizer, images[batch], labels[batch])
    return model


def new_optimizer(model: DigitNet, lr: float) -> torch.optim.Optimizer:
    # Made from all parameters: those without a gradient are passed over until they train.
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--images", type=int, default=40, help="how many of the new digits it sees")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    pretrained = pretrain(options.seed)
    pretrained.head[-1].reset_parameters()
    images, labels, *test = digits(5, num_train=options.images, seed=options.seed)

    everything = copy.deepcopy(pretrained)
    optimizer = new_optimizer(everything, options.lr)
    for _ in range(options.steps):
        step(everything, optimizer, images, labels)
    print(f"everything at once  test accuracy {accuracy(everything, *test):.2%}")

    frozen = copy.deepcopy(pretrained)
    optimizer = new_optimizer(frozen, options.lr)
    with gradctl.freeze(frozen, "encoder", optimizer=optimizer):
        print(gradctl.trainable(frozen, optimizer=optimizer))
        for _ in range(options.steps):
            step(frozen, optimizer, images, labels)
    same = all(
        torch.equal(value, pretrained.encoder.state_dict()[name]) for name, value in frozen.encoder.state_dict().items()
    )
    print(f"head only           test accuracy {accuracy(frozen, *test):.2%}, encoder untouched: {same}")

    gradual = copy.deepcopy(pretrained)
    optimizer = new_optimizer(gradual, options.lr)
    half = options.steps // 2
    schedule = gradctl.unfreeze_by_step({"head": 0, "encoder.2": half // 2, "encoder.1": half})
    with schedule.attach(gradual, optimizer):
        for _ in range(options.steps):
            step(gradual, optimizer, images, labels)
        print(schedule)
        print(f"layer by layer      test accuracy {accuracy(gradual, *test):.2%}")


if __name__ == "__main__":
    main()
