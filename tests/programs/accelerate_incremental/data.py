"""Gaussian clusters, one per class, with fixed centres."""
import torch
from torch.utils.data import DataLoader, TensorDataset


class ClusterWorld:
    def __init__(self, features, max_classes, seed):
        self.gen = torch.Generator().manual_seed(seed)
        self.centres = 1.5 * torch.randn(max_classes, features, generator=self.gen)

    def sample(self, classes, per_class):
        labels = torch.arange(classes).repeat_interleave(per_class)
        noise = torch.randn(len(labels), self.centres.shape[1], generator=self.gen)
        return TensorDataset(self.centres[labels] + noise, labels)

    def loaders(self, stage, batch_size):
        train = self.sample(stage.classes, stage.per_class)
        test = self.sample(stage.classes, stage.per_class // 3)
        return (
            DataLoader(train, batch_size=batch_size, shuffle=True, generator=self.gen),
            DataLoader(test, batch_size=batch_size * 2),
        )
