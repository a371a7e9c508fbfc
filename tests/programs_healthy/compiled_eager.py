"""torch.compile(backend="eager"): a graph break, two shapes and an uncompiled evaluation."""

import torch
import torch.nn.functional as F
from torch import nn


class Mixer(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Linear(tokens, tokens)
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gate * self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Net(nn.Module):
    def __init__(self, tokens: int = 6, width: int = 16):
        super().__init__()
        self.entry = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Mixer(tokens, width) for _ in range(2))
        self.head = nn.Linear(width, 3)
        self.seen: list[float] = []

    @torch.compiler.disable
    def watch(self, x: torch.Tensor) -> None:
        self.seen.append(x.detach().abs().max().item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.entry(x)
        for block in self.blocks:
            h = block(h)
            self.watch(h)
        return self.head(h.mean(dim=1))


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 6, 4)
    return x, x.mean(dim=1)[:, :3].argmax(dim=1)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(20):
        compiled.train()
        x, y = batch(24 if step % 5 else 16)
        loss = F.cross_entropy(compiled(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                x, y = batch(64)
                right = (model(x).argmax(dim=1) == y).float().mean().item()
            print(f"{step} loss {loss.item():.3f} accuracy {right:.3f} peak {max(model.seen):.2f}")


if __name__ == "__main__":
    main()
