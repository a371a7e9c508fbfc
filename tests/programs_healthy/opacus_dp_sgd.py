"""Differentially private SGD with Opacus: per-sample gradients, clipping and noise, Poisson batches."""

import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).amax(dim=2))


def data(count: int) -> TensorDataset:
    label = torch.randint(0, 3, (count,))
    time = torch.arange(20) / 20
    wave = torch.sin(2 * torch.pi * (1 + 3 * label[:, None]) * time + 6.28 * torch.rand(count, 1))
    return TensorDataset((wave + 0.2 * torch.randn(count, 20)).unsqueeze(1), label)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    assert not ModuleValidator.validate(model, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data(160), batch_size=16),
        noise_multiplier=0.6,
        max_grad_norm=1.0,
        poisson_sampling=True,
    )
    for epoch in range(2):
        total, right, seen = torch.zeros(()), 0, 0
        for x, label in loader:
            if len(x) == 0:
                continue
            logits = model(x)
            loss = F.cross_entropy(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(x)
            right += int((logits.argmax(dim=1) == label).sum())
            seen += len(x)
        epsilon = engine.get_epsilon(1e-3)
        print(f"{epoch} loss {total.item() / seen:.3f} accuracy {right / seen:.3f} epsilon {epsilon:.2f}")


if __name__ == "__main__":
    main()
