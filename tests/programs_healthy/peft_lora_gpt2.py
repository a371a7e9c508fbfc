"""LoRA on a random GPT-2 with reentrant checkpointing and input gradients switched on; then merged."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config)


def batch(rng: torch.Generator) -> dict[str, torch.Tensor]:
    ids = (torch.randint(0, 39, (4, 1), generator=rng) + 3 * torch.arange(12)) % 39 + 1
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    torch.set_num_threads(1)
    model = base()
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type=TaskType.CAUSAL_LM,
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    rng = torch.Generator().manual_seed(1)
    model.train()
    for step in range(14):
        loss = model(**batch(rng)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{step} loss {loss.item():.3f} norm {norm.item():.3f}")

    model.eval()
    probe = batch(rng)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(**probe).loss
        model.save_pretrained(folder)
        merged = PeftModel.from_pretrained(base(), folder).merge_and_unload().eval()
        after = merged(**probe).loss
    assert torch.allclose(before, after, atol=1e-4)
    print(f"adapter {before.item():.4f}, merged {after.item():.4f}")


if __name__ == "__main__":
    main()
