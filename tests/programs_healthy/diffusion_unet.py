"""A small diffusion U-Net in plain torch with zero-initialised exits, label dropout and a moving average."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

STEPS = 50


def zero(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, cond: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.cond = nn.Linear(cond, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.cond(F.silu(c))[..., None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class UNet(nn.Module):
    def __init__(self, width: int = 16, cond: int = 32, classes: int = 2):
        super().__init__()
        self.width, self.null = width, classes
        self.time = nn.Sequential(nn.Linear(width, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.label = nn.Embedding(classes + 1, cond)
        self.entry = nn.Conv2d(1, width, 3, padding=1)
        self.down = ResBlock(width, 2 * width, cond)
        self.middle = ResBlock(2 * width, 2 * width, cond)
        self.up = ResBlock(3 * width, width, cond)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), zero(nn.Conv2d(width, 1, 3, padding=1)))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rate = torch.exp(-math.log(1000) * torch.arange(self.width // 2) / (self.width // 2))
        angle = t[:, None] * rate
        c = self.time(torch.cat([angle.sin(), angle.cos()], dim=1)) + self.label(y)
        first = self.entry(x)
        h = self.middle(self.down(F.avg_pool2d(first, 2), c), c)
        h = torch.cat([F.interpolate(h, scale_factor=2), first], dim=1)
        return self.leave(self.up(h, c))


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(0, 2, (count,))
    wave = torch.sin(torch.arange(8) * 1.5 + 6.28 * torch.rand(count, 1))
    rows, cols = wave[:, :, None].expand(-1, 8, 8), wave[:, None, :].expand(-1, 8, 8)
    return torch.where(label[:, None, None] == 0, rows, cols).unsqueeze(1), label


@torch.no_grad()
def sample(model: UNet, alphas: torch.Tensor, count: int) -> torch.Tensor:
    x, y = torch.randn(count, 1, 8, 8), torch.arange(count) % 2
    for i in range(STEPS - 1, -1, -5):
        t = torch.full((count,), float(i))
        free = model(x, t, torch.full_like(y, model.null))
        noise = free + 1.5 * (model(x, t, y) - free)
        clean = ((x - (1 - alphas[i]).sqrt() * noise) / alphas[i].sqrt()).clamp(-1, 1)
        before = alphas[max(i - 5, 0)]
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return x


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = UNet()
    average = copy.deepcopy(model).requires_grad_(False)
    alphas = torch.cumprod(1 - torch.linspace(1e-3, 0.12, STEPS), dim=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        x, y = pictures(16)
        y = torch.where(torch.rand(len(y)) < 0.15, model.null, y)
        t = torch.randint(0, STEPS, (len(x),))
        noise, a = torch.randn_like(x), alphas[t][:, None, None, None]
        guess = model(a.sqrt() * x + (1 - a).sqrt() * noise, t.float(), y)
        weight = (a / (1 - a)).clamp(max=5.0).rsqrt().clamp(max=2.0).detach()
        loss = (weight * (guess - noise).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
    assert sum(losses[-5:]) < sum(losses[:5])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, spread {sample(average, alphas, 4).std().item():.3f}")


if __name__ == "__main__":
    main()
