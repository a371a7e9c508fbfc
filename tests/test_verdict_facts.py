"""Exact facts that a short or odd run shows: what was never stepped, last losses, zeros, scalers, failing ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import journals
from gradctl._journal import Run
from gradctl._verdict import Verdict, judge
from gradctl.report import summary
from journals import NAN, Trainer, event, falling, goodbye, header

SHAPES = [[8, 4], [4], [4, 2], [2]]
NAMES: list[str | None] = ["a.weight", "a.bias", "b.weight", "b.bias"]


def trainer(steps: int = 60, **more: Any) -> Trainer:
    return Trainer(list(NAMES), SHAPES, steps, **more)


def verdict(directory: Path) -> Verdict:
    return judge(Run.load(directory))


def slugs(found: Verdict, *severities: str) -> list[str]:
    return [f.slug for f in found.findings if not severities or f.severity in severities]


def figure(found: Verdict, label: str) -> tuple[str, str]:
    return next((f.value, f.detail) for f in found.figures if f.label == label)


def one_block(first: int, count: int, loss: list[float] | None, bad: int, **more: Any) -> tuple[float, dict[str, Any]]:
    """A block written by hand: a mean over several losses."""
    block = {"k": "b", "o": 0, "n": first, "c": count, "t": 1 + first / 100, "l": loss, "bad": bad, "mb": count}
    return block["t"], block | {"ms": [1.0, 0.4, 0.1, 0.0]} | more


def only_blocks(directory: Path, blocks: list[tuple[float, dict[str, Any]]], events: Any = (), **end: Any) -> Path:
    """A run of which nothing but `blocks` (and `events`) was recorded, beside one row."""
    row = {"k": "row", "o": 0, "n": 1, "t": 0.9, "g": [-10] * 4}
    return unmeasured(directory, blocks, [(0.9, row), *events], **end)


def unmeasured(directory: Path, blocks: list[tuple[float, dict[str, Any]]], events: Any = (), **end: Any) -> Path:
    """A run of which no gradient was measured."""
    opt = {"k": "opt", "o": 0, "cls": "SGD", "names": NAMES, "shapes": SHAPES, "numel": 46, "source": "optimizer"}
    steps = max(block["n"] + block["c"] - 1 for _, block in blocks)
    return journals.write(directory, events=[(0.5, opt), *blocks, *events], end=goodbye({0: steps}, **end))


# --- an optimizer that never stepped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [True, False])
def test_a_forgotten_step_is_told_whether_or_not_the_backwards_were_recorded(tmp_path: Path, seen: bool) -> None:
    stream = [trainer(40, cls="backward", source="backward", norms=lambda n: [None] * 4)] if seen else []
    why = ["the optimizer's steps", "1 optimizers were made and none has stepped"]
    events = [event("never_stepped", 5.0, cls="AdamW", backwards=40, count=1)]
    end = goodbye({0: 40} if seen else {}, backwards=40, not_seen=[why])
    found = verdict(journals.write(tmp_path, stream, events=events, end=end))
    assert found.sentence == "AdamW was made and never stepped: 40 backward passes changed nothing."
    assert (found.level, slugs(found)) == ("error", ["never-stepped"])
    assert "optimizer.step()" in found.findings[0].fix


def test_a_script_that_failed_before_its_first_step_forgot_nothing(tmp_path: Path) -> None:
    exc = {"type": "RuntimeError", "message": "", "file": "/home/ada/project/train.py", "line": 12}
    events = [event("never_stepped", 5.0, cls="AdamW", backwards=1, count=1)]
    found = verdict(journals.write(tmp_path, events=events, end=goodbye({}, backwards=1, code=1, exc=exc)))
    assert found.sentence == "The script raised RuntimeError at train.py:12 before any step."
    assert slugs(found) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loop_by_hand_of_two_steps_is_not_accused(tmp_path: Path, steps: int) -> None:
    one = trainer(steps, cls="backward", source="backward", norms=lambda n: [None] * 4)
    events = [event("none", 2.0, o=0, n=steps, params=NAMES, count=4)]
    found = verdict(journals.write(tmp_path, [one], events=events))
    assert slugs(found, "error", "warning") == []


def test_backwards_whose_gradients_were_never_measured_are_not_accused(tmp_path: Path) -> None:
    directory = unmeasured(tmp_path, [one_block(n, 1, [1.0, 1.0, 1.0], 0) for n in range(1, 41)])
    path = directory / "journal.rank0.jsonl"
    path.write_text(path.read_text().replace('"source":"optimizer"', '"source":"backward"'))
    with path.open("a") as file:
        file.write('{"k":"event","e":"none","o":0,"n":40,"params":["a.weight"],"count":4}\n')
    found = verdict(directory)
    assert (slugs(found), found.level) == ([], "note")
    assert found.sentence == "40 steps were recorded; gradients were not measured."


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_last_loss_is_the_one_that_was_passed_last_and_not_a_mean(tmp_path: Path) -> None:
    blocks = [one_block(n, 1, [3.0 / n] * 3, 0) for n in range(1, 21)] + [one_block(21, 8, [0.9, 0.1, 1.7], 0)]
    directory = only_blocks(tmp_path, blocks, losses={"0": [3.25, 0.125]})
    assert figure(verdict(directory), "loss") == ("3.25 → 0.125", "")
    (rank,) = summary(Run.load(directory))["ranks"]
    assert rank["loss"] == {"first": 3.25, "last": 0.125}


def test_without_a_goodbye_the_blocks_tell_the_losses(tmp_path: Path) -> None:
    blocks = [one_block(n, 1, [3.0 / n] * 3, 0) for n in range(1, 21)]
    assert figure(verdict(only_blocks(tmp_path, blocks)), "loss") == ("3 → 0.15", "")


@pytest.mark.parametrize("steps", [3, 4, 10])
def test_a_fall_of_decades_in_a_toy_run_is_a_fall(tmp_path: Path, steps: int) -> None:
    loss = [5.0 * 10.0 ** (-8 * n / (steps - 1)) for n in range(steps)]
    blocks = [one_block(n + 1, 1, [v] * 3, 0) for n, v in enumerate(loss)]
    found = verdict(only_blocks(tmp_path, blocks, losses={"0": [loss[0], loss[-1]]}))
    assert found.sentence.endswith("the loss falls.")
    (tmp_path / "one").mkdir()
    mean = math.fsum(loss) / steps
    block = one_block(1, steps, [mean, loss[-1], loss[0]], 0)
    found = verdict(only_blocks(tmp_path / "one", [block], losses={"0": [loss[0], loss[-1]]}))
    assert found.sentence.endswith("the loss falls.")


@pytest.mark.parametrize(("last", "falls"), [([0.05, 0.04, 0.06], True), ([0.2, 0.05, 0.35], False)])
def test_a_fall_that_few_blocks_show_is_one_if_it_is_more_than_noise(
    tmp_path: Path, last: list[float], falls: bool
) -> None:
    blocks = [one_block(1, 1, [0.33] * 3, 0), one_block(2, 1, [0.32] * 3, 0), one_block(3, 13, [0.25, 0.05, 0.3], 0)]
    found = verdict(only_blocks(tmp_path, [*blocks, one_block(16, 5, last, 0)]))
    assert found.sentence == "Gradients reach every parameter" + (" and the loss falls." if falls else ".")


def test_one_lucky_batch_at_the_end_is_no_fall(tmp_path: Path) -> None:
    blocks = [one_block(n, 1, [1.0 if n < 60 else 1e-6] * 3, 0) for n in range(1, 61)]
    assert "falls" not in verdict(only_blocks(tmp_path, blocks, losses={"0": [1.0, 1e-6]})).sentence


# --- non-finite ------------------------------------------------------------------------------------------------------


def nonfinite(n: int, what: str) -> tuple[float, dict[str, Any]]:
    return event("nonfinite", 1 + n / 100, o=0, n=n, what=what, params=NAMES[:2], count=2, of=4)


MIXED = [*(one_block(n, 1, [1.0, 1.0, 1.0], 0) for n in range(1, 21)), one_block(21, 8, [1.0, 0.9, 1.1], 2)]


def test_a_run_that_ends_in_a_block_of_good_and_bad_losses_did_not_recover(tmp_path: Path) -> None:
    events = [nonfinite(n, what) for n in (27, 28) for what in ("loss", "grad")]
    found = verdict(only_blocks(tmp_path / "a", MIXED, events, losses={"0": [1.0, NAN]}))
    assert (found.sentence, found.level) == ("The loss became NaN at step 27; nothing was learned after it.", "error")
    assert figure(found, "loss") == ("1 → NaN", "")
    assert figure(found, "non-finite") == ("2 steps", "from step 27")
    found = verdict(only_blocks(tmp_path / "b", MIXED, events))  # the events alone tell it, too
    assert found.level == "error"


def test_a_run_whose_last_loss_is_finite_after_bad_ones_recovered(tmp_path: Path) -> None:
    found = verdict(only_blocks(tmp_path, MIXED, [nonfinite(n, "loss") for n in (23, 25)], losses={"0": [1.0, 0.95]}))
    assert (found.sentence, found.level) == ("The loss was NaN or inf in 2 of 28 steps, first at step 23.", "warning")


def test_a_run_that_was_lost_later_is_lost_since_then_and_not_since_the_first_nan(tmp_path: Path) -> None:
    one = trainer(60, loss=lambda n: NAN if n == 10 or n >= 50 else 1.0)
    found = verdict(journals.write(tmp_path, [one], events=[nonfinite(10, "loss"), nonfinite(50, "loss")]))
    assert found.sentence == "The loss became NaN at step 50; nothing was learned after it."


def test_what_the_scaler_skipped_is_a_note_with_nothing_to_be_done(tmp_path: Path) -> None:
    one = trainer(59, loss=lambda n: NAN if n == 21 else 2.0 / n)
    skip = event("skip", 1.22, o=0, n=21, scale=1024.0)
    found = verdict(journals.write(tmp_path, [one], events=[nonfinite(21, "loss"), nonfinite(21, "grad"), skip]))
    assert (found.level, found.sentence) == ("good", "Gradients reach every parameter and the loss falls.")
    (told,) = (f for f in found.findings if f.slug == "nonfinite-loss")
    assert told.symptom == "The loss was NaN or inf at step 21; the loss scaler skipped it"
    assert told.severity == "note"
    assert told.fix.startswith("nothing")


def test_a_scaler_does_not_excuse_a_step_that_it_did_not_skip(tmp_path: Path) -> None:
    one = trainer(59, loss=lambda n: NAN if n in (21, 30) else 2.0 / n)
    skips = [event("skip", 1.22, o=0, n=21, scale=1024.0)]
    found = verdict(journals.write(tmp_path, [one], events=[nonfinite(21, "grad"), nonfinite(30, "grad"), *skips]))
    assert found.level == "warning"


def test_a_run_that_ends_in_skipped_steps_is_not_well(tmp_path: Path) -> None:
    one = trainer(20)
    events = [pair for _ in range(12) for pair in (nonfinite(21, "loss"), event("skip", 1.3, o=0, n=21, scale=1.0))]
    found = verdict(journals.write(tmp_path, [one], events=events, end=goodbye({0: 20}, losses={"0": [4.0, NAN]})))
    assert found.level == "error"


# --- zeros -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "level"), [(1, "warning"), (5, "warning"), (60, "error")])
def test_gradients_that_are_all_zero_are_never_green(tmp_path: Path, steps: int, level: str) -> None:
    one = trainer(steps, norms=lambda n: [0.0] * 4, loss=lambda n: 0.0, ratios=lambda n: [0.0] * 4)
    found = verdict(journals.write(tmp_path, [one]))
    assert found.sentence == "All gradients were exactly zero in every measured step."
    assert (found.level, slugs(found)) == (level, ["gradients-all-zero"])


def test_a_rank_that_holds_empty_shards_is_not_accused(tmp_path: Path) -> None:
    for rank in (0, 1):
        one = trainer(60, norms=lambda n, size=1.0 - rank: [0.1 * size] * 4)
        run = header(rank=rank, world_size=2)
        journals.write(tmp_path, [one], run=run, name=f"journal.rank{rank}.jsonl")
    assert "gradients-all-zero" not in slugs(verdict(tmp_path))


@pytest.mark.parametrize(("steps", "told"), [(9, []), (10, ["learning-rate-zero"]), (40, ["learning-rate-zero"])])
def test_a_learning_rate_of_exactly_zero_is_told_from_ten_steps_on(tmp_path: Path, steps: int, told: Any) -> None:
    one = trainer(steps, lr=lambda n: 0.0, ratios=lambda n: [0.0] * 4)
    assert slugs(verdict(journals.write(tmp_path, [one])), "error") == told


def test_a_learning_rate_of_zero_that_was_sampled_early_only_is_told_as_far_as_it_was_seen(tmp_path: Path) -> None:
    directory = journals.write(tmp_path, [trainer(12, lr=lambda n: 0.0, ratios=lambda n: [0.0] * 4)])
    path = directory / "journal.rank0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if '"k":"row"' not in x or any(f'"n":{n},' in x for n in range(1, 6))))
    found = verdict(directory)
    assert found.sentence == "The learning rate was 0 in each of the 5 steps that were sampled."
    assert found.level == "warning"


def test_an_optimizer_with_a_rate_of_its_own_is_not_accused_for_a_zero_in_its_groups(tmp_path: Path) -> None:
    assert slugs(verdict(journals.write(tmp_path, [trainer(60, lr=lambda n: 0.0)])), "error", "warning") == []


# --- ranks, ends, figures --------------------------------------------------------------------------------------------


def two(directory: Path, *ends: dict[str, Any] | None, steps: int = 20) -> Verdict:
    for rank, end in enumerate(ends):
        journals.write(
            directory,
            [trainer(steps)],
            run=header(rank=rank, world_size=len(ends), pid=4000 + rank),
            name=f"journal.rank{rank}.jsonl",
            end=end and goodbye({0: steps}, **end),
            goodbye_missing=end is None,
        )
    return verdict(directory)


@pytest.mark.parametrize("first", [{}, None, {"code": 1, "wall": 999.0}])
def test_a_rank_that_fails_is_named_whatever_the_others_did(tmp_path: Path, first: dict[str, Any] | None) -> None:
    found = two(tmp_path, first, {"code": 7})
    assert (found.sentence, found.level) == ("Rank 1 ended with exit code 7 after 20 steps.", "error")


def test_a_rank_that_raised_is_named_although_another_left_with_sys_exit_before(tmp_path: Path) -> None:
    exc = {"type": "ValueError", "message": "", "file": "/home/ada/project/train.py", "line": 4}
    found = two(tmp_path, {"code": 1, "exc": {"type": "SystemExit"}, "wall": 1.0}, {"code": 1, "exc": exc})
    assert found.sentence == "Rank 1 raised ValueError at train.py:4 after 20 steps."


def test_ranks_that_all_end_alike_are_the_script(tmp_path: Path) -> None:
    assert two(tmp_path, {"code": 3}, {"code": 3}).sentence == "The script exited with code 3 after 20 steps."


@pytest.mark.parametrize(
    "told", [{"tiers": {"norm_every": 1, "watched": 20}}, {"not_seen": [["steps after step 20", "--watch-steps"]]}]
)
def test_figures_of_a_run_of_which_only_the_first_steps_were_watched_say_so(tmp_path: Path, told: Any) -> None:
    end = goodbye({0: 20}, **told)
    found = verdict(journals.write(tmp_path, [trainer(20, loss=falling(4.0, 1.0))], end=end))
    assert found.sentence == "Gradients reach every parameter and the loss falls in the first 20 steps."
    assert figure(found, "steps") == ("20", "the first ones, no more were watched")
    assert figure(found, "loss")[1] == "of the first 20"
    assert figure(found, "non-finite") == ("0", "of the first 20")


def test_many_steps_are_grouped_by_thousands(tmp_path: Path) -> None:
    found = verdict(only_blocks(tmp_path, [one_block(1, 1_234_567, [1.0, 0.5, 2.0], 0)]))
    assert figure(found, "steps")[0] == "1,234,567"
