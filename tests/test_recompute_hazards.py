"""Each program of `hazards_recompute`: the plain program's gradients, buffers and traces, or an error that says why."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradctl import StaleSource
from gradctl._recompute import recompute
from hazards_recompute import LARGE, SMALL, Hazard, Program, Region, Size
from hazards_recompute_more import HAZARDS

# torch compiles decompositions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
STEPS = 3
Outcome = list[Tensor] | BaseException


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Regions:
    """Gives the n-th call of each step the same region, so that later steps follow what the first one taught it."""

    def __init__(self, verify: Any, keep: Any = "nothing") -> None:
        self.made: list[Any] = []
        self.verify, self.keep, self.call = verify, keep, 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.call == len(self.made):
            self.made.append(recompute(lambda *a, **k: None, verify=self.verify, keep=self.keep))
        region = self.made[self.call]
        self.call += 1
        region.function = lambda *a, **k: function(*a, **k)
        return region(*args, **kwargs)


def run(build: Callable[[Size], Program], size: Size, region: Region) -> list[Outcome]:
    torch.manual_seed(0)
    random.seed(3)
    np.random.seed(0)
    program = build(size)
    leaves = [p for w in program.watched for p in (w.parameters() if isinstance(w, nn.Module) else [w])]
    buffers = [b for w in program.watched if isinstance(w, nn.Module) for b in w.buffers()]
    outcomes: list[Outcome] = []
    for _ in range(STEPS):
        for leaf in leaves:
            leaf.grad = None
        if isinstance(region, Regions):
            region.call = 0
        try:
            loss = program.step(region)
            litter = [torch.randn(64, 64) for _ in range(20)]
            program.between()
            loss.backward()
            del litter
        except RuntimeError as error:
            outcomes.append(error)
            continue
        seen = [loss.detach()] + [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
        seen += [buffer.clone() for buffer in buffers] + [torch.tensor(program.effects(), dtype=torch.float64)]
        drawn = torch.tensor([random.getstate()[1][-1], *np.random.get_state()[1][:4].astype(int).tolist()])  # type: ignore[index]
        outcomes.append([*seen, drawn, torch.get_rng_state()])
    return outcomes


def same(one: Outcome, other: Outcome) -> bool:
    if isinstance(one, BaseException) or isinstance(other, BaseException):
        return False
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def is_refused(found: Hazard, size: Size) -> bool:
    return found.refused is not None and (size is LARGE or not found.only_large)


@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", HAZARDS)
def test_each_program_gives_plain_gradients_or_the_error_it_must(name: str, size: Size, verify: str) -> None:
    found = HAZARDS[name]
    plain = run(found.build, size, plainly)
    ours = run(found.build, size, Regions(verify))
    for step, (expected, outcome) in enumerate(zip(plain, ours, strict=True)):
        if not is_refused(found, size):
            if isinstance(outcome, BaseException):
                raise outcome
            assert same(expected, outcome), f"step {step} differs"
        elif found.unseen and verify == "off":
            assert not same(expected, outcome), "`off` sees what it says it cannot see"
        else:
            assert isinstance(outcome, StaleSource), f"step {step} was not refused: {outcome!r}"
            assert found.refused in str(outcome)
            assert outcome.fix


@pytest.mark.parametrize(
    "keep", ["matmul", "attention", lambda made: made.name == "aten.tanh"], ids=["mm", "att", "own"]
)
@pytest.mark.parametrize("name", [name for name, found in HAZARDS.items() if found.refused is None])
def test_what_is_kept_changes_no_gradient(name: str, keep: Any) -> None:
    plain = run(HAZARDS[name].build, SMALL, plainly)
    ours = run(HAZARDS[name].build, SMALL, Regions("sample", keep))
    for expected, outcome in zip(plain, ours, strict=True):
        if isinstance(outcome, BaseException):
            raise outcome
        assert same(expected, outcome)


def test_the_list_holds_every_known_hazard() -> None:
    assert len(HAZARDS) >= 34 + 14 + 12
