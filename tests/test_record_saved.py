"""What backward remembers, against what saved-tensor hooks count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flights import plain_and_recorded, recorded
from trainings import batches, mlp


def test_saved_bytes_are_those_that_hooks_count(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(16, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = {p.data_ptr() for p in model.parameters()}
    counted: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            counted[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long))
    del kept
    with recorded(tmp_path) as flight:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert (saved.n, saved.method) == (3, "walk")
    assert saved.total == pytest.approx(sum(counted.values()), rel=0.001)


def test_saved_bytes_by_line_name_this_file(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(16, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path, lines=True) as flight:
        for _ in range(6):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert saved.method == "hooks"
    assert any("test_record_saved.py" in row.where for row in saved.rows)


def test_torch_func_goes_on_working_while_lines_are_watched(tmp_path: Path) -> None:
    def train() -> list[float]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: list[float] = []
        for x, _ in batches(6):
            optimizer.zero_grad()
            loss = model(torch.func.grad(lambda v: v.pow(2).sum())(x)).pow(2).mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        return losses

    plain, watched, _ = plain_and_recorded(tmp_path, train, lines=True)
    assert watched == plain


@pytest.mark.parametrize("until", [4, 99])
def test_lines_beside_torch_func_are_found_later_or_walked(tmp_path: Path, until: int) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path, lines=True) as flight:
        for number, (x, _) in enumerate(batches(12), 1):
            optimizer.zero_grad()
            if number <= until:
                x = torch.func.grad(lambda v: v.pow(2).sum())(x)
            model(x).pow(2).mean().backward()
            optimizer.step()
    (saved,) = flight.journal.saved
    assert saved.method == ("hooks" if until == 4 else "walk")
    assert saved.total > 0
    assert saved.count > 0
    assert [event.data["what"] for event in flight.journal.named("not_seen")] == (
        [] if until == 4 else ["saved bytes by line"]
    )
