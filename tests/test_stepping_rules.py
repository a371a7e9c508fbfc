"""What the rules about the order of a step read, from synthetic journals and lines of source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import journals
from gradctl._journal import Run
from gradctl._record import _loops
from gradctl._results import Finding
from gradctl._verdict import STEPPING, judge
from gradctl._verdict._lines import divided, scaled, stepped

Told = tuple[float, dict[str, Any]]


def site(number: int, line: int, text: str) -> Told:
    return journals.event("site", 0.1, s=number, file="/tmp/train.py", line=line, text=text)


SITES = [
    site(0, 10, "loss.backward()"),
    site(1, 11, "clip_grad_norm_(model.parameters(), 1.0)"),
    site(2, 12, "optimizer.step()"),
    site(3, 13, "scheduler.step()"),
    site(4, 14, "scaler.step(optimizer)"),
]
STEP = ["S", 2, "o", -1, -1]


def backward(flags: str, *, at: int = 0, loader: int = -1, reach: int = 1) -> list[Any]:
    return ["B", at, flags, loader, reach]


def told(folder: Path, *orders: dict[str, Any], others: list[Told] | None = None, **end: Any) -> list[Finding]:
    events = [*SITES]
    for number, order in enumerate(orders):
        fields = {"o": 0, "n": 1, "f": number, "after": "step", "end": "step", "count": 6, **order}
        events.append(journals.event("order", 0.2, **fields))
    names, shapes = journals.gpt(1)
    trainer = journals.Trainer(list(names), shapes, 60)
    ended = journals.goodbye({0: 60}, **end)
    found = judge(Run.load(journals.write(folder, [trainer], events=[*events, *(others or [])], end=ended)))
    return [finding for finding in found.findings if finding.slug in STEPPING]


def slugs(found: list[Finding]) -> list[str]:
    return [finding.slug for finding in found]


UNDIVIDED = {"loop": "counted", "ops": [backward("mr"), backward("mrc"), backward("mrc"), STEP]}


def test_undivided_means_of_microbatches_are_told(tmp_path: Path) -> None:
    [found] = told(tmp_path, UNDIVIDED)
    assert (found.slug, found.measured) == ("undivided-loss", {"microbatches": 3})
    assert found.primary is not None
    assert (Path(found.primary.file).name, found.primary.line) == ("train.py", 10)


@pytest.mark.parametrize(
    "ops",
    [
        [backward("mr"), backward("mr"), STEP],  # the second does not continue the first
        [backward("mr"), backward("mrc", reach=2), STEP],  # it reaches other parameters
        [backward("mr"), backward("mrc", at=1), STEP],  # it stands at another line
        [backward("mr"), backward("dr"), STEP],
        [backward("dr"), backward("drc"), STEP],
        [backward("tr"), backward("trc"), STEP],
        [backward("mr"), backward("mrck"), STEP],
        [backward("mgr"), backward("mgrc"), STEP],
        [backward("mlr"), backward("mlrc"), STEP],
        [backward("mqr"), backward("mqrc"), STEP],
        [backward("mrh"), backward("mrch"), STEP],
        [backward("mr"), backward("mrc"), ["S", 2, "oe", -1, -1]],
        [backward("mr"), backward("mrc"), ["C", 1, "oe", 0, -1], STEP],
        [backward("mr"), ["S", 2, "", -1, -1], backward("mrc"), STEP],
        [["S", 2, "o", -1, -1], backward("mir"), backward("mirc")],
        [backward("m"), backward("m"), STEP],
    ],
)
def test_what_may_be_meant_is_not_accused(ops: list[Any], tmp_path: Path) -> None:
    assert told(tmp_path, {"loop": "counted", "ops": ops}) == []


def test_several_backwards_without_evidence_of_microbatches_are_not_accused(tmp_path: Path) -> None:
    assert told(tmp_path, {"ops": [backward("mr"), backward("mrc"), STEP]}) == []


def test_a_batch_of_its_own_from_one_loader_is_evidence_and_one_each_from_two_is_not(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert slugs(told(one, {"ops": [backward("mr", loader=5), backward("mrc", loader=5), STEP]})) == ["undivided-loss"]
    assert told(two, {"ops": [backward("mr", loader=5), backward("mrc", loader=6), STEP]}) == []


def test_one_odd_group_is_no_habit(tmp_path: Path) -> None:
    assert told(tmp_path, {**UNDIVIDED, "count": 1}) == []
    fine = {"loop": "counted", "ops": [backward("dr"), backward("drc"), backward("drc"), STEP], "count": 12}
    again = tmp_path / "again"
    assert told(again, {**UNDIVIDED, "count": 2}, fine) == []


def test_microbatches_left_by_a_run_that_failed_are_not_told(tmp_path: Path) -> None:
    left = journals.event("left", 9.0, o=0, n=60, sites=[0, 0], count=2)
    fine = {"loop": "counted", "ops": [backward("dr"), backward("drc"), backward("drc"), STEP]}
    assert slugs(told(tmp_path, fine, others=[left])) == ["microbatches-dropped"]
    failed = tmp_path / "failed"
    assert told(failed, fine, others=[left], code=1) == []
    other = journals.event("left", 9.0, o=0, n=60, sites=[0, 1], count=2)
    whole = journals.event("left", 9.0, o=0, n=60, sites=[0, 0, 0], count=3)
    for number, event in enumerate((other, whole)):
        folder = tmp_path / str(number)
        assert told(folder, fine, others=[event]) == []


SCALED = [["x", 0, "", -1, -1], backward("msr")]
CLIP = ["C", 1, "o", 0, -1]
SCALER_STEP = [["t", 4, "o", -1, -1], ["S", 4, "vo", -1, -1], ["d", 3, "", -1, -1]]


def test_clipping_scaled_gradients_is_told_and_a_limit_that_may_be_scaled_is_not(tmp_path: Path) -> None:
    numbers = {"norm": 8192.0, "limit": 1.0, "scale": 16384.0}
    [found] = told(tmp_path, {"ops": [*SCALED, CLIP, *SCALER_STEP[:2]], **numbers})
    assert found.slug == "clip-before-unscale"
    assert "0.5 times the loss scale of 1.64e+04" in found.why
    assert "cut the update to 0.000122 of" in found.why
    for number, flags in enumerate(("ob", "oi", "oe", "on", "")):
        folder = tmp_path / str(number)
        assert told(folder, {"ops": [*SCALED, ["C", 1, flags, 0, -1], *SCALER_STEP[:2]], **numbers}) == []


def test_unscaling_first_is_right(tmp_path: Path) -> None:
    assert told(tmp_path, {"ops": [*SCALED, ["u", 4, "o", -1, -1], CLIP, *SCALER_STEP[:2]]}) == []


def test_a_scheduler_that_moves_once_an_epoch_may_meet_a_skipped_step(tmp_path: Path) -> None:
    move = ["L", 3, "o", 9, -1]
    skipped = {"after": "skip", "count": 1, "ops": [move, *SCALED, *SCALER_STEP[:2]]}
    still = {"after": "step", "count": 40, "ops": [*SCALED, *SCALER_STEP[:2]]}
    moved = {"after": "step", "count": 40, "ops": [move, *SCALED, *SCALER_STEP[:2]]}
    assert told(tmp_path, skipped, still) == []
    each = tmp_path / "each"
    assert slugs(told(each, skipped, moved)) == ["scheduler-after-skip"]


def test_a_finding_needs_its_line(tmp_path: Path) -> None:
    nowhere = [backward("mr", at=99), backward("mrc", at=99), STEP]
    assert told(tmp_path, {"loop": "counted", "ops": nowhere}) == []


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
NAMES = ("o", "n", "f", "count", "after", "end", "loop", "norm", "limit", "scale", "ops", "s", "file", "line", "sites")


@given(
    kind=st.sampled_from(["order", "site", "left", "cleared", "unscale_twice", "norm_overflow"]),
    fields=st.dictionaries(st.sampled_from(NAMES), ANY, max_size=8),
)
def test_a_damaged_journal_is_judged_without_a_failure(
    kind: str, fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = journals.event(kind, 0.3, **{"o": 0, **fields})
    found = told(tmp_path_factory.mktemp("damaged"), UNDIVIDED, others=[damaged])
    assert all(finding.primary is not None for finding in found)


@pytest.mark.parametrize(
    ("line", "mended"),
    [
        ("loss.backward()", "(loss / 4).backward()"),
        ("self.loss(out, y).backward()", "(self.loss(out, y) / 4).backward()"),
        ("(a + b).backward()", "((a + b) / 4).backward()"),
        ("loss.backward(retain_graph=True)", "(loss / 4).backward(retain_graph=True)"),
        ("scaler.scale(loss).backward()", "scaler.scale(loss / 4).backward()"),
        ("self.scaler.scale(a + b).backward()", "self.scaler.scale((a + b) / 4).backward()"),
        ("train_step(batch)", ""),
        ("x = f(loss.backward())", ""),
        (")).mean().backward()", ""),
    ],
)
def test_a_line_is_written_with_its_loss_divided(line: str, mended: str) -> None:
    assert divided(line, 4) == mended


def test_lines_are_written_with_the_scaler() -> None:
    assert scaled("loss.backward()", "scaler") == "scaler.scale(loss).backward()"
    assert scaled("step(loss)", "scaler") == ""
    assert stepped("self.optimizers[0].step()") == "scaler.step(self.optimizers[0])"
    assert stepped("run()") == "scaler.step(optimizer)"


LOOPS = {
    "counted": "for i in range(9):\n    loss.backward()  # B\n    if (i + 1) % 4 == 0:\n        opt.step()  # S\n",
    "counted by a name": "while True:\n    loss.backward()  # B\n    if done(accumulated):\n        opt.step()  # S\n",
    "counted by leaving": (
        "for i in x:\n    loss.backward()  # B\n    if i % 4:\n        continue\n    opt.step()  # S\n"
    ),
    "named": "for e in r:\n    for micro in range(4):\n        loss.backward()  # B\n    opt.step()  # S\n",
    "split": "for e in r:\n    for p in e.split(4):\n        loss.backward()  # B\n    opt.step()  # S\n",
    "": "for e in r:\n    for task in tasks:\n        loss.backward()  # B\n    opt.step()  # S\n",
    " each": "for e in r:\n    loss.backward()  # B\n    if ok:\n        opt.step()  # S\n",
    " both": "for i in r:\n    if i % 4 == 0:\n        loss.backward()  # B\n        opt.step()  # S\n",
    " state": (
        "for e in r:\n    for p in e.split(4):\n"
        "        loss.backward()  # B\n        h = h.detach()\n    opt.step()  # S\n"
    ),
    " broken": "for e in (\n    loss.backward()  # B\n    opt.step()  # S\n",
    " none": "loss.backward()  # B\nopt.step()  # S\n",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_the_source_tells_how_a_step_follows_its_backwards(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "loop.py"
    file.write_text(LOOPS[kind])
    lines = LOOPS[kind].splitlines()
    at = {mark: next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {mark}")) for mark in "BS"}
    assert _loops.how(str(file), at["B"], at["S"]) == kind.partition(" ")[0]
