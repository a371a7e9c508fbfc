"""Lightning with manual optimization: two optimizers in one LightningModule."""

import logging
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Gan(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
        self.last = 0.0

    def training_step(self, batch, index):
        opt_g, opt_d = self.optimizers()
        bce = nn.functional.binary_cross_entropy_with_logits
        noise = torch.randn(len(batch), 2)
        self.toggle_optimizer(opt_g)
        loss_g = bce(self.discriminator(self.generator(noise)), torch.ones(len(batch), 1))
        opt_g.zero_grad()
        self.manual_backward(loss_g)
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        self.toggle_optimizer(opt_d)
        real = bce(self.discriminator(batch), torch.ones(len(batch), 1))
        fake = bce(self.discriminator(self.generator(noise).detach()), torch.zeros(len(batch), 1))
        opt_d.zero_grad()
        self.manual_backward(real + fake)
        opt_d.step()
        self.untoggle_optimizer(opt_d)
        self.last = loss_g.item()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3),
        )


def main():
    lightning.seed_everything(0, verbose=False)
    model = Gan()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(torch.randn(320, 1) * 0.5 + 3, batch_size=16))
    print(f"loss {model.last:.9f}")
    print(f"optimizer steps: {trainer.global_step // 2} {trainer.global_step // 2}")


if __name__ == "__main__":
    main()
