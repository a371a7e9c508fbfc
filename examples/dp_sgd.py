"""Read scikit-learn's handwritten digits with clipped per-sample gradients and noise (DP-SGD).

Every sample moves the weights by at most `clip`, and noise of a multiple of that is added: what one digit has done to
them drowns. How much privacy this buys is an accountant's work (opacus.accountants has several) and depends on how the
batches were drawn; this program states none.

    python examples/dp_sgd.py
    python examples/dp_sgd.py --noise 0 --method grads
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradctl


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """80 % of the 1,797 digits for training, 20 % for the test; images of shape [n, 64]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16.0
    y = torch.tensor(labels, dtype=torch.long)
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=seed)
    return x[train], y[train], x[test], y[test]


def clipped_sum(model: nn.Module, images: Tensor, labels: Tensor, clip: float, method: str) -> list[Tensor]:
    """The sum over samples of gradients that are scaled down to a norm of at most `clip`."""
    if method == "grads":
        grads = gradctl.per_sample_grads(model, cross_entropy, (images, labels))
        norms = torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
        factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0)
        return [torch.tensordot(factors, g, dims=1) for g in grads.values()]
    # The same without a gradient for each sample: their norms first, then one gradient of the weighted losses.
    norms = gradctl.per_sample_norms(model, cross_entropy, (images, labels))
    factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0)
    losses = cross_entropy(model(images), labels, reduction="none")
    return list(torch.autograd.grad((factors * losses).sum(), list(model.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128, help="the expected number of samples in a batch")
    parser.add_argument("--clip", type=float, default=1.0, help="the largest norm of a sample's gradient")
    parser.add_argument("--noise", type=float, default=0.8, help="standard deviation of the noise, in units of --clip")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--method", choices=["norms", "grads"], default="norms")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    x, y, test_x, test_y = load_data(options.seed)
    # No BatchNorm: it mixes samples, and per_sample_norms would refuse it.
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    begin = time.perf_counter()
    for _ in range(options.epochs):
        for _ in range(round(len(x) / options.batch)):
            # Every sample is in a batch with the same chance, independently: what accountants assume.
            chosen = (torch.rand(len(x)) < options.batch / len(x)).nonzero()[:, 0]
            if not len(chosen):
                continue
            grads = clipped_sum(model, x[chosen], y[chosen], options.clip, options.method)
            for parameter, total in zip(model.parameters(), grads, strict=True):
                noise = options.noise * options.clip * torch.randn_like(total)
                # The expected size, not this batch's: the size of a batch would tell who is in it.
                parameter.grad = (total + noise) / options.batch
            optimizer.step()
    seconds = time.perf_counter() - begin
    accuracy = float((model(test_x).argmax(dim=1) == test_y).float().mean())
    print(f"clip {options.clip:g}, noise {options.noise:g}, {options.epochs} epochs, {seconds:.1f} s")
    print(f"test accuracy: {100 * accuracy:.1f}%")
    print("no epsilon is stated: ask an accountant, with the sampling rate and the number of steps")


if __name__ == "__main__":
    main()
