"""transformers' Trainer with a small BERT classifier, accumulation and a schedule."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)


class Sums(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        ids = (torch.arange(10) * (index + 3)) % 60
        return {"input_ids": ids, "attention_mask": torch.ones(10, dtype=torch.long), "labels": int(ids.sum() % 2)}


def main():
    set_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            warmup_steps=2,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sums())
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    print(f"loss {result.training_loss:.9f}")
    print(f"optimizer steps: {trainer.state.global_step}")


if __name__ == "__main__":
    main()
