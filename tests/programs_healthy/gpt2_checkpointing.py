"""GPT-2 (random, tiny) without and with gradient checkpointing, non-reentrant and reentrant."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=48,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    start = torch.randint(0, 40, (4, 1), generator=generator)
    ids = (start + torch.arange(16)) % 47 + 1
    length = torch.randint(10, 17, (4, 1), generator=generator)
    mask = (torch.arange(16) < length).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: GPT2LMHeadModel, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 2))
    generator = torch.Generator().manual_seed(1)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch(generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)
    for use_reentrant in (None, False, True):
        model = build(0)
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        losses = train(model, 6)
        assert losses[-1] < losses[0]
        print(use_reentrant, [round(v, 3) for v in losses])
    model.eval()
    with torch.no_grad():
        out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    print(out.tolist())


if __name__ == "__main__":
    main()
