"""Gradient accumulation over four microbatches, clipping, a warm-up and cosine schedule, a DataLoader with workers."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])
    steps = 0
    for _ in range(2):
        for index, (batch, label) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(batch), label) / 4
            loss.backward()
            if index % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                steps += 1
    print(f"loss {loss.item():.9f} lr {schedule.get_last_lr()[0]:.9f}")
    print(f"optimizer steps: {steps}")


if __name__ == "__main__":
    main()
