"""GradScaler on the CPU; one batch overflows, so one step is skipped."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10)
taken = 0
for step in range(20):
    x = torch.randn(32, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    if step == 7:
        loss = loss * 1e38
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    taken += scaler.get_scale() >= before
print(f"loss {loss.item():.9f} scale {scaler.get_scale():.1f}")
print(f"optimizer steps: {taken}")
