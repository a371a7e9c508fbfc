"""Sums of two sinusoids and a noisy version of each."""
import torch
from torch.utils.data import DataLoader, TensorDataset


def make_signals(size, length, noise, seed):
    gen = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, length)
    freq = torch.randint(1, 5, (size, 2, 1), generator=gen).float()
    phase = torch.rand(size, 2, 1, generator=gen) * 6.2832
    clean = torch.sin(6.2832 * freq * t + phase).sum(1, keepdim=True)
    noisy = clean + noise * torch.randn(clean.shape, generator=gen)
    return TensorDataset(noisy, clean)


def loaders(cfg):
    train = make_signals(cfg.train_size, cfg.length, cfg.noise, cfg.seed)
    val = make_signals(cfg.val_size, cfg.length, cfg.noise, cfg.seed + 1)
    gen = torch.Generator().manual_seed(cfg.seed)
    return (
        DataLoader(train, batch_size=cfg.batch_size, shuffle=True, generator=gen),
        DataLoader(val, batch_size=cfg.batch_size),
    )
