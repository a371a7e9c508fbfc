"""Train a small convolutional net on scikit-learn's digits. The loss falls, and half of the net never learns.

    python examples/explain_demo/train.py             # nothing looks wrong
    gradctl explain examples/explain_demo/train.py    # which line it is

The program does not know gradctl: it is what a person would have written, with a mistake that is easily made.
"""

from __future__ import annotations

import argparse

import torch
from models import DigitNet
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def digits(test: int = 360) -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    return (
        TensorDataset(images[order[test:]], labels[order[test:]]),
        TensorDataset(images[order[:test]], labels[order[:test]]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convolutional net on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = digits()
    model = DigitNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        print(f"epoch {epoch}  loss {total / len(train):.3f}")

    model.eval()
    with torch.no_grad():
        images, labels = test.tensors
        accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
