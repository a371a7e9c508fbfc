"""`gradctl explain`: its two runs, exit codes, JSON, what goes wrong, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradctl._results import Finding
from starting import Outcome, environment, launch

EXPLAIN = (sys.executable, "-m", "gradctl", "explain")
NOTICE = "gradctl: something may be wrong with the gradients. Running the script again, traced"

HEAD = """\
import os, sys
with open("runs.txt", "a") as log:
    print("run", file=log)
import torch
from torch import nn
torch.manual_seed(0)
"""
MODEL = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.tower(x))
        h = {tap}
        return self.head(h)

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(12):
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    loss = nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad()
    {backward}
    optimizer.step()
print("trained")
print("on stderr", file=sys.stderr)
{end}
"""


def program(*, tap: str = "h", backward: str = "loss.backward()", end: str = "", head: str = HEAD) -> str:
    return head + MODEL.format(tap=tap, backward=backward, end=end)


HEALTHY = program()
CUT = program(tap="h.detach()")
CUT_LINE = CUT.splitlines().index("        h = h.detach()") + 1
NO_HISTORY = program(backward="loss = loss.detach(); loss.backward()")
NO_HISTORY_LINE = next(n for n, line in enumerate(NO_HISTORY.splitlines(), 1) if "loss.detach()" in line)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory beside a directory of temporary files that nobody else uses."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def explained(home: Path, *words: str, text: str | None = None, **options: Any) -> Outcome:
    """Run `gradctl explain WORDS`; a `text` is written to train.py first. Nothing of ours may be left afterwards."""
    if text is not None:
        (home / "train.py").write_text(text, encoding="utf-8")
    done = launch([*EXPLAIN, *words], home, env=settings(home), **options)
    assert left_behind(home) == []
    return done


def settings(home: Path) -> dict[str, str]:
    return environment(TMPDIR=str(home.parent / "tmp"), PYTHONDONTWRITEBYTECODE="1")


def left_behind(home: Path) -> list[str]:
    """What lies in the directory of temporary files or was recorded here, torch's own folders left out."""
    found = [
        name
        for name in os.listdir(home.parent / "tmp")
        if not name.startswith(("torchinductor", "torch_", "torchelastic"))
    ]
    return [*found, *(name for name in os.listdir(home) if name == "gradctl-runs")]


def runs(home: Path) -> int:
    return len((home / "runs.txt").read_text().splitlines())


# ------------------------------------------------------------------------------------------------- the two stages


def test_a_healthy_script_runs_once_and_is_clean(home: Path) -> None:
    done = explained(home, "train.py", text=HEALTHY)
    assert (done.code, done.stderr) == (0, "on stderr\n")
    assert done.stdout == "trained\ngradctl explain train.py\n\n  ● nothing is wrong with the gradients of 12 steps\n"
    assert runs(home) == 1


def test_a_silent_cut_is_found_in_a_second_run_that_nobody_hears(home: Path) -> None:
    done = explained(home, "train.py", text=CUT)
    assert done.code == 1
    assert done.stdout.startswith("trained\ngradctl explain train.py\n\n  symptom   ")
    assert f"\n  cause     detach   train.py:{CUT_LINE}\n" in done.stdout
    assert f"     > {CUT_LINE:>4} |         h = h.detach()\n" in done.stdout
    assert "  affected  tower.{weight,bias}" in done.stdout or "  affected  tower.*" in done.stdout
    assert done.stdout.count("trained") == 1
    assert done.stderr.count("on stderr") == 1
    assert runs(home) == 2


@pytest.mark.slow
def test_the_second_run_is_announced_once_and_before_it_begins(home: Path) -> None:
    done = explained(home, "train.py", text=CUT)
    assert done.stderr.count("(--no-rerun forbids that)") == 1
    assert done.stderr.startswith(f"on stderr\n{NOTICE}")


@pytest.mark.slow
def test_a_gradient_error_keeps_its_traceback_and_gets_its_cause(home: Path) -> None:
    done = explained(home, "train.py", text=NO_HISTORY)
    assert done.code == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "element 0 of tensors does not require grad" in done.stderr
    assert f"\n  cause     detach   train.py:{NO_HISTORY_LINE}\n" in done.stdout


@pytest.mark.slow
def test_full_traces_the_only_run(home: Path) -> None:
    done = explained(home, "--full", "train.py", text=CUT)
    assert done.code == 1
    assert f"detach   train.py:{CUT_LINE}" in done.stdout
    assert done.stdout.startswith("trained\n")
    assert done.stderr == "on stderr\n"
    assert runs(home) == 1


@pytest.mark.slow
def test_full_finds_nothing_in_a_healthy_script(home: Path) -> None:
    done = explained(home, "--full", "train.py", text=HEALTHY)
    assert done.code == 0
    assert done.stdout.endswith("● nothing is wrong with the gradients of 12 steps\n")


@pytest.mark.slow
def test_steps_end_the_traced_run(home: Path) -> None:
    done = explained(home, "--full", "--steps", "4", "train.py", text=CUT)
    assert done.code == 1
    assert "trained" not in done.stdout
    assert "the script was ended after 4 steps" in done.stdout


@pytest.mark.slow
def test_the_second_run_ends_as_soon_as_the_symptom_is_explained(home: Path) -> None:
    text = CUT.replace(
        "    optimizer.step()\n", "    optimizer.step()\n    print('step', file=open('steps.txt', 'a'))\n"
    )
    text = text.replace("range(12)", "range(60)")
    assert explained(home, "train.py", text=text).code == 1
    steps = len((home / "steps.txt").read_text().splitlines())
    assert 60 <= steps < 90


@pytest.mark.slow
def test_what_a_run_that_was_cut_short_has_put_among_temporary_files_is_removed(home: Path) -> None:
    head = HEAD + "import tempfile, shutil\nplace = tempfile.mkdtemp()\nnamed = tempfile.NamedTemporaryFile()\n"
    done = explained(home, "train.py", text=program(tap="h.detach()", head=head, end="shutil.rmtree(place)"))
    assert done.code == 1
    assert runs(home) == 2


@pytest.mark.slow
def test_no_rerun_runs_once_and_says_that_it_shows_no_proof(home: Path) -> None:
    done = explained(home, "--no-rerun", "train.py", text=CUT)
    assert done.code == 4
    assert runs(home) == 1
    assert "\n  symptom   " in done.stdout
    assert "\n  perhaps   detach   train.py:" in done.stdout
    assert "was not run a second time (--no-rerun)" in " ".join(done.stdout.split())
    assert done.stderr == "on stderr\n"


@pytest.mark.slow
def test_no_rerun_of_a_healthy_script_is_clean(home: Path) -> None:
    done = explained(home, "--no-rerun", "train.py", text=HEALTHY)
    assert done.code == 0


@pytest.mark.slow
def test_notes_ask_for_a_trace_of_a_healthy_script_too(home: Path) -> None:
    done = explained(
        home, "--notes", "train.py", text=HEALTHY.replace("    optimizer.step()", "    optimizer.step(); loss.detach()")
    )
    assert done.code == 0
    assert done.stderr.count("nothing is wrong so far") == 1
    assert runs(home) == 2


@pytest.mark.slow
def test_a_step_may_be_named(home: Path) -> None:
    done = explained(home, "--at-step", "8", "train.py", text=CUT)
    assert done.code == 1
    assert f"detach   train.py:{CUT_LINE}" in done.stdout


@pytest.mark.slow
def test_a_module_and_code_are_explained_as_well(home: Path) -> None:
    (home / "package").mkdir()
    (home / "package" / "__init__.py").touch()
    (home / "package" / "train.py").write_text(CUT, encoding="utf-8")
    done = explained(home, "-m", "package.train")
    assert done.code == 1
    assert f"     > {CUT_LINE:>4} |         h = h.detach()" in done.stdout
    code = explained(home, "-O", "-c", CUT)
    assert code.code == 1
    assert "cause     detach" in code.stdout


@pytest.mark.slow
def test_the_script_gets_its_own_words(home: Path) -> None:
    done = explained(home, "train.py", "--json", "x", "-h", text=HEALTHY + "\nprint(sys.argv)\n")
    assert done.code == 0
    assert "['train.py', '--json', 'x', '-h']" in done.stdout


# --------------------------------------------------------------------------------------------------------- JSON


def test_json_on_stdout_is_the_only_thing_there(home: Path) -> None:
    done = explained(home, "--json", "-", "train.py", text=CUT)
    found = json.loads(done.stdout)
    assert done.code == 1
    assert "trained\n" in done.stderr
    assert list(found) == ["schema", "script", "exit_code", "versions", "findings"]
    assert (found["schema"], found["script"], found["exit_code"]) == ("gradctl.findings/1", "train.py", 1)
    assert {"gradctl", "python", "torch"} <= set(found["versions"])
    first = found["findings"][0]
    assert list(first) == [
        "slug", "severity", "confidence", "symptom", "primary", "evidence", "parameters", "path", "why", "fix",
        "measured",
    ]  # fmt: skip
    assert Finding.from_json(first).to_json() == first
    assert (first["slug"], first["primary"]) == ("detach", {"file": "train.py", "line": CUT_LINE})
    assert sorted(first["parameters"]) == ["tower.bias", "tower.weight"]


@pytest.mark.slow
def test_json_goes_to_a_file_beside_the_view(home: Path) -> None:
    done = explained(home, "--json", "found.json", "train.py", text=HEALTHY)
    found = json.loads((home / "found.json").read_text(encoding="utf-8"))
    assert (done.code, found["exit_code"], found["findings"]) == (0, 0, [])
    assert "nothing is wrong" in done.stdout


def test_a_json_file_that_exists_is_refused_before_anything_runs(home: Path) -> None:
    (home / "found.json").write_text("mine", encoding="utf-8")
    done = explained(home, "--json", "found.json", "train.py", text=HEALTHY)
    assert done.code == 2
    assert "found.json exists and is not overwritten" in done.stderr
    assert (home / "found.json").read_text(encoding="utf-8") == "mine"
    assert not (home / "runs.txt").exists()


# ---------------------------------------------------------------------------------------------------- bad input


def test_without_a_script_the_usage_is_shown(home: Path) -> None:
    done = explained(home, "--full")
    assert (done.code, done.stdout) == (2, "")
    assert "Missing SCRIPT, -m MODULE or -c CODE: what to explain." in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian.py"], "there is no script trian.py\n  fix   did you mean train.py?"),
        (["torchrun", "train.py"], "torchrun ... -m gradctl explain train.py"),
        (["run.sh"], "its first line asks for /bin/sh"),
        (["-m", "trian"], "there is no module trian\n  fix   did you mean train?"),
        (["-um", "train.py"], "  fix   a file is run without -m: gradctl explain train.py"),
        (["-m", "json.tol", "x"], "there is no module json.tol\n  fix   did you mean json.tool?"),
        (["-m", "xml"], "xml is a package that cannot be run\n  why   it has no __main__.py"),
        (["-I", "train.py"], "nothing can be explained under `python -I`"),
        (["--steps", "0", "train.py"], "Invalid value for '--steps'"),
    ],
)
def test_what_cannot_be_run_is_refused(home: Path, words: list[str], said: str) -> None:
    (home / "run.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    done = explained(home, *words, text=HEALTHY)
    assert (done.code, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "runs.txt").exists()


def verdict(done: Outcome) -> str:
    """The verdict in one line."""
    return " ".join(done.stdout[done.stdout.index("●") + 2 :].split())


NO_TORCH = "no verdict: the script never imported torch"
CASES: dict[str, tuple[str, int, str]] = {
    "no torch": ("print('hello')", 4, NO_TORCH),
    "needs arguments": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--data', required=True)\np.parse_args()",
        4,
        "not a gradient problem: the script ended itself with exit code 2",
    ),
    "fails before torch": (
        "import no_such_module\nimport torch",
        4,
        "not a gradient problem: ModuleNotFoundError: No module named 'no_such_module' (train.py:1); "
        "torch was not imported",
    ),
    "is no Python": (
        "def f(:\n",
        4,
        "not a gradient problem: SyntaxError: invalid syntax (train.py, line 1) (train.py:1); torch was not imported",
    ),
    "leaves at once": (
        "import os\nos._exit(0)",
        4,
        "no verdict: the script ended by os._exit, or became another program, before torch was there",
    ),
    "no backward": (
        "import torch\nprint(torch.ones(2).sum())",
        4,
        "no verdict: the script has run no backward, so that there is no gradient to judge",
    ),
    "killed": (
        program(end="import signal; os.kill(os.getpid(), signal.SIGKILL)"),
        4,
        "no verdict: the script was ended by SIGKILL",
    ),
    "own error": (
        program(end="{}['key']"),
        4,
        "not a gradient problem: KeyError: 'key' (train.py:%d)",
    ),
    "own error before the first step": (
        program(backward="raise ValueError('bad data')"),
        4,
        "not a gradient problem: ValueError: bad data (train.py:%d)",
    ),
    "exit code": (program(end="sys.exit(3)"), 4, "not a gradient problem: the script ended itself with exit code 3"),
    "sys.exit(0)": (program(end="sys.exit(0)"), 0, "nothing is wrong with the gradients of 12 steps"),
    "sys.exit()": (program(end="sys.exit()"), 0, "nothing is wrong with the gradients of 12 steps"),
    "os._exit": (program(end="os._exit(0)"), 0, "nothing is wrong with the gradients of 12 steps"),
    "forks": (
        program(end="pid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: print('child'); sys.exit(5)"),
        0,
        "nothing is wrong with the gradients of 12 steps",
    ),
    "a child with os._exit": (
        program(end="pid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: os._exit(5)"),
        0,
        "nothing is wrong with the gradients of 12 steps",
    ),
}


FAST = ("no torch", "needs arguments", "fails before torch", "is no Python", "leaves at once", "own error")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_script_that_gives_no_verdict_gets_one_clear_sentence(home: Path, case: str) -> None:
    text, code, said = CASES[case]
    done = explained(home, "train.py", text=text)
    if "%d" in said:
        line = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(("{}[", "raise ")))
        said %= line
    assert (done.code, verdict(done)) == (code, said)
    assert NOTICE not in done.stderr
    if (home / "runs.txt").exists():
        assert runs(home) == 1


def test_the_message_of_a_script_that_needs_arguments_is_shown(home: Path) -> None:
    done = explained(home, "train.py", text=CASES["needs arguments"][0])
    assert "the following arguments are required: --data" in done.stderr


@pytest.mark.slow
def test_full_does_not_call_a_foreign_error_a_gradient_problem(home: Path) -> None:
    done = explained(home, "--full", "train.py", text=CASES["own error"][0])
    assert done.code == 4
    assert verdict(done).startswith("not a gradient problem: KeyError: 'key'")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "sys.exit(3)", "{}['key']"])
def test_a_cut_is_found_however_the_script_ends(home: Path, end: str) -> None:
    done = explained(home, "train.py", text=program(tap="h.detach()", end=end))
    assert done.code == 1
    assert f"detach   train.py:{CUT_LINE}" in done.stdout


@pytest.mark.slow
def test_a_second_run_that_fails_anew_shows_its_output_and_no_invented_cause(home: Path) -> None:
    head = HEAD + "if os.path.exists('model.pt'): print('leaving'); raise FileExistsError('model.pt is there')\n"
    done = explained(home, "train.py", text=program(tap="h.detach()", head=head, end="open('model.pt', 'w')"))
    assert done.code in (1, 4)
    assert "the traced run ended with FileExistsError: model.pt is there" in " ".join(done.stdout.split())
    assert "    leaving\n" in done.stderr
    assert "    FileExistsError: model.pt is there\n" in done.stderr
    assert runs(home) == 2


# -------------------------------------------------------------------------------------------------------- input


READS = program(tap="h.detach()", end="print('read', len(sys.stdin.read()), file=open('read.txt', 'a'))").replace(
    "range(12)", "range(4)"
)


@pytest.mark.slow
def test_what_the_first_run_reads_from_a_pipe_is_given_to_the_second(home: Path) -> None:
    head = (
        HEAD
        + "text = sys.stdin.read(); print(len(text), hash(text) == hash('x' * len(text)), file=open('read.txt', 'a'))\n"
    )
    text = program(tap="h.detach()", head=head)
    done = explained(home, "train.py", text=text, stdin="x" * 300_000)
    assert done.code == 1
    assert (home / "read.txt").read_text() == "300000 True\n" * 2


@pytest.mark.slow
def test_a_file_is_read_from_where_it_stood(home: Path) -> None:
    (home / "input.txt").write_text("skipped\nfirst\nsecond\n", encoding="utf-8")
    head = HEAD + "print(input(), file=open('read.txt', 'a'))\n"
    (home / "train.py").write_text(program(tap="h.detach()", head=head), encoding="utf-8")
    with open(home / "input.txt", "rb") as file:
        os.lseek(file.fileno(), len("skipped\n"), os.SEEK_SET)
        done = subprocess.run(
            [*EXPLAIN, "train.py"],
            cwd=home,
            env=settings(home),
            stdin=file,
            capture_output=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 1
    assert (home / "read.txt").read_text() == "first\nfirst\n"


@pytest.mark.slow
def test_a_script_that_comes_through_stdin_is_run_twice_as_well(home: Path) -> None:
    done = explained(home, "-", stdin=CUT)
    assert done.code == 1
    assert "cause     detach" in done.stdout
    assert runs(home) == 2


@pytest.mark.slow
def test_a_pipe_that_stays_open_does_not_hold_the_end_up(home: Path) -> None:
    (home / "train.py").write_text(CUT, encoding="utf-8")
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [*EXPLAIN, "train.py"],
            cwd=home,
            env=settings(home),
            stdin=reader,
            capture_output=True,
            timeout=100,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 1


@pytest.mark.slow
def test_that_a_terminal_cannot_be_read_twice_is_said(home: Path) -> None:
    head = HEAD + "name = input('name? ')\n"
    (home / "train.py").write_text(program(tap="h.detach()", head=head), encoding="utf-8")
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [*EXPLAIN, "train.py"], cwd=home, env=settings(home), stdin=slave,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.write(master, b"ada\n")
        out, err = process.communicate(timeout=100)
    finally:
        os.close(master)
        os.close(slave)
    assert process.returncode in (1, 4)
    assert "traced, with an empty input instead of the terminal" in err
    assert "the traced run ended with EOFError" in " ".join(out.split())
    assert "it reads from the terminal, and what is typed cannot be typed again" in " ".join(out.split())


# ------------------------------------------------------------------------------------------------------ signals


SLEEPS = "import os, time\nprint('waiting', flush=True)\nopen('waits', 'w').close()\ntime.sleep(60)\n"
# The second time it waits where nobody hears it.
SLEEPS_AGAIN = program(
    tap="h.detach()",
    head=HEAD
    + "import time\nif os.path.exists('once'): open('waits', 'w').close(); time.sleep(60)\nopen('once', 'w').close()\n",
)


@pytest.mark.parametrize(
    "text",
    [pytest.param(SLEEPS, id="first run"), pytest.param(SLEEPS_AGAIN, id="second run", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("signum", "send"),
    [(signal.SIGINT, os.killpg), (signal.SIGINT, os.kill), (signal.SIGTERM, os.kill)],
    ids=["Ctrl-C", "SIGINT", "SIGTERM"],
)
def test_a_signal_ends_both_and_leaves_nothing(
    home: Path, text: str, signum: int, send: Callable[[int, int], None]
) -> None:
    (home / "train.py").write_text(
        text.replace("open('waits', 'w').close()", "open('waits', 'w').write(str(os.getpid()))"), encoding="utf-8"
    )
    process = subprocess.Popen(
        [*EXPLAIN, "train.py"], cwd=home, env=settings(home), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    waits = home / "waits"
    while not waits.exists() or not waits.read_text():  # the test's own time-out ends it
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    send(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signum
    assert "gradctl explain" not in out
    assert err.count("KeyboardInterrupt") <= 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((home / "waits").read_text()), 0)
    assert left_behind(home) == []


# -------------------------------------------------------------------------------------------------------- ranks


RANKS = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
rank = dist.get_rank()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.tower(x)).detach())


net = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(6):
    optimizer.zero_grad()
    net(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
print(f"rank {rank} trained" + os.linesep, end="", flush=True)
dist.destroy_process_group()
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gradctl")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--full"]], ids=["two runs", "one run"])
def test_all_ranks_trace_and_one_speaks(home: Path, options: list[str]) -> None:
    (home / "train.py").write_text(RANKS, encoding="utf-8")
    done = launch([*TORCHRUN, "explain", *options, "--json", "found.json", "train.py"], home, env=settings(home))
    line = RANKS.splitlines().index("        return self.head(torch.relu(self.tower(x)).detach())") + 1
    assert done.code == 1
    assert done.stdout.count("gradctl explain train.py") == 1
    assert sorted(line for line in done.stdout.splitlines() if line.endswith("trained")) == [
        "rank 0 trained",
        "rank 1 trained",
    ]
    assert done.stderr.count(NOTICE) == (0 if options else 1)
    found = json.loads((home / "found.json").read_text(encoding="utf-8"))
    assert [(f["slug"], f["primary"]) for f in found["findings"]] == [("detach", {"file": "train.py", "line": line})]
    assert left_behind(home) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_and_is_the_one_that_is_named(home: Path) -> None:
    text = RANKS.replace("    optimizer.step()\n", "    optimizer.step()\n    if rank == 1: {}['key']\n")
    (home / "train.py").write_text(text.replace(".detach()", ""), encoding="utf-8")
    done = launch([*TORCHRUN, "explain", "train.py"], home, env=settings(home))
    assert done.code == 1
    assert done.stdout.count("gradctl explain train.py") == 1
    assert verdict(done).startswith("not a gradient problem: KeyError: 'key'")
    assert left_behind(home) == []
