"""Train a small convolutional net to read scikit-learn's handwritten digits.

Plain PyTorch: nothing here knows about gradctl. Run it alone, or watched:

    python examples/digits.py
    gradctl run examples/digits.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitNet(nn.Module):
    """Three convolutions and a linear head for images of shape [batch, 1, 8, 8]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Split the 1,797 digits into 80 % for training and 20 % for the test, with classes in equal shares."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    y = torch.tensor(labels, dtype=torch.long)
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=seed)
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return the share of digits that the model reads rightly."""
    model.eval()
    right = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in loader)
    model.train()
    return right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--clip", type=float, default=2.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train_set, test_set = load_data(options.seed)
    train_loader = DataLoader(train_set, batch_size=options.batch_size, shuffle=True, drop_last=True)
    test_loader = DataLoader(test_set, batch_size=256)

    model = DigitNet()
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, epochs=options.epochs, steps_per_epoch=len(train_loader)
    )

    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = loss_of(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch:2d}  loss {total / len(train_loader):.4f}  test accuracy {accuracy(model, test_loader):.2%}"
        )

    print(f"test accuracy: {accuracy(model, test_loader):.2%}")


if __name__ == "__main__":
    main()
