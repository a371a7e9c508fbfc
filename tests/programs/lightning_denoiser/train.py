"""Trains a one-dimensional denoising autoencoder with Lightning."""
import argparse
import logging
import os
import tempfile
import warnings

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from config import DenoiserConfig
from data import loaders
from mixins import FiniteGradientMixin, GradientSmoothingMixin, WeightAverageMixin
from models import Decoder, Encoder, spectral_distance

log = logging.getLogger("denoiser")


class Denoiser(FiniteGradientMixin, GradientSmoothingMixin, WeightAverageMixin, L.LightningModule):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.smooth_prefixes = cfg.smooth_prefixes
        self.smooth_beta = cfg.smooth_beta
        self.encoder = Encoder(cfg.channels)
        self.decoder = Decoder(cfg.channels)
        self.gate = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, noisy):
        return self.gate * noisy + self.decoder(self.encoder(noisy))

    def _losses(self, batch):
        noisy, clean = batch
        restored = self(noisy)
        mse = F.mse_loss(restored, clean)
        spectral = spectral_distance(restored, clean)
        return {"loss": mse + self.cfg.spectral_weight * spectral, "mse": mse, "spectral": spectral}

    def training_step(self, batch, batch_idx):
        parts = self._losses(batch)
        self.log_dict({f"train_{k}": v.detach() for k, v in parts.items()}, on_step=True, on_epoch=True)
        return parts["loss"]

    def validation_step(self, batch, batch_idx):
        parts = self._losses(batch)
        self.log("val_mse", parts["mse"].item(), prog_bar=False)

    def configure_optimizers(self):
        groups = [
            {"params": [*self.encoder.parameters(), self.gate], "lr": self.cfg.lr},
            {"params": self.decoder.parameters(), "lr": self.cfg.lr * 0.5},
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.cfg.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class History(Callback):
    def __init__(self):
        self.rows = []

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-epochs", type=int, default=DenoiserConfig.max_epochs)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = DenoiserConfig(max_epochs=options.max_epochs)
    L.seed_everything(cfg.seed, verbose=False)
    train_loader, val_loader = loaders(cfg)
    model, history = Denoiser(cfg), History()
    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(dirpath=folder, monitor="val_mse", save_top_k=1)
        trainer = L.Trainer(
            max_epochs=cfg.max_epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=1,
            gradient_clip_val=cfg.clip,
            callbacks=[history, keep],
            default_root_dir=folder,
            log_every_n_steps=1,
        )
        trainer.fit(model, train_loader, val_loader)
        best = torch.load(keep.best_model_path, map_location="cpu", weights_only=False)
        log.info("best checkpoint %s holds %d tensors", os.path.basename(keep.best_model_path),
                 len(best["state_dict"]))
    for epoch, row in enumerate(history.rows):
        log.info("epoch %d: val mse %.4f", epoch, row["val_mse"])


if __name__ == "__main__":
    main()
