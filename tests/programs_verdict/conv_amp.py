"""Healthy: a small conv net under autocast with a GradScaler, clipping and a cosine schedule to zero."""

import torch
from torch import nn

torch.manual_seed(7)
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
scaler = torch.amp.GradScaler("cpu")
for _ in range(150):
    label = torch.randint(0, 10, (32,))
    image = torch.randn(32, 1, 16, 16) * 0.3
    image[torch.arange(32), 0, label, label] += 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(image), label)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
