"""A student learns from a frozen teacher; an EMA of the student is kept beside it."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(10, width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def main():
    torch.manual_seed(0)
    teacher, student = Net(64).eval().requires_grad_(False), Net(16)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for _ in range(40):
        x = torch.randn(64, 10)
        goal = (teacher(x) / 2).softmax(-1)
        loss = nn.functional.kl_div((student(x) / 2).log_softmax(-1), goal, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(student)
    drift = sum((a - b).abs().sum() for a, b in zip(ema.module.parameters(), student.parameters(), strict=True))
    print(f"loss {loss.item():.9f} drift {drift.item():.7f}")
    print("optimizer steps: 40")


main()
