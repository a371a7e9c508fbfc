"""What the recorder must survive: its own faults, forks, compilers, too many optimizers; and that it lets go."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flights import Flight, recorded
from gradctl import _taps
from gradctl._errors import NonFiniteGradient
from gradctl._journal import JournalWriter, read
from gradctl._record import Recorder, _hot
from gradctl._record._blocks import ATOMS


def train(steps: int = 12, clip: bool = False) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6)).pow(2).mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("a fault of ours")


def break_norms(flight: Flight) -> None:
    flight.recorder._norms.read = broken  # type: ignore[method-assign]


def break_rows_before(flight: Flight) -> None:
    flight.recorder._rows.sketch_weights = broken  # type: ignore[method-assign]


def break_rows_after(flight: Flight) -> None:
    flight.recorder._rows.complete = broken  # type: ignore[method-assign]


def break_saved(flight: Flight) -> None:
    flight.recorder._saved.before_backward = broken  # type: ignore[method-assign]


def break_drain(flight: Flight) -> None:
    flight.recorder._drain.empty = broken  # type: ignore[method-assign]


def break_names(flight: Flight) -> None:
    flight.recorder._names.names_for = broken  # type: ignore[method-assign]


def break_losses(flight: Flight) -> None:
    flight.recorder._hot.scaled[-1] = (0, 0.0, 1.0)  # every loss is read the slow way
    flight.recorder._losses._hot = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("damage", "tier", "steps_known"),
    [
        (break_norms, "norms", True),
        (break_rows_before, "rows", True),
        (break_rows_after, "rows", True),
        (break_saved, "saved", True),
        (break_losses, "backward", True),
        (break_drain, "step", False),
        (break_names, "step", False),
    ],
)
def test_a_fault_of_ours_switches_its_tier_off_and_reaches_nobody(
    tmp_path: Path, damage: Any, tier: str, steps_known: bool
) -> None:
    plain = train(clip=True)
    with recorded(tmp_path) as flight:
        damage(flight)
        assert train(clip=True) == plain
    journal = flight.journal
    assert [event.data["where"] for event in journal.named("fault")][:3] == [tier] * 3
    assert "a fault of ours" in journal.named("fault")[0].data["trace"] or tier == "backward"
    (off,) = [event for event in journal.named("tier_off") if event.data["tier"] == tier]
    assert journal.end is not None
    assert journal.end.faults >= 3
    if steps_known:
        assert dict(journal.end.steps) == {0: 12}
        assert sum(block.c for block in journal.blocks) == 12
    assert off.data["why"].startswith("3 faults")


def test_everything_is_taken_back_at_the_end(tmp_path: Path) -> None:
    before = _taps.installed()
    engine = torch.autograd.Variable._execution_engine
    with recorded(tmp_path):
        train(3)
        assert "engine" in _taps.installed()
    assert _taps.installed() == before
    assert torch.autograd.Variable._execution_engine is engine


def test_the_journal_that_cannot_be_written_does_not_stop_the_program(tmp_path: Path) -> None:
    failures: list[str] = []
    writer = JournalWriter(tmp_path / "nowhere" / "journal.rank0.jsonl", on_failure=failures.append)
    recorder = Recorder(writer)
    recorder.install()
    plain = train()
    recorder.finish("exit")
    assert plain == train()
    assert len(failures) == 1


def test_a_lightning_like_closure_is_read_after_it_ran(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact: list[float] = []
    with recorded(tmp_path) as flight:
        for number in range(5):

            def closure(number: int = number) -> Tensor:
                optimizer.zero_grad()
                loss = (model(torch.ones(2, 4)) * (number + 1)).pow(2).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            exact.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)))
    assert [row.tot for row in flight.journal.rows] == pytest.approx(exact, rel=1e-3)
    assert sum(block.microbatches for block in flight.journal.blocks) == 5


def test_stop_in_a_closure_raises_before_the_update(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).pow(2).mean()
        (loss * math.nan).backward()
        return loss

    message = r"weight got a gradient that is NaN or inf in step 1"
    with recorded(tmp_path, on_nonfinite="stop") as flight, pytest.raises(NonFiniteGradient, match=message):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert flight.journal.named("nonfinite")[0].n == 1


def test_stop_reaches_a_program_without_an_optimizer(tmp_path: Path) -> None:
    weight = torch.ones(3, requires_grad=True)
    with recorded(tmp_path, on_nonfinite="stop"):
        for _ in range(6):
            weight.sum().backward()
            with torch.no_grad():
                weight -= 0.1 * weight.grad  # type: ignore[operator]
            weight.grad = None
        loss = (weight * math.inf).sum()
        with pytest.raises(NonFiniteGradient):
            loss.backward()


def test_an_error_inside_the_step_leaves_the_recorder_in_order(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def failing() -> float:
        raise KeyError("of the program")

    with recorded(tmp_path) as flight:
        for number in range(6):
            weight.grad = torch.ones(3)
            if number == 3:
                with pytest.raises(KeyError, match="of the program"):
                    optimizer.step(failing)
            optimizer.step()
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    assert dict(flight.journal.end.steps) == {0: 6}


def test_more_optimizers_than_are_told_apart_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradctl._record._recorder.MAX_OPTIMIZERS", 3)
    with recorded(tmp_path) as flight:
        for _ in range(5):
            weight = nn.Parameter(torch.ones(3))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            for _ in range(2):
                weight.sum().backward()
                optimizer.step()
    assert flight.journal.end is not None
    assert len(flight.journal.end.steps) == 3
    assert any("4 steps" in why for _, why in flight.journal.end.not_seen)


def test_time_in_the_data_loader_is_booked(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorded(tmp_path) as flight:
        for (x,) in data:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    assert any(block.data_ms > 0 for block in flight.journal.blocks)


def test_blocks_split_a_step_into_parts_that_fit_in_it(tmp_path: Path) -> None:
    with recorded(tmp_path) as flight:
        train(40)
    for block in flight.journal.blocks:
        assert block.step_ms > 0
        assert 0 < block.backward_ms + block.optimizer_ms + block.data_ms <= block.step_ms * 1.01


def test_an_inference_tensor_as_gradient_and_a_step_in_inference_mode_are_measured(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with recorded(tmp_path) as flight:
        for number in range(8):
            if number % 2:
                with torch.inference_mode():
                    weight.grad = torch.ones(3)
                    optimizer.step()
            else:
                weight.grad = torch.ones(3)
                optimizer.step()
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0
    assert sum(stretch.c for stretch in flight.journal.maxima) == 8


def test_a_subclass_with_code_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    def steps() -> None:
        weight = torch.ones(5).as_subclass(Loud).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            weight.pow(2).sum().backward()
            optimizer.step()

    heard: list[str] = []
    steps()
    alone, heard = heard, []
    with recorded(tmp_path) as flight:
        steps()
    assert heard == alone
    assert flight.journal.end is not None
    assert flight.journal.end.faults == 0


def in_child(tmp_path: Path, program: str) -> str:
    """Run `program` in a process of its own, with the paths it needs."""
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(file), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_writes_its_own_journal_and_a_loader_worker_none(tmp_path: Path) -> None:
    in_child(
        tmp_path,
        """
        import os, sys
        from pathlib import Path
        import torch
        from gradctl._journal import JournalWriter
        from gradctl._record import Recorder

        folder = Path(sys.argv[1])
        writer = JournalWriter(folder / "journal.rank0.jsonl")
        recorder = Recorder(writer)
        recorder.install()

        def train(steps):
            weight = torch.nn.Parameter(torch.ones(3))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            for _ in range(steps):
                optimizer.zero_grad()
                weight.pow(2).sum().backward()
                optimizer.step()

        train(40)
        for batch in torch.utils.data.DataLoader(range(8), num_workers=1):
            pass
        pid = os.fork()
        if pid == 0:
            writer.forget(folder / "journal.rank0.pid7.jsonl")
            recorder.after_fork_in_child()
            train(5)
            recorder.finish("exit")
            writer.close()
            os._exit(0)
        os.waitpid(pid, 0)
        train(7)
        recorder.finish("exit")
        writer.close()
        """,
    )
    parent, child = read(tmp_path / "journal.rank0.jsonl"), read(tmp_path / "journal.rank0.pid7.jsonl")
    assert parent.end is not None
    assert child.end is not None
    assert sorted(parent.end.steps.values()) == [7, 40]
    assert sum(block.c for block in parent.blocks) == 47
    assert list(child.end.steps.values()) == [5]
    assert sum(block.c for block in child.blocks) == 5
    lines = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*.jsonl"))]
    assert len(lines) == 2
    blocks = [{line for line in found if '"k":"b"' in line} for found in lines]
    assert not blocks[0] & blocks[1]


COMPILED = """
    import json, sys, warnings
    from pathlib import Path
    warnings.filterwarnings("ignore")
    import torch
    from torch._dynamo.utils import counters
    from gradctl._journal import JournalWriter
    from gradctl._record import Recorder

    def run(watch, whole):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        called = model if whole else torch.compile(model, backend="aot_eager")

        def step(x):
            optimizer.zero_grad()
            loss = called(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        recorder = None
        if watch:
            writer = JournalWriter(Path(sys.argv[1]) / f"journal.rank{int(whole)}.jsonl")
            recorder = Recorder(writer)
            recorder.install()
        call = torch.compile(step, backend="aot_eager") if whole else step
        losses = [call(torch.randn(4, 6)).item() for _ in range(14)]
        if recorder is not None:
            recorder.finish("exit")
            writer.close()
        return losses, counters["stats"]["unique_graphs"]

    print(json.dumps([[run(watch, whole) for watch in (False, True)] for whole in (False, True)]))
"""


@pytest.mark.slow
def test_compiled_training_is_recorded_without_changing_it(tmp_path: Path) -> None:
    (plain_model, watched_model), (plain_step, watched_step) = json.loads(in_child(tmp_path, COMPILED))
    assert watched_model == plain_model  # losses, and how many graphs were compiled
    assert watched_step[0] == plain_step[0]
    assert watched_step[1] <= plain_step[1] + 2  # the step is cut at our hooks, and not compiled anew each time
    for rank in (0, 1):
        journal = read(tmp_path / f"journal.rank{rank}.jsonl")
        assert journal.end is not None
        assert journal.end.faults == 0
        assert dict(journal.end.steps) == {0: 14}
        assert sum(block.microbatches for block in journal.blocks) == 14


def test_a_program_that_never_steps_keeps_no_growing_list(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    loader = torch.utils.data.DataLoader(torch.zeros(2000), batch_size=1)
    most, kept = 0, _hot.MOST_STAMPS
    _hot.MOST_STAMPS = 500
    try:
        with recorded(tmp_path) as flight:
            for _ in loader:
                torch.autograd.grad((weight * 2).sum(), weight)
                most = max(most, len(flight.recorder._stamps))
    finally:
        _hot.MOST_STAMPS = kept
    assert 0 < most <= 500 + ATOMS


THREADS = """
import sys, threading
import torch
import gradctl

def train(seed):
    weight = torch.nn.Parameter(torch.randn(30, 30, generator=torch.Generator().manual_seed(seed)))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        weight.pow(2).mean().backward()
        optimizer.step()

orders = 0
for number in range(60):
    with gradctl.record(f"{sys.argv[1]}/{number}", report=False, quiet=True) as recording:
        threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recording.journal.named("fault") == ()
    orders += len(recording.journal.named("order"))
assert orders > 0  # three threads share twelve steps: not every recording sees a whole group
"""


def test_gradients_that_other_threads_are_computing_are_not_read(tmp_path: Path) -> None:
    """A `.grad` that is read while the engine of another thread writes it ends the process: here nine times in ten."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, tmp_path], capture_output=True, text=True, timeout=110, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
