from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import journals
from gradctl import report
from gradctl._journal import Run
from gradctl._verdict import Verdict, judge
from gradctl._verdict._fixes import FIXES
from journals import NAN, Trainer, event, falling, flat, goodbye, gpt, header, plain_norms, plain_ratios

NAMES, SHAPES = gpt(4)


def verdict(directory: Path) -> Verdict:
    return judge(Run.load(directory))


def trainer(steps: int = 200, **more: Any) -> Trainer:
    return Trainer(list(NAMES), SHAPES, steps, **more)


def slugs(found: Verdict, *severities: str) -> list[str]:
    return [f.slug for f in found.findings if not severities or f.severity in severities]


def finding(found: Verdict, slug: str) -> Any:
    (one,) = [f for f in found.findings if f.slug == slug]
    return one


def figure(found: Verdict, label: str) -> str:
    (one,) = [f for f in found.figures if f.label == label]
    return one.value


# --- what is well ----------------------------------------------------------------------------------------------------


def test_a_run_that_learns_is_called_so(tmp_path: Path) -> None:
    found = verdict(journals.healthy(tmp_path))
    assert found.sentence == "Gradients reach every parameter and the loss falls."
    assert found.level == "good"
    assert found.first_bad_step is None
    assert [(f.label, f.value) for f in found.figures] == [
        ("loss", "4.43 → 2.46"),
        ("steps", "400"),
        ("step", "319 ms"),
        ("parameters reached", "52 / 52"),
        ("non-finite", "0"),
        ("clipped", "2.8 %"),
        ("saved for backward", "172 MiB"),
        ("peak memory", "917 MiB"),
    ]


HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {},
    "noisy loss": {"loss": falling(2.4, 0.3, noise=0.5)},
    "policy gradient": {"loss": flat(0.2, noise=8.0)},
    "returns that grow": {"loss": lambda n: 0.02 * n + 0.3 * math.sin(n)},
    "a loss already low": {"loss": flat(0.011, noise=0.4)},
    "a negative loss": {"loss": lambda n: -math.log(1 + n / 3) + 0.1 * math.sin(n)},
    "Adam on a small net": {"ratios": plain_ratios(SHAPES, size=0.03)},
    "fine-tuning": {"ratios": plain_ratios(SHAPES, size=2e-5), "lr": lambda n: 2e-5},
    "cosine schedule to zero": {
        "lr": lambda n: 1e-3 * (1 + math.cos(math.pi * n / 200)) / 2,
        "ratios": lambda n: [1e-3 * (1 + math.cos(math.pi * n / 200)) / 2 + 1e-12] * len(SHAPES),
    },
    "warm-up from zero": {"lr": lambda n: 1e-3 * min(1, (n - 1) / 100)},
    "vectors move far": {"ratios": lambda n: [0.9 if len(s) < 2 else 1e-3 for s in SHAPES]},
    "zero-born adapters": {"norms": lambda n: [0.0 if n < 2 and k % 2 else 0.1 for k in range(len(SHAPES))]},
    "experts that rest": {"norms": lambda n: [0.0 if (n + k) % 7 else 0.1 for k in range(len(SHAPES))]},
    "a solved hinge loss": {
        "loss": lambda n: max(0.0, 1 - n / 60),
        "norms": lambda n: [0.0 if n > 60 else 0.1] * len(SHAPES),
    },
    "sparse embedding": {"dead": 0.6},
    "always clipped": {"clip": 0.01},
    "a late spike": {"loss": lambda n: falling(4.0, 2.0)(n) * (30 if n == 150 else 1)},
    "overfitting to zero": {"loss": lambda n: math.exp(-n / 5)},
}  # fmt: skip


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_not_accused(tmp_path: Path, kind: str) -> None:
    found = verdict(journals.write(tmp_path, [trainer(**HEALTHY[kind])], saved=journals.SAVED_BY_OP))
    assert slugs(found, "error", "warning") == []
    assert found.level == "good"
    assert found.sentence.startswith("Gradients reach every parameter")


def test_a_game_of_two_optimizers_is_not_accused_for_its_losses(tmp_path: Path) -> None:
    found = verdict(journals.gan(tmp_path))
    assert (found.sentence, found.level) == ("Gradients reach every parameter.", "good")
    assert found.findings == ()


def test_few_steps_are_not_judged_beyond_what_was_seen(tmp_path: Path) -> None:
    found = verdict(journals.write(tmp_path / "a", [trainer(1)]))
    assert found.sentence == "Gradients reach every parameter in the one step that was seen."
    wild = trainer(30, clip=0.001, ratios=lambda n: [0.9] * len(SHAPES), ms=(10, 1, 1, 8))
    assert slugs(verdict(journals.write(tmp_path / "b", [wild]))) == []


def test_frozen_parameters_are_not_missed(tmp_path: Path) -> None:
    calm = plain_norms(SHAPES)
    one = trainer(norms=lambda n: [None if i < 40 else v for i, v in enumerate(calm(n))])
    directory = journals.write(tmp_path, [one])
    path = directory / "journal.rank0.jsonl"
    path.write_text(path.read_text().replace('"frozen":0', '"frozen":40'))
    found = verdict(directory)
    assert found.findings == ()
    assert figure(found, "parameters reached") == "12 / 12"


def test_reach_is_not_praised_beyond_what_was_measured(tmp_path: Path) -> None:
    one = trainer(2, norms=lambda n: [None if i < 12 else 0.1 for i in range(52)])
    found = verdict(journals.write(tmp_path, [one]))
    assert found.sentence == "Gradients reach 40 of 52 parameters in the 2 steps that were seen."
    assert found.findings == ()


def test_a_flat_loss_is_a_note_and_no_more(tmp_path: Path) -> None:
    found = verdict(journals.write(tmp_path, [trainer(400, loss=flat(2.303, noise=0.002))]))
    assert finding(found, "loss-flat").severity == "note"
    assert found.level == "good"
    assert found.sentence == "Gradients reach every parameter; the loss stays at 2.3."


# --- what is broken --------------------------------------------------------------------------------------------------


def test_a_run_that_diverged_is_told_with_its_first_bad_step(tmp_path: Path) -> None:
    found = verdict(journals.diverged(tmp_path, bad=18))
    assert found.sentence == "Gradients became NaN at step 18; nothing was learned after it."
    assert (found.level, found.first_bad_step) == ("error", 18)
    assert slugs(found) == ["nonfinite-gradient", "weights-before"]
    first = found.findings[0]
    assert first.parameters[0] == "transformer.wte.weight"
    assert first.fix == "gradctl explain --at-step 18 broken.py"
    assert first.measured == {"step": 18, "steps": 243, "tensors": 65}
    assert figure(found, "loss") == "5.78 → NaN"


def test_what_never_learns_is_handed_to_explain(tmp_path: Path) -> None:
    events = [
        event("none", 9.0, o=0, n=200, params=NAMES[:2], count=2),
        event("unoptimized", 9.0, o=0, n=3, params=["x"], count=1),
    ]
    run = journals.header(argv=["train.py", "--epochs", "3"], script="train.py")
    one = trainer(norms=lambda n: [None if i < 2 else 0.1 for i in range(len(SHAPES))])
    found = verdict(journals.write(tmp_path, [one], run=run, events=events))
    meant = "; if that is meant, freeze them: requires_grad_(False)"
    for slug in ("never-reached", "unoptimized"):
        assert finding(found, slug).fix == f"gradctl explain train.py --epochs 3{meant}"


def test_what_never_learns_in_a_notebook_is_handed_to_watch(tmp_path: Path) -> None:
    events = [event("none", 9.0, o=0, n=200, params=NAMES[:2], count=2)]
    run = journals.header(argv=["/opt/ipykernel_launcher.py", "-f", "kernel.json"], script="notebook", start="record")
    one = trainer(norms=lambda n: [None if i < 2 else 0.1 for i in range(len(SHAPES))])
    found = verdict(journals.write(tmp_path, [one], run=run, events=events))
    assert finding(found, "never-reached").fix.startswith("with gradctl.watch(model, optimizer):")


def test_a_loss_that_is_nan_before_its_gradient_is_the_cause(tmp_path: Path) -> None:
    one = trainer(60, loss=lambda n: NAN if n >= 30 else 1.0, norms=lambda n: [NAN if n >= 30 else 0.1] * len(SHAPES))
    events = [
        event("nonfinite", 5.0, o=0, n=30, what=what, params=NAMES[:3], count=3, of=52) for what in ("loss", "grad")
    ]
    found = verdict(journals.write(tmp_path, [one], events=events))
    assert found.sentence == "The loss became NaN at step 30; nothing was learned after it."
    assert slugs(found, "error") == ["nonfinite-loss"]


def test_a_non_finite_value_is_found_without_an_event(tmp_path: Path) -> None:
    one = trainer(100, loss=lambda n: NAN if n >= 31 else 1.0, norms=lambda n: [NAN if n >= 30 else 0.1] * len(SHAPES))
    found = verdict(journals.write(tmp_path, [one]))
    assert found.first_bad_step in range(28, 33)
    assert found.level == "error"


def test_a_run_that_recovered_is_a_warning(tmp_path: Path) -> None:
    one = trainer(200, loss=lambda n: NAN if n == 50 else 2.0 / n)
    events = [event("nonfinite", 9.0, o=0, n=50, what="grad", params=NAMES[:2], count=2, of=52)]
    found = verdict(journals.write(tmp_path, [one], events=events))
    assert found.level == "warning"
    assert found.sentence == "The loss was NaN or inf in 1 of 200 steps, first at step 50."


def test_a_stop_at_the_first_bad_gradient_is_told(tmp_path: Path) -> None:
    exc = {"type": "gradctl._errors.NonFiniteGradient", "message": "x", "file": "/home/ada/project/train.py", "line": 9}
    events = [event("nonfinite", 9.0, o=0, n=18, what="grad", params=NAMES[:2], count=2, of=52)]
    found = verdict(journals.write(tmp_path, [trainer(17)], events=events, end=goodbye({0: 17}, code=1, exc=exc)))
    assert found.level == "error"
    assert found.sentence == "Gradients became NaN at step 18; it was stopped at train.py:9 before the update."
    assert "the weights are those of step 17" in found.findings[0].why
    assert "--on-nonfinite" not in found.findings[0].fix


def test_parameters_that_were_never_reached_are_named(tmp_path: Path) -> None:
    found = verdict(journals.never_reached(tmp_path))
    assert found.sentence == "3 of 52 parameters never got a gradient."
    assert found.level == "warning"
    assert finding(found, "never-reached").parameters == tuple(NAMES[49:])
    assert figure(found, "parameters reached") == "49 / 52"


def test_a_parameter_that_is_reached_late_is_not_accused(tmp_path: Path) -> None:
    calm = plain_norms(SHAPES)
    one = trainer(norms=lambda n: [None if i == 3 and n < 50 else v for i, v in enumerate(calm(n))])
    events = [event("none", 2.0, o=0, n=3, params=[NAMES[3]], count=1)]
    found = verdict(journals.write(tmp_path, [one], events=events, goodbye_missing=True))
    assert slugs(found) == []


def test_a_model_that_no_gradient_reaches_is_an_error(tmp_path: Path) -> None:
    one = trainer(50, norms=lambda n: [None] * len(SHAPES), ratios=lambda n: [0.0] * len(SHAPES))
    events = [event("none", 20.0, o=0, n=50, params=NAMES[:50], count=52)]
    found = verdict(journals.write(tmp_path, [one], events=events))
    assert found.sentence == "None of 52 parameters ever got a gradient."
    assert found.level == "error"


def test_parameters_in_no_optimizer_are_named(tmp_path: Path) -> None:
    events = [event("unoptimized", 3.0, o=0, n=3, params=["head.weight", "head.bias"], count=2)]
    found = verdict(journals.write(tmp_path, [trainer()], events=events))
    assert found.sentence == "2 parameters get a gradient and are in no optimizer."
    assert finding(found, "unoptimized").parameters == ("head.weight", "head.bias")


def test_a_scaler_that_finds_its_scale_is_not_accused(tmp_path: Path) -> None:
    events = [event("skip", 1.0 + n / 100, o=0, n=n, scale=2.0 ** (16 - n)) for n in range(9)]
    found = verdict(journals.write(tmp_path, [trainer()], events=events))
    assert found.findings == ()
    assert next(f.detail for f in found.figures if f.label == "steps") == "9 skipped by the scaler"


@pytest.mark.parametrize(("steps", "skipped", "slug"), [(200, 60, "skipped-steps"), (3, 60, "skipped-most")])
def test_steps_that_the_scaler_skips_for_ever_are_told(tmp_path: Path, steps: int, skipped: int, slug: str) -> None:
    events = [event("skip", 1.0 + n / 100, o=0, n=1, scale=1.0) for n in range(skipped)]
    assert slugs(verdict(journals.write(tmp_path, [trainer(steps)], events=events))) == [slug]


@pytest.mark.parametrize(("scale", "who"), [(1.0, "the loss scaler"), (None, "gradctl.Step")])
def test_who_skipped_the_steps_is_told(tmp_path: Path, scale: float | None, who: str) -> None:
    events = [event("skip", 1.0 + n / 100, o=0, n=1, scale=scale) for n in range(40)]
    found = verdict(journals.write(tmp_path, [trainer(30)], events=events))
    assert finding(found, "skipped-most").symptom == f"57 % of the steps were skipped by {who}"


def test_a_loss_that_blows_up_is_told_and_more_surely_with_its_gradients(tmp_path: Path) -> None:
    alone = trainer(100, loss=lambda n: 1.0 if n < 40 else 1e6)
    found = verdict(journals.write(tmp_path / "a", [alone]))
    assert finding(found, "loss-blew-up").severity == "warning"
    assert finding(found, "loss-blew-up").measured["step"] == 40
    together = trainer(
        100, loss=lambda n: 1.0 if n < 40 else 1e6, norms=lambda n: [0.1 if n < 40 else 1e5] * len(SHAPES)
    )
    assert finding(verdict(journals.write(tmp_path / "b", [together])), "loss-blew-up").severity == "error"


def test_weights_that_jump_by_half_of_themselves_are_told(tmp_path: Path) -> None:
    one = trainer(loss=flat(3.0), ratios=lambda n: [0.8 if len(s) > 1 else 1e-3 for s in SHAPES])
    found = verdict(journals.write(tmp_path, [one]))
    assert finding(found, "update-too-large").severity == "warning"
    assert "18 of 18 weight matrices" in found.sentence


def test_weights_that_do_not_move_are_told(tmp_path: Path) -> None:
    one = trainer(ratios=lambda n: [1e-9] * len(SHAPES))
    assert slugs(verdict(journals.write(tmp_path, [one])), "warning") == ["update-too-small"]


def test_a_learning_rate_of_zero_is_an_error(tmp_path: Path) -> None:
    one = trainer(lr=lambda n: 0.0, ratios=lambda n: [0.0] * len(SHAPES))
    found = verdict(journals.write(tmp_path, [one]))
    assert found.sentence == "The learning rate was 0 in all of 200 steps."


def test_16_bit_updates_that_round_to_nothing_are_told(tmp_path: Path) -> None:
    events = [event("stall", 9.0, o=0, n=60, params=NAMES[:38], count=38, share=0.97)]
    found = verdict(journals.write(tmp_path, [trainer(dtype="torch.bfloat16")], events=events))
    assert found.sentence == "In 38 of 52 16-bit tensors 97 % of the updates round to nothing."


def test_gradients_that_are_zero_to_the_end_are_told_with_the_step(tmp_path: Path) -> None:
    calm = plain_norms(SHAPES)
    one = trainer(norms=lambda n: [0.0 if n >= 100 and 20 <= i < 30 else v for i, v in enumerate(calm(n))])
    found = finding(verdict(journals.write(tmp_path, [one])), "gradients-zero")
    assert found.symptom.startswith("10 of 52 tensors have a gradient of exactly zero since step 10")
    assert found.parameters == tuple(NAMES[20:30])


def test_gradients_that_vanish_towards_the_input_are_told(tmp_path: Path) -> None:
    calm = plain_norms(SHAPES)
    one = trainer(norms=lambda n: [v * 10.0 ** (-9 * (1 - i / 51)) for i, v in enumerate(calm(n))])
    assert slugs(verdict(journals.write(tmp_path, [one])), "warning") == ["gradients-vanish"]


@pytest.mark.parametrize(("waiting", "severity"), [(0.5, "note"), (0.8, "warning")])
def test_a_data_loader_that_is_waited_for_is_told(tmp_path: Path, waiting: float, severity: str) -> None:
    one = trainer(2000, ms=(50.0, 5.0, 1.0, 50.0 * waiting))
    found = finding(verdict(journals.write(tmp_path, [one])), "data-loader")
    assert found.severity == severity
    assert f"{waiting:.0%}".replace("%", " %") in found.symptom


def test_accumulation_is_observed(tmp_path: Path) -> None:
    events = [event("accumulation", 3.0, o=0, n=1, microbatches=4)]
    found = verdict(journals.write(tmp_path, [trainer(microbatches=4)], events=events))
    assert finding(found, "accumulation").symptom == "4 backward passes before each step"
    assert next(f.detail for f in found.figures if f.label == "steps") == "4 backwards before each"


def test_a_parameter_whose_last_word_is_that_it_was_reached_is_not_accused(tmp_path: Path) -> None:
    events = [
        event("none", 2.0, o=0, n=3, params=["elsewhere.weight"], count=1),
        event("none", 60.0, o=0, n=200, params=[], count=0),
    ]
    assert slugs(verdict(journals.write(tmp_path, [trainer()], events=events))) == []


# --- how it ended ----------------------------------------------------------------------------------------------------


def test_a_killed_run_stopped_without_saying_goodbye(tmp_path: Path) -> None:
    found = verdict(journals.killed(tmp_path))
    assert (found.sentence, found.level) == ("The script stopped at step 1012 without saying goodbye.", "warning")


def test_an_exception_is_told_with_its_line_relative_to_the_script(tmp_path: Path) -> None:
    found = verdict(journals.raised(tmp_path))
    assert found.sentence == "The script raised ValueError at train.py:41 after 20 steps."
    assert found.level == "error"


def test_an_exception_after_divergence_does_not_hide_the_divergence(tmp_path: Path) -> None:
    exc = {"type": "AssertionError", "message": "", "file": "/lib/x.py", "line": 3}
    one = trainer(40, norms=lambda n: [NAN if n >= 30 else 0.1] * len(SHAPES), loss=lambda n: NAN if n > 30 else 1.0)
    events = [event("nonfinite", 9.0, o=0, n=30, what="grad", params=NAMES[:2], count=52, of=52)]
    found = verdict(journals.write(tmp_path, [one], events=events, end=goodbye({0: 40}, code=1, exc=exc)))
    assert found.sentence == (
        "Gradients became NaN at step 30; nothing was learned after it; "
        "the script raised AssertionError at /lib/x.py:3 after 40 steps."
    )


def test_an_exception_before_any_step_is_told(tmp_path: Path) -> None:
    exc = {"type": "RuntimeError", "message": "element 0", "file": "/home/ada/project/train.py", "line": 12}
    found = verdict(journals.write(tmp_path, run=header(), end=goodbye({}, code=1, exc=exc)))
    assert found.sentence == "The script raised RuntimeError at train.py:12 before any step."


@pytest.mark.parametrize(
    ("end", "sentence", "level"),
    [
        ({"code": 7}, "The script exited with code 7 after 200 steps.", "warning"),
        ({"code": 130, "exc": {"type": "KeyboardInterrupt"}}, "it was interrupted by hand after 200 steps.", "note"),
        ({"code": None, "how": "os._exit"}, "Gradients reach every parameter and the loss falls.", "good"),
    ],
)
def test_other_ends_are_told(tmp_path: Path, end: dict[str, Any], sentence: str, level: str) -> None:
    found = verdict(journals.write(tmp_path, [trainer()], end=goodbye({0: 200}, **end)))
    assert found.sentence.endswith(sentence)
    assert found.level == level


def test_a_run_that_still_runs_is_not_called_dead(tmp_path: Path) -> None:
    run = header(pid=os.getpid(), host=socket.gethostname(), started=time.time())
    found = verdict(journals.write(tmp_path, [trainer(60)], run=run, goodbye_missing=True))
    assert found.sentence.endswith("it is still running, 60 steps so far.")
    assert found.level == "good"


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"started": 1e9}, {"pid": 2**22 + 1}])
def test_a_process_that_only_took_over_the_number_is_not_the_run(tmp_path: Path, change: dict[str, Any]) -> None:
    run = header(**({"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()} | change))
    found = verdict(journals.write(tmp_path, [trainer(60)], run=run, goodbye_missing=True))
    assert "without saying goodbye" in found.sentence


def test_gradients_that_were_off_are_told(tmp_path: Path) -> None:
    found = verdict(journals.write(tmp_path / "a", run=header(grad="off"), end=goodbye({})))
    assert (found.sentence, found.level) == ("Gradients were off for the whole run.", "note")
    exc = {"type": "BackwardRefused", "message": "", "file": "/home/ada/project/train.py", "line": 30}
    found = verdict(journals.write(tmp_path / "b", run=header(grad="off"), end=goodbye({}, code=1, exc=exc)))
    assert found.sentence == "Gradients were off for the whole run; backward was refused at train.py:30."


def test_training_that_was_not_seen_is_not_called_empty(tmp_path: Path) -> None:
    found = verdict(journals.not_seen(tmp_path))
    assert (found.sentence, found.level) == ("Training was not seen: distributed autograd.", "warning")


def test_a_run_without_training_is_told(tmp_path: Path) -> None:
    found = verdict(journals.write(tmp_path / "a", run=header(), end=goodbye({})))
    assert found.sentence == "No training step and no backward was seen."
    found = verdict(journals.write(tmp_path / "b", run=header(), end=goodbye({}, backwards=3)))
    assert found.sentence == "No training step was seen, only 3 backwards."


def test_an_empty_journal_is_told(tmp_path: Path) -> None:
    found = verdict(journals.empty(tmp_path))
    assert found.sentence == "The journal holds no run: nothing was recorded."
    assert (len(found.figures), found.main_optimizer) == (8, None)


# --- several optimizers and ranks ------------------------------------------------------------------------------------


def test_the_main_optimizer_is_the_one_with_most_steps_times_parameters(tmp_path: Path) -> None:
    small = Trainer(["a.weight"], [[4, 4]], 300, id=0)
    big = trainer(200, id=5)
    found = verdict(journals.write(tmp_path, [small, big]))
    assert (found.main_optimizer, found.stages) == (5, (5,))
    assert figure(found, "parameters reached") == "53 / 53"


def test_one_optimizer_a_stage_joins_on_one_axis_and_the_one_with_the_loss_leads(tmp_path: Path) -> None:
    stages = [
        trainer(120, id=0, microbatches=1),
        trainer(120, id=1, microbatches=0, loss=lambda n: None),
        trainer(119, id=2, microbatches=0, loss=lambda n: None),
    ]
    found = verdict(journals.write(tmp_path, stages))
    assert (found.main_optimizer, found.stages) == (0, (0, 1, 2))
    assert figure(found, "parameters reached") == "156 / 156"
    assert found.sentence == "Gradients reach every parameter and the loss falls."


def test_two_players_are_not_stages(tmp_path: Path) -> None:
    assert len(verdict(journals.gan(tmp_path)).stages) == 1


def test_children_that_train_are_the_run_when_the_main_process_does_not(tmp_path: Path) -> None:
    journals.write(tmp_path, run=header(world_size=1), end=goodbye({}, children=[7, 8]))
    for rank, pid in ((0, 7), (1, 8)):
        run = header(rank=rank, world_size=2, pid=pid, main=False, start="child")
        journals.write(tmp_path, [trainer(80)], run=run, name=f"journal.rank{rank}.pid{pid}.jsonl")
    found = verdict(tmp_path)
    assert found.sentence == "Gradients reach every parameter and the loss falls."
    assert found.main is not None
    assert found.main.pid == 7


def test_the_late_rank_is_found(tmp_path: Path) -> None:
    found = finding(verdict(journals.two_ranks(tmp_path, late=4.0)), "late-rank")
    assert found.symptom == "Rank 1 is late by 4 ms in every step (20 % of it)"
    assert found.severity == "note"


def test_ranks_that_are_as_fast_as_each_other_are_not_accused(tmp_path: Path) -> None:
    assert "late-rank" not in slugs(verdict(journals.two_ranks(tmp_path, late=0.3)))


def test_ranks_that_took_different_steps_are_told(tmp_path: Path) -> None:
    for rank, steps in ((0, 100), (1, 97)):
        run = header(rank=rank, world_size=2)
        journals.write(tmp_path, [trainer(steps)], run=run, name=f"journal.rank{rank}.jsonl")
    assert finding(verdict(tmp_path), "rank-steps-differ").symptom == "Rank 1 took 97 steps, rank 0 took 100"


@pytest.mark.parametrize("wrapped", [True, False])
def test_gradients_that_differ_between_ranks_are_told_only_under_data_parallel(tmp_path: Path, wrapped: bool) -> None:
    for rank in (0, 1):
        one = trainer(100, norms=lambda n, scale=1 + rank: [0.1 * scale] * len(SHAPES))
        events = [event("ddp", 2.0, comm_ms=1.0)] if wrapped else []
        run = header(rank=rank, world_size=2)
        journals.write(tmp_path, [one], run=run, events=events, name=f"journal.rank{rank}.jsonl")
    assert ("ranks-differ" in slugs(verdict(tmp_path))) is wrapped


def test_what_all_ranks_say_is_said_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        events = [event("none", 9.0, o=0, n=100, params=NAMES[:2], count=2)]
        run = header(rank=rank, world_size=2)
        one = trainer(100, norms=lambda n: [None, None, *[0.1] * 50])
        journals.write(tmp_path, [one], run=run, events=events, name=f"journal.rank{rank}.jsonl")
    assert slugs(verdict(tmp_path)).count("never-reached") == 1


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        run = header(rank=rank, world_size=2)
        journals.write(tmp_path, [trainer(100)], run=run, name=f"journal.rank{rank}.jsonl", goodbye_missing=rank == 1)
    assert verdict(tmp_path).sentence == "Rank 1 stopped without saying goodbye."


def test_a_rank_that_is_only_slower_to_end_is_not_called_dead(tmp_path: Path) -> None:
    for rank in (0, 1):
        run = header(rank=rank, world_size=2, pid=os.getpid(), host=socket.gethostname(), started=time.time())
        journals.write(tmp_path, [trainer(100)], run=run, name=f"journal.rank{rank}.jsonl", goodbye_missing=rank == 1)
    assert verdict(tmp_path).sentence == "Gradients reach every parameter and the loss falls."


# --- the recorder and its file ---------------------------------------------------------------------------------------


def test_faults_of_ours_are_a_note(tmp_path: Path) -> None:
    events = [event("fault", 2.0, where="rows", trace="..."), event("tier_off", 2.1, tier="rows", why="three faults")]
    found = verdict(journals.write(tmp_path, [trainer()], events=events, end=goodbye({0: 200}, faults=3)))
    assert finding(found, "recorder-fault").symptom == "The recorder had 3 faults and switched a part of itself off"
    assert found.level == "good"


def test_unreadable_lines_and_a_newer_version_are_notes(tmp_path: Path) -> None:
    directory = journals.healthy(tmp_path, steps=120)
    path = directory / "journal.rank0.jsonl"
    path.write_text(path.read_text().replace("gradctl.journal/1", "gradctl.journal/2") + "garbage\n")
    found = verdict(directory)
    assert set(slugs(found, "note")) >= {"journal-damaged", "journal-newer"}
    assert found.level == "good"


def test_at_most_four_findings_are_shown_and_all_are_kept_worst_first(tmp_path: Path) -> None:
    events = [
        event("none", 9.0, o=0, n=200, params=NAMES[:2], count=2),
        event("unoptimized", 9.0, o=0, n=3, params=["x"], count=1),
        event("stall", 9.0, o=0, n=60, params=NAMES[:38], count=38, share=0.97),
        event("torn_step", 9.0, thread="t", site="a.py:1"),
    ]
    one = trainer(ratios=lambda n: [1e-9] * len(SHAPES), clip=1e-6)
    found = verdict(journals.write(tmp_path, [one], events=events, saved=journals.SAVED_BY_OP))
    assert len(found.shown) == 4
    assert found.hidden == len(found.findings) - 4 > 0
    order = {"error": 0, "warning": 1, "note": 2}
    assert [order[f.severity] for f in found.findings] == sorted(order[f.severity] for f in found.findings)


# --- laws ------------------------------------------------------------------------------------------------------------


def test_every_finding_is_in_the_table_of_fixes_and_names_only_commands_that_exist() -> None:
    source = "".join(p.read_text() for p in Path(sys.modules[Verdict.__module__].__file__).parent.glob("*.py"))
    used = set(re.findall(r"finding\(\s*\"([a-z0-9-]+)\"", source))
    used |= {f"nonfinite-{where}" for where in ("gradient", "loss", "weight", "stopped", "skipped")} | {"no-script"}
    assert used == set(FIXES)
    for text in FIXES.values():
        assert not re.search(r"gradctl (?!run|report|explain|cause|env)\w+", text), text


def test_the_verdict_imports_no_torch_and_no_numpy() -> None:
    code = "import sys, gradctl._verdict, gradctl.report._terminal; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"


HUGE = st.sampled_from(
    [0, 1, -1, 3, 2**31, 2**62, -(2**62), 10**30, 0.5, 1e308, -1e308, 1e-320, NAN, math.inf, -math.inf]
)
STRANGE = st.one_of(
    HUGE, st.none(), st.booleans(), st.text(max_size=5), st.sampled_from(["nan", "inf", "\ud800", "\x1b[31m"])
)
ANY = st.recursive(STRANGE, lambda inner: st.lists(inner, max_size=6), max_leaves=8)
KEYS = st.sampled_from(
    [
        "o",
        "n",
        "c",
        "t",
        "l",
        "bad",
        "mb",
        "ms",
        "clip",
        "tot",
        "g",
        "u",
        "none",
        "zero",
        "dead",
        "cos",
        "lr",
        "rss",
        "cuda",
        "names",
        "shapes",
        "cls",
        "numel",
        "frozen",
        "source",
        "e",
        "what",
        "params",
        "count",
        "of",
        "share",
        "microbatches",
        "since",
        "where",
        "why",
        "tier",
        "total",
        "rows",
        "method",
        "how",
        "code",
        "exc",
        "steps",
        "losses",
        "tiers",
        "backwards",
        "faults",
        "dropped",
        "wall",
        "not_seen",
        "rank",
        "world_size",
        "argv",
        "script",
        "cwd",
        "pid",
        "started",
        "grad",
        "schema",
        "main",
    ]
)
KINDS = st.sampled_from(["run", "opt", "b", "mx", "row", "event", "saved", "end"])
EVENTS = st.sampled_from(
    [
        "nonfinite",
        "skip",
        "none",
        "unoptimized",
        "stall",
        "accumulation",
        "fault",
        "tier_off",
        "torn_step",
        "ddp",
        "not_seen",
        "never_stepped",
    ]
)


@settings(max_examples=60)
@given(
    changes=st.lists(st.tuples(KINDS, KEYS, ANY), max_size=8), named=st.lists(st.tuples(EVENTS, KEYS, ANY), max_size=4)
)
def test_no_journal_can_make_the_judgement_or_its_faces_fail(changes: list, named: list) -> None:
    # a sound journal in which fields hold what they should not
    with tempfile.TemporaryDirectory() as folder:
        directory = journals.hostile(Path(folder), steps=60)
        path = directory / "journal.rank0.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for kind, key, value in changes:
            of_kind = [line for line in lines if line["k"] == kind]
            for line in of_kind[:: max(1, len(of_kind) // 3)]:
                line[key] = value
        for name, key, value in named:
            lines.append({"k": "event", "e": name, "o": 0, "n": 3, key: value})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = Run.load(directory)
    found = judge(run)
    json.dumps(report.summary(run), allow_nan=False, ensure_ascii=False).encode("utf-8")
    report.draw_terminal(run, console=Console(file=io.StringIO(), width=80))
    assert found.sentence.endswith(".")
    assert len(found.figures) == 8
    assert found.level in ("good", "note", "warning", "error")


@pytest.mark.slow
def test_a_thousand_tensors_and_a_hundred_thousand_steps_are_judged(tmp_path: Path) -> None:
    found = verdict(journals.large(tmp_path))
    assert found.sentence == "Gradients reach every parameter and the loss falls."
    assert figure(found, "parameters reached") == "1000 / 1000"
