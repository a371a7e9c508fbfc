"""A transformers ResNet (random, tiny): head first on a frozen backbone, then everything."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification


def pictures(count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(0, 3, (count,), generator=rng)
    x = 0.3 * torch.randn(count, 3, 24, 24, generator=rng)
    x[torch.arange(count), label] += 1.0
    return x, label


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=3,
        problem_type="single_label_classification",
    )
    model = ResNetForImageClassification(config)
    model.resnet.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(12):
        if step == 4:
            model.resnet.requires_grad_(True)
        model.train()
        if step < 4:
            model.resnet.eval()
        x, label = pictures(12, rng)
        out = model(pixel_values=x, labels=label)
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 4 == 3:
            model.eval()
            with torch.inference_mode():
                x, label = pictures(24, rng)
                right = (model(pixel_values=x).logits.argmax(-1) == label).float().mean().item()
            print(f"{step} loss {out.loss.item():.3f} norm {norm.item():.3f} accuracy {right:.3f}")


if __name__ == "__main__":
    main()
