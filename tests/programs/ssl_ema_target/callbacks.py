"""Things that happen around the steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Callback:
    def on_step(self, trainer, out: dict[str, torch.Tensor]) -> None: ...

    def on_end(self, trainer) -> None: ...


class History(Callback):
    def __init__(self):
        self.rows: list[dict[str, torch.Tensor]] = []

    def on_step(self, trainer, out: dict[str, torch.Tensor]) -> None:
        self.rows.append({k: v.detach() for k, v in out.items()})

    def mean(self, key: str, last: int = 4) -> float:
        return torch.stack([r[key] for r in self.rows[-last:]]).mean().item()


class CollapseWatch(Callback):
    """Stops a run whose projections have all become one vector."""

    def __init__(self, floor: float = 1e-3):
        self.floor = floor

    def on_step(self, trainer, out: dict[str, torch.Tensor]) -> None:
        if float(out["spread"]) < self.floor:
            raise RuntimeError("the representation has collapsed")


class Neighbours(Callback):
    """Accuracy of nearest neighbours on the features of the encoder."""

    def __init__(self, k: int):
        self.k, self.accuracy = k, float("nan")

    @torch.inference_mode()
    def on_end(self, trainer) -> None:
        model = trainer.model.eval()
        bank_x, bank_y = trainer.data.clean(96)
        x, y = trainer.data.clean(64)
        bank, query = (F.normalize(model.encoder(v), dim=1) for v in (bank_x, x))
        votes = bank_y[(query @ bank.T).topk(self.k, dim=1).indices]
        self.accuracy = (votes.mode(dim=1).values == y).float().mean().item()
        model.train()
