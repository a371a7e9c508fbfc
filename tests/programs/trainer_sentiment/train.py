"""Fine-tunes a small BERT classifier on synthetic reviews with transformers' Trainer."""
import argparse
import logging
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from callbacks import PartsRecorder, RepresentationDrift, WeightAverage
from config import RunConfig
from data import Reviews
from trainer import OrdinalTrainer, compute_metrics

torch.set_num_threads(1)
log = logging.getLogger("sentiment")


def build_model(cfg):
    enc = cfg.encoder
    model = BertForSequenceClassification(BertConfig(
        vocab_size=enc.vocab_size,
        hidden_size=enc.hidden_size,
        num_hidden_layers=enc.layers,
        num_attention_heads=enc.heads,
        intermediate_size=enc.intermediate,
        max_position_embeddings=enc.max_positions,
        hidden_dropout_prob=enc.dropout,
        attention_probs_dropout_prob=enc.dropout,
        num_labels=len(cfg.labels),
        id2label=dict(enumerate(cfg.labels)),
        label2id={name: i for i, name in enumerate(cfg.labels)},
    ))
    for name, param in model.named_parameters():
        if name.startswith(cfg.frozen_prefixes):
            param.requires_grad_(False)
    return model


def training_arguments(cfg, folder):
    return TrainingArguments(
        output_dir=folder,
        max_steps=cfg.max_steps,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size * 2,
        learning_rate=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=cfg.eval_every,
        logging_steps=cfg.eval_every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=cfg.seed,
    )


def probe_batch(dataset, count=8):
    rows = [dataset[i] for i in range(count)]
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=RunConfig.max_steps)
    parser.add_argument("--seed", type=int, default=RunConfig.seed)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = RunConfig(max_steps=options.max_steps, seed=options.seed)
    set_seed(cfg.seed)
    train_set = Reviews(cfg.train_size, cfg.seq_len, cfg.seed)
    eval_set = Reviews(cfg.eval_size, cfg.seq_len, cfg.seed + 1)
    model = build_model(cfg)
    recorder, average = PartsRecorder(), WeightAverage()
    drift = RepresentationDrift(probe_batch(eval_set), cfg.drift_limit)

    with tempfile.TemporaryDirectory() as folder:
        trainer = OrdinalTrainer(
            model=model,
            args=training_arguments(cfg, folder),
            train_dataset=train_set,
            eval_dataset=eval_set,
            compute_metrics=compute_metrics,
            callbacks=[recorder, average, drift],
            label_smoothing=cfg.label_smoothing,
            ordinal_weight=cfg.ordinal_weight,
        )
        recorder.bind(trainer)
        trainer.train()
        report = trainer.evaluate()
        torch.save(average.shadow, os.path.join(folder, "average.pt"))

    first, last = recorder.history[0][1], recorder.history[-1][1]
    log.info("ce %.4f -> %.4f", first["ce"], last["ce"])
    log.info("accuracy %.3f, drift %s", report["eval_accuracy"],
             ", ".join(f"{value:.4f}" for _, value in drift.values))


if __name__ == "__main__":
    main()
