"""The command line: what it offers, how it answers mistakes, and that it hands the script's words on untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl import _cli, _run
from gradctl._errors import GradctlError, SwitchFailed
from gradctl._policy import Policy


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Call the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        _cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], Policy, str]]:
    """What `run` would have started."""
    calls: list[tuple[tuple[str, ...], Policy, str]] = []

    def start(command: tuple[str, ...], policy: Policy, script: str) -> NoReturn:
        calls.append((command, policy, script))
        raise SystemExit(0)

    monkeypatch.setattr(_run, "start", start, raising=False)
    return calls


def test_exit_codes_are_frozen() -> None:
    assert {code.name: int(code) for code in _cli.ExitCode} == {
        "CLEAN": 0,
        "FINDINGS": 1,
        "USAGE": 2,
        "FAULT": 3,
        "NO_VERDICT": 4,
    }


def test_verbs_and_options_are_frozen() -> None:
    found = {
        name: sorted(option for parameter in verb.params for option in parameter.opts if option.startswith("-"))
        for name, verb in _cli.gradctl.commands.items()
    }
    assert found == {
        "run": [
            "--budget", "--force", "--grad", "--lines", "--name", "--no-report", "--on-nonfinite", "--out", "--plan",
            "--policy", "--quiet", "--watch-steps", "-q",
        ],
        "report": ["--force", "--json", "-o"],
        "explain": ["--at-step", "--full", "--into", "--json", "--no-rerun", "--notes", "--steps"],
        "memory": ["--json", "--no-report", "--out", "--pickle", "--step"],
        "fit": ["--json", "--memory", "-o"],
        "cause": [],
        "env": ["--json"],
    }  # fmt: skip


HEAVY = ("torch", "numpy", "rich", "jinja2", "gradctl._run", "gradctl.report", "gradctl._journal")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["--version"], ["rnu"]])
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom gradctl._cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("gradctl")
    for arguments in (["--help"], ["run", "--help"], ["--version"], ["rnu"], ["report", "nowhere"]):
        one = subprocess.run([command, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
        other = subprocess.run(
            [sys.executable, "-m", "gradctl", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_help_names_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for word in ("run", "report", "env", "0 clean", "1 findings", "2 usage", "3 a failure of gradctl", "4 no verdict"):
        assert word in out
    assert call(capsys, "-h")[1] == out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu", "x.py"], "Did you mean `run`?"),
        (["reprot"], "Did you mean `report`?"),
        (["train.py"], "Did you mean `gradctl run train.py`?"),
        (["zzzzzz"], "There are: cause, env, explain, fit, memory, report, run."),
        (["run"], "Missing SCRIPT, -m MODULE or -c CODE"),
        (["run", "-O"], "Missing SCRIPT"),
        (["run", "-m"], "Missing SCRIPT"),
        (["run", "--"], "Missing SCRIPT"),
        (["run", "--grad", "of", "x.py"], "'of' is not one of 'on', 'off'"),
        (["run", "--watch-steps", "0", "x.py"], "0 is not in the range"),
        (["run", "--watch-step", "3", "x.py"], "--watch-steps"),
        (["run", "--on-nonfinite", "panic", "x.py"], "'panic' is not one of"),
        (["run", "--name", "a/b", "x.py"], "--name cannot be 'a/b'"),
        (["run", "--policy", "none.toml", "x.py"], "cannot read the policy file none.toml"),
        (["run", "-k", "x.py"], "No such option"),
        (["run", "--grad", "off", "-I", "-c", ""], "gradients cannot be kept off under `python -I`"),
        (["run", "none.py"], "there is no script none.py"),
        (["report"], "RUN_DIR"),
        (["report", "nowhere"], "nowhere"),
        (["env", "--jsn"], "--json"),
    ],
)
def test_a_mistake_is_answered_in_words_with_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "command", "script"),
    [
        (["x.py"], ["x.py"], "x.py"),
        (["x.py", "--help", "--grad", "off", "-q"], ["x.py", "--help", "--grad", "off", "-q"], "x.py"),
        (["x.py", "--", "-m"], ["x.py", "--", "-m"], "x.py"),
        (["-m", "pkg.mod", "-q"], ["-m", "pkg.mod", "-q"], "pkg.mod"),
        (["-mpkg"], ["-mpkg"], "pkg"),
        (["-c", "import torch", "-m"], ["-c", "import torch", "-m"], "-c"),
        (["-Oc", "pass"], ["-Oc", "pass"], "-c"),
        (["-O", "x.py"], ["-O", "x.py"], "x.py"),
        (["-OOuB", "x.py", "-O"], ["-OOuB", "x.py", "-O"], "x.py"),
        (["-W", "ignore", "-Xdev", "x.py"], ["-W", "ignore", "-Xdev", "x.py"], "x.py"),
        (["-uW", "error", "-X", "dev", "-m", "m"], ["-uW", "error", "-X", "dev", "-m", "m"], "m"),
        (["--", "x.py", "a"], ["x.py", "a"], "x.py"),
        (["--", "-O", "x.py"], ["-O", "x.py"], "x.py"),
        (["--check-hash-based-pycs", "never", "x.py"], ["--check-hash-based-pycs", "never", "x.py"], "x.py"),
        (["-", "a"], ["-", "a"], "-"),
        (["-c", "", "a"], ["-c", "", "a"], "-c"),
    ],
)
def test_everything_from_the_script_on_is_the_interpreters(
    capsys: pytest.CaptureFixture[str],
    started: list[tuple[tuple[str, ...], Policy, str]],
    arguments: list[str],
    command: list[str],
    script: str,
) -> None:
    code, _, err = call(capsys, "run", *arguments)
    assert (code, err) == (0, "")
    assert started == [(tuple(command), Policy(), script)]


def test_our_options_and_the_interpreters_may_be_mixed_before_the_script(
    capsys: pytest.CaptureFixture[str], started: list[tuple[tuple[str, ...], Policy, str]]
) -> None:
    words = (
        "-q -O --grad off -W ignore --out=d --name n -u --watch-steps 7 --on-nonfinite stop --lines --no-report "
        "--force --budget 0.02"
    )
    call(capsys, "run", *words.split(), "x.py", "--name", "theirs")
    assert started == [
        (
            ("-O", "-W", "ignore", "-u", "x.py", "--name", "theirs"),
            Policy(
                grad="off",
                out=Path("d"),
                name="n",
                watch_steps=7,
                on_nonfinite="stop",
                lines=True,
                report=False,
                quiet=True,
                force=True,
                budget=0.02,
            ),
            "x.py",
        )
    ]


def test_an_option_that_lacks_its_value_takes_no_script_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "run", "--out")
    assert code == 2
    assert "--out" in err


def test_flags_beat_the_policy_file_that_lies_here(
    capsys: pytest.CaptureFixture[str],
    started: list[tuple[tuple[str, ...], Policy, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gradctl.toml").write_text('grad = "off"\nquiet = true\n', encoding="utf-8")
    call(capsys, "run", "--grad", "on", "x.py")
    assert [(policy.grad, policy.quiet) for _, policy, _ in started] == [("on", True)]


def test_an_unknown_key_of_the_policy_file_is_named_with_its_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[tool.gradctl.run]\nwatch = 3\n", encoding="utf-8")
    code, out, err = call(capsys, "run", "x.py")
    assert (code, out) == (2, "")
    assert err.startswith("UnknownPolicyKey: ")
    assert f"{tmp_path / 'pyproject.toml'}: tool.gradctl.run.watch is not a key that gradctl knows" in err


@given(st.lists(st.text(min_size=1, max_size=8), max_size=6))
def test_no_word_after_the_script_is_ever_taken(words: list[str]) -> None:
    ours, command = _cli.split_run_arguments(
        ["--out", "d", "-O", "x.py", *words], value_options=frozenset({"--out", "--name"})
    )
    assert ours == ["--out", "d"]
    assert command == ["-O", "x.py", *words]


@given(st.lists(st.sampled_from(["-q", "-O", "-W", "ignore", "--out", "d", "x.py", "-m", "--", "-", "-uq", "--x=1"])))
def test_no_word_is_lost_or_doubled(words: list[str]) -> None:
    ours, command = _cli.split_run_arguments(words, value_options=frozenset({"--out"}))
    together = [*ours, *command]
    assert sorted(together) == sorted(words) or sorted([*together, "--"]) == sorted(words)
    _cli.script_name(command)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (
            SwitchFailed("no slot", why="because", fix="do this"),
            3,
            "SwitchFailed: no slot\n  why   because\n  fix   do this",
        ),
        (GradctlError("plain"), 3, "GradctlError: plain"),
        (ZeroDivisionError("ours"), 3, "gradctl failed by a fault of its own"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failure_of_ours_has_a_code_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: int, said: str
) -> None:
    def start(*_: Any) -> NoReturn:
        raise fault

    monkeypatch.setattr(_run, "start", start, raising=False)
    got, out, err = call(capsys, "run", "x.py")
    assert (got, out) == (code, "")
    assert said in err
    assert ("Traceback" in err) == isinstance(fault, ZeroDivisionError)


def test_a_reader_who_leaves_gets_no_traceback(tmp_path: Path) -> None:
    # The pipe is closed before anything is written to it.
    code = "from gradctl._cli import main; main(['--help'])"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# -- report ----------------------------------------------------------------------------------------------------------

RUN = {
    "k": "run", "schema": "gradctl.journal/1", "argv": ["train.py"], "script": "train.py", "cwd": "/somewhere",
    "pid": 7, "ppid": 1, "main": True, "rank": 0, "world_size": 1, "host": "here", "started": 1.7e9, "python": "3.11.7",
    "torch": "2.13.0", "gradctl": "0.1.0", "platform": "Linux", "device": "cpu", "threads": 1, "start": "run",
    "grad": "on", "budget": 0.01,
}  # fmt: skip
END = {"k": "end", "how": "exit", "code": 0, "exc": None, "steps": {}, "backwards": 0, "cost": 0.0, "one_off": 0.0,
       "wall": 1.0, "share": 0.0, "faults": 0, "dropped": {}, "rss": 100.0, "not_seen": [], "bytes": 0, "children": [],
       "tiers": {}}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with the smallest journal there is."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    lines = [json.dumps(record) for record in (RUN, END)]
    (directory / "journal.rank0.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def test_report_prints_the_summary_and_writes_the_page_beside_the_journal(
    capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    code, out, err = call(capsys, "report", "run")
    assert (code, err) == (0, "")
    assert "train.py" in out
    assert str(Path("run") / "report.html") in out
    assert (run_dir / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_a_page_that_is_there_is_kept_unless_forced(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    page = run_dir / "report.html"
    page.write_text("kept", encoding="utf-8")
    assert call(capsys, "report", "run")[0] == 0
    assert page.read_text(encoding="utf-8") == "kept"
    assert call(capsys, "report", "run", "--force")[0] == 0
    assert page.read_text(encoding="utf-8") != "kept"


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_a_named_file_that_exists_is_refused_unless_forced(
    capsys: pytest.CaptureFixture[str], run_dir: Path, option: str
) -> None:
    Path("mine").write_text("kept", encoding="utf-8")
    code, out, err = call(capsys, "report", "run", option, "mine")
    assert (code, out) == (2, "")
    assert "mine exists and is not overwritten" in err
    assert Path("mine").read_text(encoding="utf-8") == "kept"
    assert call(capsys, "report", "run", option, "mine", "--force")[0] == 0
    assert Path("mine").read_text(encoding="utf-8") != "kept"


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_a_file_that_cannot_be_written_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], run_dir: Path, option: str
) -> None:
    code, _, err = call(capsys, "report", "run", option, "no/such/folder")
    assert code == 2
    assert "cannot write" in err


def test_json_to_stdout_is_json_and_nothing_else(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    code, out, err = call(capsys, "report", "run", "--json", "-")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary["schema"] == "gradctl.summary/1"
    assert (summary["script"], summary["exit_code"]) == ("train.py", 0)
    assert not (run_dir / "report.html").exists()


def test_report_needs_no_torch(run_dir: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom gradctl._cli import main\n"
        "main(['report', 'run', '-o', 'page.html', '--json', 'summary.json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("page.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "named"), [(None, "RunDirectoryError"), ("not a journal\n", "BadJournal"), ("{}\n", "BadJournal")]
)
def test_what_is_no_run_is_refused_in_words(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    if content is not None:
        Path("run/journal.rank0.jsonl").write_text(content, encoding="utf-8")
    code, out, err = call(capsys, "report", "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"{named}: ")
    assert "Traceback" not in err
