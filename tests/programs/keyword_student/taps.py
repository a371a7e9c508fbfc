"""Named access to intermediate features of a network."""


class FeatureTap:
    """Remembers the output of one submodule through a forward hook.

    ``value`` is what the losses read. Taps are cleared by :meth:`clear` at the start of every batch.
    """

    live = False

    def __init__(self, module, name):
        self.name = name
        self._output = None
        self._handle = module.register_forward_hook(self._remember)

    def _remember(self, module, inputs, output):
        self._output = output

    @property
    def value(self):
        if self._output is None:
            raise RuntimeError(f"{self.name}: no forward pass since the last clear()")
        if self.live:
            return self._output
        return self._output.detach()

    def clear(self):
        self._output = None

    def close(self):
        self._handle.remove()


class PooledTap(FeatureTap):
    """A tap on ``[batch, channel, time]`` features, averaged over time."""

    @property
    def value(self):
        return super().value.mean(dim=-1)


class RelationTap(FeatureTap):
    """A tap that keeps the pairwise cosine similarities inside the batch."""

    live = True

    @property
    def value(self):
        feat = super().value.flatten(1)
        feat = feat / feat.norm(dim=1, keepdim=True).clamp(min=1e-6)
        return feat @ feat.T


TAPS = {"plain": FeatureTap, "pooled": PooledTap, "relation": RelationTap}


def attach(net, plan):
    """``plan`` maps a name to (kind, dotted path); returns the taps by name."""
    modules = dict(net.named_modules())
    return {name: TAPS[kind](modules[path], name) for name, (kind, path) in plan.items()}
