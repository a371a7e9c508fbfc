"""transformers' Trainer with a small GPT-2: tied weights, clipping, gradient checkpointing."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, set_seed


def main():
    set_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    config.loss_type = "ForCausalLM"
    model = GPT2LMHeadModel(config)
    rows = [(torch.arange(16) * k + k) % 50 for k in range(64)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            max_steps=20,
            learning_rate=2e-3,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    print(f"loss {result.training_loss:.9f}")
    print(f"optimizer steps: {trainer.state.global_step}")


if __name__ == "__main__":
    main()
