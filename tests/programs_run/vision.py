"""Two vision networks from transformers, one after the other: a ResNet by SGD and a ViT by AdamW."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


def train(model, optimizer):
    model.train()
    for _ in range(8):
        images = torch.randn(8, 3, 32, 32)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main():
    torch.manual_seed(0)
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    )
    first = train(resnet, torch.optim.SGD(resnet.parameters(), lr=0.02, momentum=0.9, nesterov=True))
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=2,
        )
    )
    second = train(vit, torch.optim.AdamW(vit.parameters(), lr=1e-3, fused=True))
    print(f"resnet {first:.9f} vit {second:.9f}")
    print("optimizer steps: 8 8")


if __name__ == "__main__":
    main()
