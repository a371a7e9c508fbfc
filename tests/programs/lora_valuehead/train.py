"""Tunes LoRA adapters of a small GPT-2 together with a head that scores sequences."""
import argparse
import logging
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

from config import AdapterConfig, TuneConfig
from data import SequenceSource
from models import ScoredLM
from stages import CheckpointStage, PreviewStage

torch.set_num_threads(1)
log = logging.getLogger("tune")


def warmup(cfg):
    def factor(step):
        if step < cfg.warmup:
            return (step + 1) / cfg.warmup
        return max(0.2, 1.0 - (step - cfg.warmup) / cfg.steps)
    return factor


@torch.no_grad()
def evaluate(model, source, cfg, batches=2):
    was_training = model.training
    model.eval()
    lm_sum = error = 0.0
    for _ in range(batches):
        tokens, score = source.batch(cfg.batch_size)
        lm_loss, guess = model(tokens)
        lm_sum += lm_loss.item()
        error += (guess - score).abs().mean().item()
    model.train(was_training)
    return {"lm": lm_sum / batches, "mae": error / batches}


def train_step(model, optimizer, batch, cfg):
    tokens, score = batch
    optimizer.zero_grad(set_to_none=True)
    lm_loss, guess = model(tokens)
    value_loss = F.smooth_l1_loss(guess, score)
    loss = lm_loss + cfg.value_weight * value_loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.trainable(), cfg.clip)
    optimizer.step()
    return {"lm": lm_loss.item(), "value": value_loss.item(), "norm": float(norm)}


def fit(model, cfg, folder):
    train_source = SequenceSource(cfg.vocab_size, cfg.seq_len, cfg.seed)
    test_source = SequenceSource(cfg.vocab_size, cfg.seq_len, cfg.seed + 1)
    optimizer = torch.optim.AdamW(model.groups(cfg))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup(cfg))
    stages = [
        PreviewStage(cfg.preview_at, test_source.prompts(6), cfg.preview_tokens, cfg.vocab_size),
        CheckpointStage({cfg.steps}, folder),
    ]
    history = []
    model.train()
    for step in range(1, cfg.steps + 1):
        row = train_step(model, optimizer, train_source.batch(cfg.batch_size), cfg)
        schedule.step()
        history.append(row)
        for stage in stages:
            if stage.due(step):
                stage.run(step, model)
        if step % 5 == 0:
            log.info("step %d: lm %.4f, value %.4f, norm %.3f, adapters %.4f", step, row["lm"],
                     row["value"], row["norm"], model.adapter_norm())
    return history, evaluate(model, test_source, cfg)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=TuneConfig.steps)
    parser.add_argument("--rank", type=int, default=AdapterConfig.rank)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg, adapter = TuneConfig(steps=options.steps), AdapterConfig(rank=options.rank)
    torch.manual_seed(cfg.seed)
    model = ScoredLM(cfg, adapter)
    log.info("%d of %d tensors are trained", len(model.trainable()), len(list(model.parameters())))
    with tempfile.TemporaryDirectory() as folder:
        history, report = fit(model, cfg, folder)
    log.info("lm %.4f -> %.4f", history[0]["lm"], history[-1]["lm"])
    log.info("test lm %.4f, score mae %.4f", report["lm"], report["mae"])


if __name__ == "__main__":
    main()
