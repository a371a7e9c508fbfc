"""Truncated backpropagation with accumulated gradients and a warmup that starts at zero."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path

import torch
from corpus import Corpus
from model import LanguageModel
from objectives import language, regularisers, triplet
from options import Options

log = logging.getLogger("lm")


class Meter:
    """Keeps tensors until somebody asks, so that steps do not wait."""

    def __init__(self):
        self.values: dict[str, list[torch.Tensor]] = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def drain(self) -> dict[str, float]:
        out = {name: torch.stack(v).mean().item() for name, v in self.values.items()}
        self.values.clear()
        return out


def warm(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: 0 in the first step, then up, then down."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    def __init__(self, opt: Options):
        self.opt = opt
        self.corpus = Corpus(opt.vocab, authors=4, seed=opt.seed)
        self.model = LanguageModel(opt)
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 1e-3}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=opt.lr)
        total = opt.epochs * opt.length // opt.window // opt.accumulate
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm(step, opt.warmup, total)
        )
        self.meter, self.quiet = Meter(), 0

    def window_loss(self, tokens, target, author, state):
        out = self.model(tokens, state)
        style, active = triplet(self.model.style(out["hidden"]), author, self.opt.margin)
        lm = language(out["logits"], target)
        loss = lm + self.opt.style_weight * style
        loss = loss + regularisers(out, self.opt.activity, self.opt.slowness)
        self.meter.add(lm=lm, style=style)
        self.quiet += active == 0
        return loss, out["state"]

    def epoch(self) -> dict[str, float]:
        opt, state = self.opt, None
        self.model.train()
        self.optimizer.zero_grad()
        for number, batch in enumerate(self.corpus.windows(opt.batch, opt.length, opt.window)):
            loss, state = self.window_loss(*batch, self.model.cut(state))
            (loss / opt.accumulate).backward()
            if (number + 1) % opt.accumulate == 0:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), opt.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.meter.add(norm=norm)
        return self.meter.drain()

    @torch.no_grad()
    def perplexity(self) -> float:
        self.model.eval()
        state, losses = None, []
        for tokens, target, _ in self.corpus.windows(self.opt.batch, 60, self.opt.window):
            out = self.model(tokens, state)
            state = out["state"]
            losses.append(language(out["logits"], target))
        return torch.stack(losses).mean().exp().item()

    @torch.no_grad()
    def generate(self, count: int = 12) -> list[int]:
        self.model.eval()
        token, state, words = torch.zeros(1, 1, dtype=torch.long), None, []
        for _ in range(count):
            out = self.model(token, state)
            token, state = out["logits"][-1:].argmax(dim=-1), out["state"]
            words.append(token.item())
        return words


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opt = Options.parse()
    torch.set_num_threads(1)
    torch.manual_seed(opt.seed)
    trainer = Trainer(opt)
    best = math.inf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.pt"
        for number in range(opt.epochs):
            shown = {name: round(value, 4) for name, value in trainer.epoch().items()}
            perplexity = trainer.perplexity()
            if perplexity < best:
                best = perplexity
                torch.save(trainer.model.state_dict(), path)
            log.info("epoch %d %s perplexity %.2f", number, shown, perplexity)
        trainer.model.load_state_dict(torch.load(path, weights_only=True))
    log.info("%d windows without a broken triplet; text %s", trainer.quiet, trainer.generate())


if __name__ == "__main__":
    main()
