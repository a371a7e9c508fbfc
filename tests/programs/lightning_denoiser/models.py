"""Convolutional autoencoder for one-dimensional signals."""
import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(3, channels)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv.bias.data.zero_()

    def forward(self, x):
        return x + self.conv(F.gelu(self.norm(x)))


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 5, padding=2)
        self.block = ResidualBlock(channels)
        self.down = nn.Conv1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x):
        return self.down(self.block(self.stem(x)))


class Decoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.up = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)
        self.block = ResidualBlock(channels)
        self.out = nn.Conv1d(channels, 1, 5, padding=2)

    def forward(self, z):
        return self.out(self.block(self.up(z)))


def spectral_distance(a, b):
    mag_a = torch.fft.rfft(a, dim=-1).abs()
    mag_b = torch.fft.rfft(b, dim=-1).abs()
    return F.l1_loss(torch.log1p(mag_a), torch.log1p(mag_b))
