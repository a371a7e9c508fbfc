"""Tiny random BERT and T5, each in a hand-written loop and with the Trainer."""

import tempfile

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Ascending(Dataset):
    """Runs of numbers: with holes to fill, or to be written backwards."""

    def __init__(self, count: int, holes: bool, length: int = 10, vocab: int = 32):
        rng = torch.Generator().manual_seed(count)
        start = torch.randint(4, vocab - length, (count, 1), generator=rng)
        ids = start + torch.arange(length)
        if holes:
            hidden = torch.rand(ids.shape, generator=rng) < 0.3
            hidden[:, 1] = True
            self.inputs, self.labels = ids.masked_fill(hidden, 3), ids.masked_fill(~hidden, -100)
        else:
            self.inputs, self.labels = ids, ids.flip(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.inputs[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[i]}


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def by_hand(model: PreTrainedModel, data: Dataset, steps: int = 6) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _, batch in zip(range(steps), DataLoader(data, batch_size=8, shuffle=True), strict=False):
        out = model(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(round(out.loss.item(), 3))
    return losses


class Losses(TrainerCallback):
    def __init__(self):
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [round(float(v), 3) for k, v in (logs or {}).items() if k in ("loss", "eval_loss")]


def by_trainer(model: PreTrainedModel, data: Dataset, held_out: Dataset, folder: str) -> list[float]:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        warmup_steps=2,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )
    watch = Losses()
    Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=held_out, callbacks=[watch]).train()
    return watch.values


def main() -> None:
    torch.set_num_threads(1)
    for build, holes in ((bert, True), (t5, False)):
        train, test = Ascending(64, holes), Ascending(16, holes)
        print(build.__name__, "by hand", by_hand(build(), train))
        with tempfile.TemporaryDirectory() as folder:
            print(build.__name__, "by trainer", by_trainer(build(), train, test, folder))


if __name__ == "__main__":
    main()
