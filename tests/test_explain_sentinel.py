"""The first stage of `gradctl explain`: it sees that something is wrong, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradctl._explain import Sentinel
from starting import environment

HERE = Path(__file__).parent
EXAMPLE = re.compile(r"<!-- cause: line [\d;, also:]+ -->\n```python\n(.*?)```", re.DOTALL)
CASES = sorted(HERE.glob("cases_explain/*.json"))
BROKEN = [path.stem for path in CASES if json.loads(path.read_text(encoding="utf-8"))["cause"]]
CAUSES = {
    page.stem: found[1]
    for page in sorted((HERE.parent / "docs/causes").glob("*.md"))
    if (found := EXAMPLE.search(page.read_text(encoding="utf-8")))
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sentinel said about every case and every example of a page, by name."""
    folder = tmp_path_factory.mktemp("sentinel")
    scripts = [HERE / f"cases_explain/{name}.py" for name in BROKEN]
    for name, text in CAUSES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        scripts.append(folder / f"{name}.py")
    (folder / "list").write_text("\n".join(map(str, scripts)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(HERE / "sentinel_runs.py"), str(folder / "list")],
        env=environment(), cwd=folder, capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    return {Path(path).stem: said for path, said in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", [*BROKEN, *CAUSES])
def test_the_first_stage_sees_that_something_is_wrong(name: str, told: dict[str, Any]) -> None:
    assert told[name]["symptoms"], f"nothing was seen of {name}"
    assert told[name]["faults"] == []
    assert all(symptom["text"] and symptom["kind"] for symptom in told[name]["symptoms"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("01_detach_in_extractor", "none"),
        ("34_vector_loss", "grad_error"),
        ("37_param_rebound", "grad_error"),
        ("39_head_replaced_after_optimizer", "not_in_optimizer"),
        ("40_model_rebuilt", "replaced"),
        ("47_zero_grad_before_step", "cleared"),
        ("48_missing_zero_grad", "uncleared"),
        ("50_sqrt_zero", "nonfinite"),
        ("52_clamp_dead", "zero"),
        ("57_loss_total_keeps_graph", "live_graphs"),
        ("59_data_edit_wrong_grad", "left_autograd"),
    ],
)
def test_a_symptom_is_called_what_it_is(name: str, kind: str, told: dict[str, Any]) -> None:
    assert kind in {symptom["kind"] for symptom in told[name]["symptoms"]}


def test_a_symptom_names_the_parameters(told: dict[str, Any]) -> None:
    symptom = next(s for s in told["01_detach_in_extractor"]["symptoms"] if s["kind"] == "none")
    assert symptom["parameters"]
    assert all(name.startswith("tower.") for name in symptom["parameters"])


# ---------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def sentinel() -> Iterator[Sentinel]:
    found = Sentinel()
    yield found
    found.uninstall()


def trained(steps: int, *, change: Callable[[nn.Module, int], None] = lambda model, step: None) -> list[torch.Tensor]:
    """Train a small model; return its losses and what it holds at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    out: list[torch.Tensor] = []
    for step in range(steps):
        x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        change(model, step + 1)
        optimizer.step()
        out.append(loss.detach())
    return [*out, *(p.detach() for p in model.parameters()), torch.rand(3)]


def kinds(said: dict[str, Any]) -> set[str]:
    assert said["faults"] == []
    return {symptom["kind"] for symptom in said["symptoms"]}


def test_a_healthy_training_has_no_symptom_and_the_same_numbers(sentinel: Sentinel) -> None:
    plain = trained(60)
    sentinel.install()
    watched = trained(60)
    said = sentinel.finish(None)
    assert kinds(said) == set()
    assert said["steps"] == 60
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_gradient_that_goes_missing_later_is_seen_at_its_step(sentinel: Sentinel) -> None:
    def lose(model: nn.Module, step: int) -> None:
        if step >= 30:
            next(model.parameters()).grad = None

    sentinel.install()
    trained(40, change=lose)
    said = sentinel.finish(None)
    lost = next(symptom for symptom in said["symptoms"] if symptom["kind"] == "lost")
    assert lost["step"] == 30


def test_a_gradient_of_zero_from_some_step_on_is_seen_at_the_end(sentinel: Sentinel) -> None:
    kept: list[nn.Module] = []

    def die(model: nn.Module, step: int) -> None:
        kept[:] = [model]
        if step >= 7:
            grad = next(model.parameters()).grad
            assert grad is not None
            grad.zero_()

    sentinel.install()
    trained(9, change=die)
    assert "zero" in kinds(sentinel.finish(None))


def skipping(bad: tuple[int, ...]) -> None:
    """Train in 40 rounds, some with a gradient of NaN, of which the program makes no step."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(40):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)) * (step not in bad)
        loss.pow(2).sum(-1).sqrt().mean().backward()
        assert model.weight.grad is not None
        if bool(model.weight.grad.isfinite().all()):
            optimizer.step()


@pytest.mark.parametrize("since", [30, 37])
def test_broken_gradients_that_the_program_skips_to_the_end_are_seen_though_the_model_is_gone(
    sentinel: Sentinel, since: int
) -> None:
    sentinel.install()
    skipping(tuple(range(since, 40)))
    [symptom] = [one for one in sentinel.finish(None)["symptoms"] if one["kind"] == "nonfinite"]
    assert symptom["step"] == since + 1
    assert f"in the last {40 - since} backwards" in symptom["text"]


def test_steps_that_are_skipped_at_the_start_and_now_and_then_are_no_symptom(sentinel: Sentinel) -> None:
    sentinel.install()
    skipping((0, 1, 2, 3, 11, 20, 21, 22, 38, 39))
    assert kinds(sentinel.finish(None)) == set()


def test_reading_a_loss_for_the_log_is_no_crumb(sentinel: Sentinel) -> None:
    sentinel.install()
    weight = torch.ones(3, requires_grad=True)
    for _ in range(3):
        loss = (weight * 2).sum()
        loss.item()
        loss.backward()
        loss.tolist()
    assert sentinel.finish(None)["crumbs"] == []


def test_a_detached_value_is_a_crumb_with_its_line(sentinel: Sentinel) -> None:
    sentinel.install()
    weight = torch.ones(3, requires_grad=True)
    hidden = (weight * 2).detach()
    (hidden * weight).sum().backward()
    crumbs = sentinel.finish(None)["crumbs"]
    assert [crumb["slug"] for crumb in crumbs] == ["detach"]
    assert crumbs[0]["primary"]["file"] == __file__
    line = Path(__file__).read_text(encoding="utf-8").splitlines()[crumbs[0]["primary"]["line"] - 1]
    assert line.strip() == "hidden = (weight * 2).detach()"
    assert crumbs[0]["confidence"] < 0.5


def test_what_is_detached_under_no_grad_is_no_crumb(sentinel: Sentinel) -> None:
    sentinel.install()
    weight = torch.ones(3, requires_grad=True)
    hidden = weight * 2
    with torch.no_grad():
        hidden.detach().tolist()
    hidden.sum().backward()
    assert sentinel.finish(None)["crumbs"] == []


def test_an_error_that_has_nothing_to_do_with_gradients_is_no_symptom(sentinel: Sentinel) -> None:
    sentinel.install()
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert kinds(sentinel.finish(caught.value)) == set()


def test_a_fault_of_the_sentinel_never_reaches_the_program(sentinel: Sentinel, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradctl._explain import _held, _passages

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("ours")

    monkeypatch.setattr(_held.Held, "stepped", broken)
    monkeypatch.setattr(_passages.Passages, "begun", broken)
    sentinel.install()
    trained(3)
    said = sentinel.finish(None)
    assert said["symptoms"] == []
    assert said["faults"]
    assert "ValueError: ours" in said["faults"][0]


def test_a_compiled_model_is_not_looked_into(tmp_path: Path) -> None:
    # In a process of its own: the first use of the compiler patches torch itself.
    program = """
import torch, warnings
from gradctl._explain import Sentinel
sentinel = Sentinel()
sentinel.install()
model = torch.nn.Linear(4, 2)
compiled = torch.compile(model, backend="eager", fullgraph=True)
compiled(torch.randn(3, 4)).sum().backward()
assert torch._C._len_torch_function_stack() == 0
assert torch._dynamo.utils.counters["graph_break"] == {}
said = sentinel.finish(None)
assert said["symptoms"] == [] and said["faults"] == [], said
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr


def test_torchscript_and_transforms_work_while_it_watches(sentinel: Sentinel) -> None:
    sentinel.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: x.detach() * 2, torch.ones(2))
    assert traced(torch.ones(2)).tolist() == [2.0, 2.0]
    grad = torch.func.vmap(torch.func.grad(lambda x: (x.detach() * x).sum()))(torch.ones(3, 2))
    assert grad.tolist() == [[1.0, 1.0]] * 3
    assert kinds(sentinel.finish(None)) <= {"left_autograd"}


def test_it_ends_in_a_forked_child_without_touching_the_parent(sentinel: Sentinel) -> None:
    import os

    sentinel.install()
    child = os.fork()
    if not child:
        code = 1
        try:
            (torch.ones(2, requires_grad=True) * 2).sum().backward()
            code = 0 if torch._C._len_torch_function_stack() == 0 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    trained(2)
    assert sentinel.finish(None)["steps"] == 2
