"""Bayesian-style curve fit with LBFGS: the closure clears, computes and returns, several times per step."""

import torch
import torch.nn.functional as F
from torch import nn


class Spectrum(nn.Module):
    """A sum of peaks; widths and heights are positive through softplus."""

    def __init__(self, peaks: int):
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(-0.7, 0.7, peaks))
        self.raw_width = nn.Parameter(torch.full((peaks,), -1.0))
        self.raw_height = nn.Parameter(torch.zeros(peaks))
        self.offset = nn.Parameter(torch.zeros(()))

    @property
    def width(self) -> torch.Tensor:
        return F.softplus(self.raw_width) + 0.02

    @property
    def height(self) -> torch.Tensor:
        return F.softplus(self.raw_height)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x[:, None] - self.centre) / self.width
        return (self.height * torch.exp(-0.5 * z.square())).sum(dim=1) + self.offset


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 120)
    truth = 1.5 * torch.exp(-0.5 * ((x + 0.4) / 0.1) ** 2) + 0.8 * torch.exp(-0.5 * ((x - 0.5) / 0.2) ** 2)
    y = truth + 0.03 * torch.randn_like(x)
    weight = torch.ones_like(x)
    model = Spectrum(2)
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=8, history_size=6, line_search_fn="strong_wolfe"
    )
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        error = (weight * (model(x) - y).square()).mean()
        loss = error + 1e-4 * model.height.square().sum()
        loss.backward()
        return loss

    for outer in range(8):
        loss = optimizer.step(closure)
        with torch.no_grad():
            residual = (model(x) - y).abs()
            weight = 1.0 / (1.0 + (residual / 0.1) ** 2)
        print(f"{outer} loss {loss.item():.5f} after {calls} evaluations")
    print([round(c, 3) for c in model.centre.detach().sort().values.tolist()])


if __name__ == "__main__":
    main()
