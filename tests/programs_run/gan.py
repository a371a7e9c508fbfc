"""A GAN on a circle of points: two optimizers, three backwards a round, a detached fake."""

import torch
from torch import nn


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)


def main():
    torch.manual_seed(0)
    generator, discriminator = Generator(), Discriminator()
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    for _ in range(30):
        angle = torch.rand(64) * 6.2832
        real = torch.stack([angle.cos(), angle.sin()], 1)
        fake = generator(torch.randn(64, 4))
        opt_d.zero_grad()
        loss_real = bce(discriminator(real), torch.ones(64))
        loss_real.backward()
        loss_fake = bce(discriminator(fake.detach()), torch.zeros(64))
        loss_fake.backward()
        opt_d.step()
        opt_g.zero_grad()
        loss_g = bce(discriminator(fake), torch.ones(64))
        loss_g.backward()
        opt_g.step()
    print(f"d {loss_real.item() + loss_fake.item():.9f} g {loss_g.item():.9f}")
    print("optimizer steps: 30 30")


if __name__ == "__main__":
    main()
