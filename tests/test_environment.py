"""`gradctl env`: what is installed, what each feature would use here, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradctl import _cli, _torch_private
from gradctl._run import _environment


def test_it_tells_this_interpreter_and_this_torch() -> None:
    found = _environment.describe()
    assert found.python.startswith(platform.python_version())
    assert found.executable == sys.executable
    assert (found.torch, found.torch_error) == (torch.__version__, None)
    assert found.cpu_cores == len(os.sched_getaffinity(0))
    assert found.packages["torch"] == torch.__version__
    assert found.packages["deepspeed"] is None


def test_every_private_name_is_listed_once_and_found_in_this_torch() -> None:
    found = _environment.describe()
    assert [name.path for name in found.private_names] == [entry.path for entry in _torch_private.NAMES]
    assert [name.path for name in found.private_names if not name.found] == []


def test_a_private_name_that_is_gone_says_what_happens_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = _torch_private.PrivateName("gone", "torch:_no_such_name", "2.11", "off", "the sky falls")
    monkeypatch.setattr(_torch_private, "NAMES", (*_torch_private.NAMES, gone))
    monkeypatch.setitem(_torch_private._BY_KEY, "gone", gone)
    text = str(_environment.describe())
    assert "1 missing" in text
    assert "MISSING  torch._no_such_name  (off)\n           without it: the sky falls" in text


def test_a_private_name_with_an_entry_is_written_nowhere_else() -> None:
    package = Path(_torch_private.__file__).parent
    dotted = {entry.path.replace(":", ".") for entry in _torch_private.NAMES if ":_" in entry.path}
    used = [
        (str(file.relative_to(package)), name)
        for file in package.rglob("*.py")
        for name in dotted
        if f"{name}(" in file.read_text(encoding="utf-8")
    ]
    assert used == []


def test_it_says_which_engine_off_would_use_and_what_is_not_covered() -> None:
    from gradctl import _off

    report = _off.engine_report()
    off = next(feature for feature in _environment.describe().features if feature.name == "off")
    for gap in report.not_covered:
        assert f"not covered: {gap}" in off.notes
    assert ("the import slot of" in off.means) == (report.engine == "slot")


def test_rank_and_launchers_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = _environment.describe()
    assert found.rank == (1, 4)
    assert found.launchers["srun"] == str(tmp_path / "srun")
    assert "rank 1 of 4" in str(found)


def test_the_verb_prints_text_or_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        _cli.main(["env"])
    assert ended.value.code == 0
    assert f"torch      {torch.__version__}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _cli.main(["env", "--json", "-"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["torch"]) == ("gradctl.env/1", torch.__version__)
    file = tmp_path / "env.json"
    with pytest.raises(SystemExit):
        _cli.main(["env", "--json", str(file)])
    assert json.loads(file.read_text(encoding="utf-8")) == printed
    with pytest.raises(SystemExit) as ended:
        _cli.main(["env", "--json", str(file)])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", "ImportError: libcudart.so.13: cannot open"),
        ("raise OSError('broken\\nfor two reasons')", "OSError: broken"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_part_of_the_answer(tmp_path: Path, module: str, said: str) -> None:
    (tmp_path / "torch.py").write_text(module, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "gradctl", "env"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"cannot be imported: {said}\n" in done.stdout
    assert "off        not available: torch cannot be imported" in done.stdout
