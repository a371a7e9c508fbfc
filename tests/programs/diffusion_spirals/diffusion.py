"""Forward process, the training loss and a short deterministic sampler."""

import torch
from torch.nn import functional as F


class GaussianDiffusion:
    def __init__(self, cfg):
        self.steps = cfg.timesteps
        self.prediction = cfg.prediction
        beta = torch.linspace(cfg.beta_start, cfg.beta_end, cfg.timesteps)
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)

    def _coefficients(self, t):
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def noised(self, x0, t, noise):
        signal, sigma = self._coefficients(t)
        return signal * x0 + sigma * noise

    def loss(self, model, x0, generator=None):
        t = torch.randint(0, self.steps, (x0.shape[0],), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        pred = model(self.noised(x0, t, noise), t)
        target = noise if self.prediction == "eps" else x0
        per_image = F.mse_loss(pred, target, reduction="none").flatten(1).mean(1)
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        weight = torch.clamp(snr, max=5.0) / torch.clamp(snr, min=1e-3)
        return (weight.clamp(max=1.0) * per_image).mean(), per_image.detach()

    @torch.no_grad()
    def sample(self, model, shape, stride=10, generator=None):
        x = torch.randn(shape, generator=generator)
        for i in range(self.steps - 1, 0, -stride):
            t = torch.full((shape[0],), i, dtype=torch.long)
            signal, sigma = self._coefficients(t)
            eps = model(x, t)
            x0 = ((x - sigma * eps) / signal).clamp(-1, 1)
            prev_signal, prev_sigma = self._coefficients(torch.clamp(t - stride, min=0))
            x = prev_signal * x0 + prev_sigma * eps
        return x
