"""Features that hide from a second head which scanner an image came from: digits, with a reversed gradient.

    python examples/gradient_reversal.py [--strength 0.3] [--epochs 20]

Half of the images get the background of a second scanner. One head learns the digit, another the scanner. Between the
features and the second head stands `gradctl.reverse`: the head gets better at telling the scanners apart, and the
features get better at hiding it from that head, which ends near chance while the digits are read as well as before.

The last figure is a warning: a new classifier, trained on the finished features, still tells the scanners apart. What
is hidden from the head that one trains against is not erased; judge such features by a classifier of their own.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradctl


@dataclass(frozen=True)
class Result:
    """Shares of right answers on images that were not trained on, between 0 and 1."""

    digit: float
    scanner: float
    scanner_by_new_head: float


def images() -> tuple[Tensor, Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    drawn = torch.Generator().manual_seed(0)
    scanner = torch.randint(2, (len(x),), generator=drawn)
    background = torch.rand(8, 8, generator=drawn)
    x = torch.where(scanner[:, None, None] == 1, 0.7 * x + 0.3 * background, x)
    return x.flatten(1), torch.tensor(digits.target), scanner


def train(strength: float, epochs: int, seed: int = 0) -> Result:
    torch.manual_seed(seed)
    x, digit, scanner = images()
    order = torch.randperm(len(x))
    seen, unseen = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    reader, critic = nn.Linear(16, 10), nn.Linear(16, 2)
    body = torch.optim.Adam([*features.parameters(), *reader.parameters()], lr=2e-3)
    against = torch.optim.SGD(critic.parameters(), lr=0.1, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in seen[torch.randperm(len(seen))].split(128):
            z = features(x[rows])
            told = critic(gradctl.reverse(z, strength))
            loss = cross_entropy(reader(z), digit[rows]) + cross_entropy(told, scanner[rows])
            body.zero_grad()
            against.zero_grad()
            loss.backward()
            body.step()
            against.step()
    with torch.no_grad():
        z = features(x)
    return Result(
        digit=right(reader, z[unseen], digit[unseen]),
        scanner=right(critic, z[unseen], scanner[unseen]),
        scanner_by_new_head=right(new_head(z[seen], scanner[seen]), z[unseen], scanner[unseen]),
    )


def new_head(z: Tensor, scanner: Tensor) -> nn.Module:
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(head(z), scanner).backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def right(head: nn.Module, z: Tensor, truth: Tensor) -> float:
    return (head(z).argmax(1) == truth).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    for strength in dict.fromkeys((0.0, options.strength)):
        result = train(strength, options.epochs)
        print(
            f"strength {strength}: digit right {result.digit:.3f}, scanner told {result.scanner:.3f}, "
            f"by a new head {result.scanner_by_new_head:.3f}"
        )


if __name__ == "__main__":
    main()
