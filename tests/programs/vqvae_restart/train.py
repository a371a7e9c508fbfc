"""Train a VQ-VAE whose decoder is quantised for deployment."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from data import images
from hooks import QuantizeLate, RestartCodes
from models import VQVAE, perplexity
from settings import Settings, parse_settings

log = logging.getLogger("vq")


def build_optimizer(model: VQVAE, cfg: Settings) -> torch.optim.Optimizer:
    codebook = list(model.codebook.parameters())
    known = {id(p) for p in codebook}
    rest = [p for p in model.parameters() if id(p) not in known]
    return torch.optim.Adam([{"params": rest}, {"params": codebook, "lr": 5 * cfg.lr}], lr=cfg.lr)


@torch.no_grad()
def evaluate(model: VQVAE, cfg: Settings) -> tuple[float, float]:
    model.eval()
    out = model(images(48, cfg.image, cfg.kinds, torch.Generator().manual_seed(99)))
    model.train()
    return out["error"].item(), perplexity(out["index"], cfg.codes)


def export(model: VQVAE, folder: Path) -> int:
    """Writes the decoder's weights as integers and returns their number."""
    packed = {n: m.integers() for n, m in model.named_modules() if getattr(m, "active", False)}
    torch.save(packed, folder / "decoder.pt")
    return sum(p.numel() for p in packed.values())


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = parse_settings()
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    model = VQVAE(cfg)
    optimizer = build_optimizer(model, cfg)
    hooks = [QuantizeLate(model, cfg.quantize_from), RestartCodes(model, optimizer, cfg)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
    rng = torch.Generator().manual_seed(cfg.seed)
    errors: list[torch.Tensor] = []
    first = evaluate(model, cfg)[0]
    for step in range(cfg.steps):
        for hook in hooks:
            hook.before(step)
        out = model(images(cfg.batch, cfg.image, cfg.kinds, rng))
        optimizer.zero_grad()
        out["loss"].backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for hook in hooks:
            hook.after(step)
        errors.append(out["error"].detach())
        if step % 5 == 0:
            used = perplexity(out["index"], cfg.codes)
            log.info("step %d error %.4f perplexity %.2f", step, errors[-1].item(), used)
    error, used = evaluate(model, cfg)
    with tempfile.TemporaryDirectory() as folder:
        count = export(model, Path(folder))
    log.info("error %.4f -> %.4f, perplexity %.2f, %d integers", first, error, used, count)


if __name__ == "__main__":
    main()
