"""A small residual backbone with the usual freezing switches."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = nn.Conv2d(cin, cout, 1, stride, bias=False) if stride > 1 or cin != cout else None

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.down is None else self.down(x)))


class Backbone(nn.Module):
    """``frozen_stages``: -1 freezes nothing, 0 the stem, 1 the stem and the first stage, and so on.

    This is how the backbone starts out; a training plan may open the frozen parts later.
    With ``norm_eval`` the running statistics of all batch norms stay as they are.
    """

    def __init__(self, channels=3, width=8, stages=3, frozen_stages=-1, norm_eval=False):
        super().__init__()
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.stages = stages
        for i in range(1, stages + 1):
            cin, cout = width * max(1, 2 ** (i - 2)), width * 2 ** (i - 1)
            setattr(self, f"stage{i}", Block(cin, cout, stride=1 if i == 1 else 2))
        self.out_channels = width * 2 ** (stages - 1)
        self._freeze_stages()

    def _freeze_stages(self):
        parts = [self.stem] if self.frozen_stages >= 0 else []
        parts += [getattr(self, f"stage{i}") for i in range(1, min(self.frozen_stages, self.stages) + 1)]
        for part in parts:
            part.eval()
            for p in part.parameters():
                p.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def forward(self, x):
        x = F.relu(self.stem(x))
        for i in range(1, self.stages + 1):
            x = getattr(self, f"stage{i}")(x)
        return x


class Classifier(nn.Module):
    def __init__(self, backbone, classes, dropout=0.2):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(backbone.out_channels, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, classes)
        )

    def forward(self, x):
        return self.head(self.backbone(x).mean(dim=(2, 3)))


def pretrained_state(backbone, seed):
    """Stand-in for a downloaded checkpoint: He initialisation from another seed."""
    gen = torch.Generator().manual_seed(seed)
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    for key, value in state.items():
        if value.dim() == 4:
            fan = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=gen) * (2.0 / fan) ** 0.5)
    return state
