"""`gradctl fit` and `gradctl run --plan` on scripts that know nothing of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from starting import Outcome, environment, journal_lines, launch, plain, run_directory

FIT = (sys.executable, "-m", "gradctl", "fit")
RUN = (sys.executable, "-m", "gradctl", "run")
REPORT = (sys.executable, "-m", "gradctl", "report")
TESTS = str(Path(__file__).parent)

SCRIPT = """\
import sys
sys.path.insert(0, {tests!r})
import torch
from fit_models import GPT
torch.manual_seed(0)
net = GPT()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range({steps}):
    words, targets = torch.randint(0, 211, (4, 64)), torch.randint(0, 211, (4, 64))
    optimizer.zero_grad()
    loss = {loss}
    loss.backward()
    optimizer.step()
    print(step, loss.item())
    {end}
print("trained")
"""
BUDGET = 6_500_000


def script(*, steps: int = 8, loss: str = "net(words, targets)", end: str = "pass") -> str:
    return SCRIPT.format(tests=TESTS, steps=steps, loss=loss, end=end)


def fitted(home: Path, *words: str, text: str | None = None, **options: Any) -> Outcome:
    (home / "train.py").write_text(script() if text is None else text, encoding="utf-8")
    return launch([*FIT, *words, "train.py"], home, **options)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    home = tmp_path_factory.mktemp("fit")
    return home, fitted(home, "--memory", str(BUDGET), "-o", "plan.json")


def test_a_script_is_fitted_and_ended_once_its_plan_was_measured(planned: tuple[Path, Outcome]) -> None:
    home, done = planned
    assert done.code == 0, done.stderr
    assert "GPT in train.py\nplan for 6.199 MiB: predicted peak " in done.stdout
    assert "trained" not in done.stdout
    assert "gradctl run --plan plan.json train.py" in done.stdout
    plan = json.loads((home / "plan.json").read_text())
    assert plan["schema"] == "gradctl.plan/1"
    assert 0.95 * BUDGET < plan["measured_peak"] <= BUDGET
    assert not list(home.glob("gradctl-*"))


def test_what_the_script_prints_until_then_is_what_it_prints_alone(planned: tuple[Path, Outcome]) -> None:
    home, done = planned
    alone = plain("train.py", cwd=home).stdout.splitlines()
    ours = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert 3 <= len(ours) < 8
    assert ours == alone[: len(ours)]


def test_a_plan_is_applied_in_a_run_that_computes_bitwise_the_same(planned: tuple[Path, Outcome]) -> None:
    home, _ = planned
    alone = plain("train.py", cwd=home)
    run = launch([*RUN, "--plan", "plan.json", "train.py"], home)
    assert run.code == 0
    assert run.stdout == alone.stdout
    assert "model did not do what its plan expects" not in run.stderr
    (event,) = [line for line in journal_lines(run_directory(home) / "journal.rank0.jsonl") if line.get("e") == "plan"]
    assert event["applied"] is True
    assert event["model"] == "GPT"
    assert event["budget"] == BUDGET
    assert event["measured"] <= BUDGET
    assert abs(event["measured"] / event["predicted"] - 1) < 0.03
    shown = launch([*REPORT, str(run_directory(home)), "--json", "-"], home)
    (rank,) = json.loads(shown.stdout)["ranks"]
    assert rank["plan"]["measured"] == event["measured"]
    assert rank["plan"]["budget"] == BUDGET
    said = launch([*REPORT, str(run_directory(home))], home)
    assert "(plan: 6.2 MiB of 6.2 MiB)" in said.stdout
    assert "plan: 6.2 MiB of 6.2 MiB" in (run_directory(home) / "report.html").read_text(encoding="utf-8")


def test_a_plan_that_fits_no_model_is_said_and_the_script_goes_on(
    planned: tuple[Path, Outcome], tmp_path: Path
) -> None:
    home, _ = planned
    (tmp_path / "train.py").write_text(script(steps=2).replace("GPT()", "GPT(blocks=3)"), encoding="utf-8")
    run = launch([*RUN, "--plan", str(home / "plan.json"), "train.py"], tmp_path)
    assert run.code == 0
    assert "trained" in run.stdout
    assert "gradctl: the plan was not applied: this plan was made for a model with blocks.3.norm1.weight" in run.stderr
    (event,) = [
        line for line in journal_lines(run_directory(tmp_path) / "journal.rank0.jsonl") if line.get("e") == "plan"
    ]
    assert event["applied"] is False


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "gradctl.summary/1"}', "[1]"])
def test_a_file_that_is_no_plan_is_a_usage_error_before_the_script_starts(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.py").write_text("print('started')", encoding="utf-8")
    (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    run = launch([*RUN, "--plan", "plan.json", "train.py"], tmp_path)
    assert run.code == 2
    assert "UsageError: plan.json " in run.stderr
    assert run.stdout == ""


def test_a_budget_that_is_too_small_exits_with_1_and_the_smallest(tmp_path: Path) -> None:
    done = fitted(tmp_path, "--memory", "1MiB", "-o", "plan.json")
    assert done.code == 1
    assert "gradctl: no plan stays within 1 MiB" in done.stderr
    assert "the smallest budget that works is" in done.stderr
    assert not (tmp_path / "plan.json").exists()


def test_json_on_stdout_is_the_plan_and_nothing_else(tmp_path: Path) -> None:
    done = fitted(tmp_path, "--memory", "1GiB", "--json", "-")
    assert done.code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["schema"] == "gradctl.plan/1"
    assert all(not call["drop"] for call in plan["calls"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (script(steps=3), "made 3 optimizer steps, and a fit needs 4"),
        (script(steps=1), "made 1 optimizer step, and a fit needs 4"),
        ("print('no torch')", "never imported torch"),
        (script(end="sys.exit(3)"), "ended with exit code 3 before it was fitted"),
        (script(end="raise KeyError('gone')"), "failed before it was fitted: KeyError: 'gone' at"),
    ],
)
def test_a_script_that_ends_too_early_gets_no_verdict(tmp_path: Path, text: str, said: str) -> None:
    done = fitted(tmp_path, "--memory", "1GiB", text=text)
    assert done.code == 4
    assert said in done.stderr


def test_a_script_that_calls_no_module_is_refused_with_a_sentence(tmp_path: Path) -> None:
    done = fitted(tmp_path, "--memory", "1GiB", text=script(loss="net.forward(words, targets)"))
    assert done.code in (0, 2)  # the blocks are modules that are called: one of them can be fitted
    text = (
        script()
        .replace("net = GPT()", "net = torch.nn.Linear(211, 8)")
        .replace("net(words, targets)", "(net.weight * words.sum()).sum()")
    )
    done = fitted(tmp_path, "--memory", "1GiB", text=text)
    assert done.code == 2
    assert "no module was called with gradients on between two optimizer steps" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", "plenty"), "'plenty' is not a size"),
        (("--memory", "0"), "--memory 0 is no budget"),
        ((), "Missing option '--memory'"),
        (("--memory", "1GiB", "-E"), "nothing can be fitted under `python -E`"),
        (("--memory", "1GiB", "-o", "train.py"), "train.py exists and is not overwritten"),
    ],
)
def test_bad_words_are_usage_errors(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = fitted(tmp_path, *words, text="print('started')")
    assert done.code == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_a_launched_job_is_refused_with_the_way_out(tmp_path: Path) -> None:
    done = fitted(
        tmp_path, "--memory", "1GiB", env=environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    )
    assert done.code == 2
    assert "was started in 2 processes" in done.stderr
    assert "gradctl run --plan" in done.stderr


def test_a_loop_with_accumulation_two_models_and_evaluation_is_fitted(tmp_path: Path) -> None:
    text = f"""\
import sys
sys.path.insert(0, {TESTS!r})
import torch
from fit_models import GPT, ResNet
torch.manual_seed(0)
net, small = GPT(), ResNet()
first = torch.optim.AdamW(net.parameters(), lr=1e-3)
second = torch.optim.SGD(small.parameters(), lr=1e-3)
words, targets = torch.randint(0, 211, (4, 64)), torch.randint(0, 211, (4, 64))
images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))
for step in range(8):
    for half in range(2):
        (net(words[half * 2 :][:2], targets[half * 2 :][:2]) / 2).backward()
    first.step()
    first.zero_grad()
    second.zero_grad()
    small(images, labels).backward()
    second.step()
    with torch.no_grad():
        net.eval()
        net(words, targets)
        net.train()
"""
    done = fitted(tmp_path, "--memory", "7MiB", text=text)
    assert done.code == 0, done.stderr
    assert "GPT in train.py" in done.stdout
    assert "1 more module is called in a step" in done.stdout
