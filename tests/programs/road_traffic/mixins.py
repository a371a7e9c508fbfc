"""Behaviour shared by the message-passing layers."""

import torch


class ScatterMixin:
    """Reductions of edge values over their destination node."""

    @staticmethod
    def scatter_sum(values, index, size):
        out = values.new_zeros(size, *values.shape[1:])
        return out.index_add_(0, index, values)

    @classmethod
    def scatter_mean(cls, values, index, size):
        count = cls.scatter_sum(torch.ones_like(index, dtype=values.dtype), index, size)
        return cls.scatter_sum(values, index, size) / count.clamp_(min=1.0)[:, None]

    @staticmethod
    def scatter_max(values, index, size):
        low = values.new_full((size, *values.shape[1:]), float("-inf"))
        spread = index[:, None].expand_as(values)
        return low.scatter_reduce_(0, spread, values.detach(), reduce="amax")


class SparsityMixin:
    """Drops weak edges once the schedule has passed the dense phase."""

    keep_above = 0.0

    def set_sparsity(self, threshold):
        self.keep_above = float(threshold)

    def sparsify(self, gate):
        """Zero the gates that lie under the threshold; ``last_kept`` is for the log."""
        if self.keep_above <= 0.0:
            return gate
        weak = gate < self.keep_above
        self.last_kept = 1.0 - weak.float().mean().item()
        gate[weak] = 0.0
        return gate


class ResidualMixin:
    """Adds the input back, through a projection where the widths differ."""

    def residual(self, x, update):
        return update + (self.shortcut(x) if self.shortcut is not None else x)
