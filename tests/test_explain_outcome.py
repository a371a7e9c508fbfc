"""What the runs of `gradctl explain` mean: when a second one is needed, what is concluded, how ranks are merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gradctl._results import Explanation, Finding, Span
from gradctl._run._outcome import Options, Ran, conclude, failed_anew, needs_tracing
from gradctl._run._together import merge

PLAIN = Options()
NONE = {"kind": "none", "text": "2 of 4 parameters get no gradient", "step": 1, "parameters": ["a"]}
LEFT = {"kind": "left_autograd", "text": "a value left autograd", "step": None, "parameters": []}
RAISED = {"kind": "grad_error", "text": "element 0 of tensors does not require grad", "step": None, "parameters": []}
DETACH = Finding(slug="detach", severity="error", symptom="s", why="w", fix="f", primary=Span("model.py", 88))
NOTE = replace(DETACH, slug="item", severity="note")


def ran(*symptoms: dict[str, Any], code: int = 0, error: str | None = None, **told: Any) -> Ran:
    """A run with torch and 5 steps."""
    kind, _, message = (error or "").partition(": ")
    gradient = message.startswith("element 0")
    known = {"type": kind, "message": message, "file": "/x/train.py", "line": 3, "gradient": gradient}
    base = {"torch": True, "how": "exit", "steps": 5, "symptoms": list(symptoms), "error": known if error else None}
    return Ran(code=1 if error else code, told=base | told)


def traced(*findings: Finding, error: str | None = None, **told: Any) -> Ran:
    return ran(error=error, **{"findings": [finding.to_json() for finding in findings]} | told)


def concluded(first: Ran | None, second: Ran | None = None, options: Options = PLAIN) -> tuple[int, str]:
    found = conclude("train.py", first, second, options)
    return found.exit_code, found.sentence


E0 = "RuntimeError: element 0 of tensors does not require grad"


@pytest.mark.parametrize(
    ("first", "needed"),
    [
        (ran(), False),
        (ran(NONE), True),
        (ran(LEFT), True),
        (ran(RAISED, error=E0, steps=0), True),
        (ran(error=E0, steps=0), True),
        (ran(error="KeyError: x"), False),
        (ran(NONE, error="KeyError: x"), True),
        (ran(NONE, error="KeyError: x", steps=0), False),
        (ran(faults=["ValueError: ours"]), True),
        (ran(NONE, torch=False), False),
        (Ran(code=-9), False),
        (replace(ran(), seen=(NONE,)), True),
        (replace(ran(NONE), not_seen=("another gradctl",)), False),
    ],
)
def test_a_second_run_is_needed_where_something_may_be_wrong(first: Ran, needed: bool) -> None:
    assert needs_tracing(first, PLAIN) is needed
    assert not needs_tracing(first, Options(rerun=False))


@pytest.mark.parametrize("options", [Options(notes=True), Options(at_step=3)])
def test_notes_and_a_step_ask_for_a_trace_of_a_run_that_went_well(options: Options) -> None:
    assert needs_tracing(ran(), options)
    assert not needs_tracing(ran(error="KeyError: x"), options)
    assert not needs_tracing(ran(torch=False), options)


def test_a_finding_is_a_finding() -> None:
    assert concluded(ran(NONE), traced(DETACH)) == (1, "1 cause")
    assert concluded(ran(NONE), traced(DETACH, replace(DETACH, slug="item"), NOTE)) == (1, "2 causes")
    assert concluded(None, traced(DETACH)) == (1, "1 cause")


def test_harmless_breaks_alone_are_clean() -> None:
    assert concluded(ran(), traced(NOTE), Options(notes=True)) == (0, "nothing is wrong with the gradients of 5 steps")


def test_a_symptom_that_the_trace_does_not_confirm_is_clean() -> None:
    found = conclude("train.py", ran(NONE), traced(), PLAIN)
    assert (found.exit_code, found.symptoms) == (0, ())


def test_a_gradient_error_without_a_cause_is_no_verdict() -> None:
    found = conclude("train.py", ran(RAISED, error=E0), traced(error=E0), PLAIN)
    assert found.exit_code == 4
    assert found.sentence == "no verdict: the cause of this gradient error was not found"
    assert found.symptoms == (RAISED["text"],)
    assert concluded(None, traced(error=E0))[0] == 4


def test_a_gradient_error_that_does_not_come_back_is_no_verdict() -> None:
    code, sentence = concluded(ran(RAISED, error=E0), traced())
    assert (code, sentence) == (4, "no verdict: the error of the first run did not come back in the traced one")


@pytest.mark.parametrize("second", [None, traced(error="KeyError: x")])
def test_an_error_of_its_own_is_not_a_gradient_problem(second: Ran | None) -> None:
    first = ran(*([NONE] if second else []), error="KeyError: x")
    found = conclude("train.py", first, second, PLAIN)
    assert (found.exit_code, found.sentence) == (4, "not a gradient problem: KeyError: x (train.py:3)")
    assert found.symptoms == ()


def test_a_cause_in_a_script_that_also_failed_for_another_reason_says_both() -> None:
    found = conclude("train.py", ran(NONE, error="KeyError: x"), traced(DETACH, error="KeyError: x"), PLAIN)
    assert (found.exit_code, found.remarks) == (1, ("the script itself ended with KeyError: x (train.py:3)",))


def test_a_tracer_that_failed_is_our_failure() -> None:
    assert concluded(ran(NONE), traced(faults=["ValueError: ours"])) == (
        3,
        "gradctl could not trace the script: ValueError: ours",
    )
    assert concluded(ran(faults=["ValueError: ours"]), None)[0] == 3
    assert concluded(replace(ran(), not_seen=("it finds another gradctl",))) == (
        3,
        "gradctl could not watch the script: it finds another gradctl",
    )


def test_a_tracer_that_found_the_cause_before_it_failed_tells_both() -> None:
    found = conclude("train.py", ran(NONE), traced(DETACH, faults=["ValueError: ours"]), PLAIN)
    assert (found.exit_code, found.remarks) == (1, ("the tracer switched itself off: ValueError: ours",))


@pytest.mark.parametrize(
    ("second", "anew"),
    [
        (traced(error="FileExistsError: model.pt"), True),
        (traced(error="KeyError: x"), True),
        (traced(code=2), True),
        (Ran(code=-9), True),
        (traced(), False),
        (traced(DETACH, error="FileExistsError: model.pt"), False),
        (traced(how="done"), False),
    ],
)
def test_a_traced_run_that_fails_for_another_reason_is_told_apart(second: Ran, anew: bool) -> None:
    assert failed_anew(ran(NONE), second) is anew
    assert not failed_anew(None, second)
    assert not failed_anew(ran(NONE, error="KeyError: x"), traced(error="KeyError: y"))


def test_where_no_second_run_shows_anything_crumbs_are_told_as_what_they_are() -> None:
    first = ran(NONE, crumbs=[DETACH.to_json()])
    found = conclude("train.py", first, None, Options(rerun=False))
    assert (found.exit_code, found.findings, found.symptoms) == (4, (DETACH,), (NONE["text"],))
    assert found.sentence == (
        "no verdict: the script was not run a second time (--no-rerun). Symptom seen; these lines may have done it"
    )
    again = conclude("train.py", first, traced(error="FileExistsError: model.pt"), PLAIN)
    assert (again.exit_code, again.findings, again.symptoms) == (4, (DETACH,), (NONE["text"],))
    assert again.sentence.startswith("no verdict: the traced run ended with FileExistsError: model.pt (train.py:3)")


@pytest.mark.parametrize(
    "first",
    [
        ran(RAISED, error=E0, crumbs=[DETACH.to_json()]),
        replace(ran(NONE, crumbs=[DETACH.to_json()]), seen=({**NONE, "certain": True},)),
    ],
)
def test_crumbs_below_a_certain_symptom_are_findings(first: Ran) -> None:
    found = conclude("train.py", first, None, Options(rerun=False))
    assert (found.exit_code, found.findings) == (1, (DETACH,))
    assert found.symptoms == tuple(symptom["text"] for symptom in first.symptoms)
    assert found.sentence.endswith("that is no proof")


def test_the_place_of_a_crumb_is_relative_to_the_scripts_folder() -> None:
    places = {
        "/home/a/train.py": "train.py",
        "/home/a/parts/net.py": "parts/net.py",
        "/home/ab/net.py": "/home/ab/net.py",
    }
    for absolute, written in places.items():
        crumb = replace(DETACH, primary=Span(absolute, 7))
        told = ran(NONE, crumbs=[crumb.to_json()], script="/home/a/train.py")
        [found] = conclude("train.py", told, None, Options(rerun=False)).findings
        assert found.primary == Span(written, 7)


def test_crumbs_of_a_run_without_a_symptom_are_not_told() -> None:
    crumbs = [DETACH.to_json()]
    assert concluded(ran(crumbs=crumbs), None, Options(rerun=False))[0] == 0
    assert concluded(ran(LEFT, crumbs=crumbs), None, Options(rerun=False))[0] == 0


def test_without_crumbs_one_run_gives_no_verdict() -> None:
    found = conclude("train.py", ran(NONE), None, Options(rerun=False))
    assert (found.exit_code, found.findings, found.symptoms) == (4, (), (NONE["text"],))


def test_a_script_that_trains_in_its_children_only_is_told_what_to_do() -> None:
    code, sentence = concluded(replace(ran(steps=0), children=2))
    assert code == 4
    assert "torchrun ... -m gradctl explain" in sentence


def test_gradients_without_an_optimizer_are_judged() -> None:
    assert concluded(replace(ran(steps=0), recorded=7)) == (0, "nothing is wrong with the gradients")
    assert concluded(None, traced(steps=0, backwards=7)) == (0, "nothing is wrong with the gradients")
    assert concluded(None, traced(steps=0, backwards=0))[0] == 4


def test_what_the_recorder_sees_is_told_where_the_sentinel_has_not_seen_it() -> None:
    zero = {"kind": "zero", "text": "zero", "step": None, "parameters": []}
    other = {"kind": "none", "text": "in other words", "step": None, "parameters": []}
    assert replace(ran(NONE), seen=(other, zero)).symptoms == (NONE, zero)


def explanation(code: int, *findings: Finding, sentence: str = "") -> Explanation:
    return Explanation("train.py", code, sentence, findings=findings, names=("a",), remarks=("r",))


def test_findings_of_one_cause_at_one_place_are_one_for_all_ranks() -> None:
    first, second = replace(DETACH, parameters=("a",), confidence=0.5), replace(DETACH, parameters=("a", "b"))
    elsewhere = replace(DETACH, primary=Span("model.py", 90))
    found = merge([explanation(1, first), explanation(1, NOTE, second, elsewhere)])
    assert [(f.slug, str(f.primary), f.parameters, f.confidence) for f in found.findings] == [
        ("detach", "model.py:88", ("a", "b"), 1.0),
        ("detach", "model.py:90", (), 1.0),
        ("item", "model.py:88", (), 1.0),
    ]
    assert (found.names, found.remarks) == (("a",), ("r",))


@pytest.mark.parametrize(
    ("codes", "decisive"), [((0, 1), 1), ((4, 1), 1), ((0, 0), 0), ((0, 4), 4), ((4, 3), 3), ((3, 1), 1)]
)
def test_the_gravest_rank_decides(codes: tuple[int, int], decisive: int) -> None:
    found = merge([explanation(code, sentence=f"rank {rank}") for rank, code in enumerate(codes)])
    assert (found.exit_code, found.sentence) == (decisive, f"rank {codes.index(decisive)}")
