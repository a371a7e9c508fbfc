"""A GAN in Lightning with manual optimization, toggled optimizers and a checkpoint callback."""

import logging
import tempfile
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, outputs)
    )


class Gan(L.LightningModule):
    def __init__(self, latent: int = 6, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator, self.critic = mlp(latent, 2), mlp(2, 1)

    def sample(self, count: int) -> torch.Tensor:
        return self.generator(torch.randn(count, self.hparams.latent, device=self.device))

    def training_step(self, batch, index: int) -> None:
        (real,) = batch
        opt_g, opt_d = self.optimizers()

        self.toggle_optimizer(opt_d)
        fake = self.sample(len(real)).detach()
        d_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        opt_d.step()
        self.untoggle_optimizer(opt_d)

        if index % 2 == 0:
            self.toggle_optimizer(opt_g)
            g_loss = F.softplus(-self.critic(self.sample(len(real)))).mean()
            opt_g.zero_grad()
            self.manual_backward(g_loss)
            self.clip_gradients(opt_g, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            opt_g.step()
            self.untoggle_optimizer(opt_g)
            self.log("g_loss", g_loss.detach())
        self.log("d_loss", d_loss.detach(), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def validation_step(self, batch, index: int) -> None:
        (real,) = batch
        self.log("gap", (self.sample(len(real)).mean(0) - real.mean(0)).norm())

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.99))
        opt_d = torch.optim.Adam(self.critic.parameters(), lr=self.hparams.lr, betas=(0.5, 0.99))
        return [opt_g, opt_d], [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (opt_g, opt_d)]


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    points = torch.randn(160, 2) * 0.2 + torch.tensor([1.0, -1.0])
    loader = DataLoader(TensorDataset(points), batch_size=16, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)],
        )
        trainer.fit(Gan(), loader, DataLoader(TensorDataset(points), batch_size=80))
    print({k: round(v.item(), 3) for k, v in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
