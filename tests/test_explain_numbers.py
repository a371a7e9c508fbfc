"""Numbers that went wrong: which line is blamed for NaN, zeros and wrong gradients, and what is left unblamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import explained
from explain_numbers_programs import BROKEN, HEAD, HEALTHY
from gradctl._lineage import Trace
from gradctl._lineage._numbers import magnitude
from gradctl._results import Finding


def findings(tmp_path: Path, body: str) -> list[Finding]:
    return explained.findings(tmp_path, HEAD + body.lstrip("\n"))


def line_of(body: str) -> int:
    return explained.line_of(HEAD + body.lstrip("\n"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_the_cause_is_found_at_its_line(name: str, tmp_path: Path) -> None:
    slug, body = BROKEN[name]
    first = findings(tmp_path, body)[0]
    assert first.slug == slug
    assert first.primary is not None
    assert (first.primary.file, first.primary.line) == ("program.py", line_of(body))
    assert first.confidence >= 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_meant_is_not_blamed(name: str, tmp_path: Path) -> None:
    assert findings(tmp_path, HEALTHY[name]) == []


def test_a_size_is_zero_tiny_or_not_finite_exactly_when_an_entry_says_so() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        zeros = torch.zeros(4, 6, dtype=dtype)
        assert magnitude(zeros) == 0.0
        for value in (float("nan"), float("inf"), float("-inf"), 1.0, -1e-6):
            one = zeros.clone()
            one[2, 3] = value
            expected = one[2, 3].abs().item()
            assert magnitude(one.t()) == pytest.approx(expected, nan_ok=True)
    assert magnitude(torch.tensor([1.0, -1.0])) == 1.0
    assert magnitude(torch.tensor([float("inf"), float("-inf")])) != magnitude(torch.tensor([1.0]))
    assert magnitude(torch.full((4096,), 60000.0, dtype=torch.float16)) < float("inf")
    assert magnitude(torch.full((8,), 1e-40)) == pytest.approx(1e-40, rel=1e-3)


def test_looking_at_numbers_leaves_gradients_bitwise_equal() -> None:
    def trained(*, traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        trace = Trace()
        if traced:
            trace.start()
        try:
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(9, 5)).pow(2).mean().backward()
                optimizer.step()
        finally:
            trace.stop()
        assert trace.tracer.faults == []
        return [p.detach().clone() for p in model.parameters()]

    for plain, looked_at in zip(trained(traced=False), trained(traced=True), strict=True):
        assert torch.equal(plain, looked_at)


def test_a_checkpoint_that_may_be_unpacked_once_still_runs(tmp_path: Path) -> None:
    body = HEALTHY["checkpoint_with_an_edit_through_data"].replace("-100,100", "-0.1,0.1")
    assert findings(tmp_path, body) == []


def test_the_step_is_named_at_which_it_began(tmp_path: Path) -> None:
    slug, body = BROKEN["softmax_of_a_masked_row"]
    first = findings(tmp_path, body)[0]
    assert first.slug == slug
    assert first.symptom.startswith("from step 4 on")


def test_the_operand_is_told(tmp_path: Path) -> None:
    _, body = BROKEN["log_of_zero"]
    assert "exactly 0" in findings(tmp_path, body)[0].why


@pytest.mark.parametrize(
    "loss",
    [
        "y=m(x); t=y.detach()*2; loss=((y-t)**2).mean()+y.pow(2).mean()",
        "y=m(x); loss=(y-y.detach().mean()*0-2*y).sum()+y.sum()",
        "y=m(x); loss=(y-y.exp().mean()).sum()-y.sum()+y.exp().sum()",
        "y=m(x).expand(4,3); p=y.softmax(-1); loss=p.mean()*0.1+y.mean()-y.mean()",
    ],
)
def test_terms_that_cancel_are_not_blamed_on_a_normalisation(loss: str, tmp_path: Path) -> None:
    body = f"""
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(), lr=0.05)
for i in range(8):
    x=torch.ones(1,4)
    {loss}
    o.zero_grad(); loss.backward(); o.step()
"""
    assert [found.slug for found in findings(tmp_path, body)] == []


def test_a_single_entry_beside_another_way_is_not_blamed_for_a_small_gradient(tmp_path: Path) -> None:
    body = """
f=nn.Linear(4,1)
o=torch.optim.SGD(f.parameters(), lr=0.05)
g=nn.Parameter(torch.zeros(4,1))
for i in range(8):
    y=f(torch.ones(1,4))
    loss=(y.softmax(-1)*2).sum()+y.sum()*1e-9
    o.zero_grad(); loss.backward(); o.step()
"""
    assert findings(tmp_path, body) == []


@pytest.mark.parametrize("cast", ["h=h.half() # cast", "h=h.to(torch.float16) # cast", "h=h.to(x.half()) # cast"])
def test_the_cast_that_made_a_value_half_is_shown_where_its_gradient_underflows(cast: str, tmp_path: Path) -> None:
    body = f"""
f=nn.Linear(4,4)
o=torch.optim.SGD(f.parameters(), lr=0.05)
for i in range(8):
    x=torch.randn(8,4)
    h=f(x)
    {cast}
    h=h+1
    loss=h.float().pow(2).mean()*1e-8 # cause
    o.zero_grad(); loss.backward(); o.step()
"""
    first = findings(tmp_path, body)[0]
    assert (first.slug, first.primary and first.primary.line) == ("zero_grad_underflow", line_of(body))
    line = 1 + next(n for n, text in enumerate((HEAD + body.lstrip()).splitlines()) if "# cast" in text)
    assert [(span.line, span.role) for span in first.evidence] == [(line, "where the value became float16")]


SKIPS = """
m=nn.Linear(4,1)
d=nn.Linear(4,1) if {other} else nn.Identity()
o=torch.optim.SGD([*m.parameters(), *d.parameters()], lr=0.1)
for i in range(40):
    y=m(torch.randn(8,4))
    if i>={since}: y=y*0
    loss=y.pow(2).sum(-1).sqrt().mean() # cause
    o.zero_grad()
    loss.backward()
    if {other}:
        other=d(torch.randn(8,4)).pow(2).mean()
        other.backward()
    if torch.isfinite(m.weight.grad).all(): o.step()
"""


@pytest.mark.parametrize("since", [30, 37])
@pytest.mark.parametrize("other", [False, True])
def test_a_gradient_that_stays_broken_to_the_end_is_told_though_the_program_skips_it(
    since: int, other: bool, tmp_path: Path
) -> None:
    body = SKIPS.format(since=since, other=other)
    [found] = findings(tmp_path, body)
    assert (found.slug, found.severity) == ("nan_sqrt", "warning")
    assert found.primary is not None
    assert found.primary.line == line_of(body)
    assert found.symptom.startswith(f"from step {since + 1} on, skipped by the program: ")


@pytest.mark.parametrize("other", [False, True])
def test_two_skipped_steps_at_the_end_are_left_alone(other: bool, tmp_path: Path) -> None:
    assert findings(tmp_path, SKIPS.format(since=38, other=other)) == []
