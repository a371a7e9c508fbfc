"""accelerate: accumulation over uneven batches, clipping at real steps only, moving average, checkpoint."""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def loaders(batch: int) -> tuple[DataLoader, DataLoader]:
    x = torch.randn(140, 10)
    y = (x[:, :3] @ torch.randn(3, 4)).argmax(dim=1)
    train, test = TensorDataset(x[:100], y[:100]), TensorDataset(x[100:], y[100:])
    return DataLoader(train, batch, shuffle=True), DataLoader(test, 20)


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = []
    for x, y in loader:
        guess, truth = accelerator.gather_for_metrics((model(x).argmax(dim=1), y))
        right.append((guess == truth).float())
    model.train()
    return torch.cat(right).mean().item()


def main() -> None:
    torch.set_num_threads(1)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=3,
            project_config=ProjectConfiguration(project_dir=folder),
        )
        model = Net(10, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=5)
        train, test = loaders(8)
        model, optimizer, train, test, schedule = accelerator.prepare(model, optimizer, train, test, schedule)
        average = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(0.8))
        for epoch in range(4):
            total = torch.zeros(())
            for x, y in train:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        average.update_parameters(accelerator.unwrap_model(model))
                total += loss.detach()
            scores = [accuracy(accelerator, m, test) for m in (model, average)]
            accelerator.print(epoch, round(total.item() / len(train), 3), [round(s, 3) for s in scores])
        accelerator.save_state(f"{folder}/state")
        accelerator.load_state(f"{folder}/state")


if __name__ == "__main__":
    main()
