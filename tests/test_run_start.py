"""`gradctl run` becomes the script: what a script can see of its start is what plain Python shows it."""

from __future__ import annotations

import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from starting import FAKE_TORCH, Outcome, environment, launch, plain, recorded, run_directory

WITH_FAKE = environment(PYTHONPATH=FAKE_TORCH)

LOOK = """
import inspect, json, os, re, sys
import torch
class Kept: pass
print(json.dumps(dict(
    argv=sys.argv, orig=sys.orig_argv[1:], name=__name__, file=globals().get("__file__"),
    spec=re.sub("0x[0-9a-f]+", "", str(__spec__)),
    loader=type(__loader__).__name__, keys=sorted(k for k in globals() if k.startswith("__")), path=sys.path,
    flags=str(sys.flags), stack=len(inspect.stack()), warn=sys.warnoptions, x=sorted(sys._xoptions),
    site="sitecustomize" in sys.modules, finders=[str(f) for f in sys.meta_path if "Distutils" not in str(f)],
    torch=sorted(vars(torch.__spec__.loader)), cached=any("_site" in p for p in sys.path_importer_cache),
    kept=Kept.__module__, main=sys.modules["__main__"].__dict__ is globals(), executable=sys.executable,
    prefix=sys.prefix, cwd=os.getcwd(), umask=os.umask(0o22),
)))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def look_alike(cwd: Path, *command: str, env: dict[str, str] | None = None, **options: str) -> None:
    """A program that prints what it sees of itself prints the same under gradctl, and ends the same way."""
    env = env or WITH_FAKE
    ours, theirs = recorded(*command, cwd=cwd, env=env, **options), plain(*command, cwd=cwd, env=env, **options)
    assert ours.stdout == theirs.stdout
    assert theirs.stdout
    assert ours.code == theirs.code
    assert ours.own_stderr == theirs.stderr


def test_a_script_sees_what_it_sees_under_plain_python(tmp_path: Path) -> None:
    write(tmp_path / "look.py", LOOK)
    look_alike(tmp_path, "look.py", "--epochs", "3", "-q", "--", "x y")


def test_a_module_of_a_package_starts_as_under_plain_python(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    write(package / "__init__.py", "print('package')")
    write(package / "__main__.py", LOOK)
    look_alike(tmp_path, "-m", "pack", "-m", "other")


def test_code_on_the_command_line_starts_as_under_plain_python(tmp_path: Path) -> None:
    look_alike(tmp_path, "-c", LOOK, "-c", "ignored")


def test_a_script_from_stdin_starts_as_under_plain_python(tmp_path: Path) -> None:
    look_alike(tmp_path, "-", "argument", stdin=LOOK)


@pytest.mark.parametrize(
    "flags",
    [["-O", "-u", "-B"], ["-W", "error", "-P"], ["-X", "dev", "-Wignore", "-s", "-bb", "-OO"]],
    ids=lambda flags: " ".join(flags),
)
def test_flags_of_the_interpreter_are_handed_on(tmp_path: Path, flags: list[str]) -> None:
    write(tmp_path / "look.py", LOOK)
    look_alike(tmp_path, *flags, "look.py", "argument")


@pytest.mark.parametrize("name", ["mit leerzeichen.py", "größe_梯度.py", "noending", "-dash.py"])
def test_a_script_may_have_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, LOOK)
    look_alike(tmp_path, f"./{name}")


def test_a_linked_script_a_script_with_crlf_and_a_directory_with_main_start(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "look.py").write_bytes(LOOK.replace("\n", "\r\n").encode())
    (tmp_path / "link.py").symlink_to(folder / "look.py")
    write(folder / "__main__.py", LOOK)
    look_alike(tmp_path, "link.py")
    look_alike(tmp_path, "real")


def test_a_zipped_application_starts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    data = (tmp_path / "app.pyz").read_bytes()
    (tmp_path / "app.pyz").write_bytes(b"#!/usr/bin/env python3\n" + data)
    look_alike(tmp_path, "app.pyz")


ENDINGS = {
    "0": "",
    "7": "import sys; sys.exit(7)",
    "raised 3": "raise SystemExit(3)",
    "text": "import sys; sys.exit('bad luck')",
    "a tuple": "import sys; sys.exit((1, 2))",
    "exception": "raise ValueError('boom')",
    "late exit": "import atexit, os; atexit.register(os._exit, 5)",
    "os._exit": "import os; os._exit(9)",
    "KeyboardInterrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "KeyboardInterrupt raised": "raise KeyboardInterrupt",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSEGV": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "caught": "import sys\ntry: sys.exit(4)\nexcept SystemExit as error: print('caught', error.code)",
    "kept": "import sys\ntry: sys.exit(4)\nexcept SystemExit as error: kept = error",
    "in a coroutine": "import asyncio, sys\nasync def main(): sys.exit(6)\nasyncio.run(main())",
    "in a thread": "import sys, threading\nthreading.Thread(target=sys.exit, args=(6,)).start()",
    "pickled": "import pickle, sys\ntry: sys.exit(4)\nexcept SystemExit as e: print(pickle.loads(pickle.dumps(e)))",
    "broken import": "import torch.nothing",
    "syntax": "def f(:\n  pass",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_exit_code_is_that_of_plain_python(tmp_path: Path, ending: str) -> None:
    body = ENDINGS[ending]
    head = "" if ending == "syntax" else "print('begun', flush=True)\nimport torch\n"
    write(tmp_path / "script.py", head + body)
    ours = recorded("script.py", cwd=tmp_path, env=WITH_FAKE)
    theirs = plain("script.py", cwd=tmp_path, env=WITH_FAKE)
    assert (ours.code, ours.stdout, ours.own_stderr) == (theirs.code, theirs.stdout, theirs.stderr)


def test_a_failing_import_of_torch_shows_the_traceback_of_plain_python_and_can_be_tried_again(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    write(
        package / "__init__.py",
        "import os, warnings\nwarnings.warn('from torch', stacklevel=2)\n"
        "if not os.path.exists('ready'): raise ImportError('not ready')\n__version__ = '0'",
    )
    write(
        tmp_path / "script.py",
        "import traceback, sys\ntry:\n    import torch\nexcept ImportError:\n    traceback.print_exc(file=sys.stdout)\n"
        "open('ready', 'w').close()\nimport torch\nprint(torch.__spec__.loader.__dict__)\n",
    )
    theirs = plain("script.py", cwd=tmp_path, env=environment())
    (tmp_path / "ready").unlink()
    ours = recorded("script.py", cwd=tmp_path, env=environment())
    assert ours.stdout == theirs.stdout
    assert ours.own_stderr == theirs.stderr
    assert "from torch" in theirs.stderr


def test_asking_for_the_spec_of_torch_does_not_use_up_the_wait_for_it(tmp_path: Path) -> None:
    write(
        tmp_path / "script.py",
        "import importlib.util, sys, threading\n"
        "assert importlib.util.find_spec('torch') and importlib.util.find_spec('torch')\n"
        "assert 'torch' not in sys.modules and any('WaitForTorch' in str(f) for f in sys.meta_path)\n"
        "threads = [threading.Thread(target=__import__, args=('torch',)) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not any('WaitForTorch' in str(f) for f in sys.meta_path)\n"
        "import torch, importlib; importlib.reload(torch); print('reloaded', sys.modules['torch'] is torch)\n",
    )
    ours = recorded("script.py", cwd=tmp_path, env=WITH_FAKE)
    assert (ours.code, ours.stdout) == (0, "reloaded True\n"), ours.stderr


def test_a_lazily_loaded_torch_is_waited_for(tmp_path: Path) -> None:
    write(
        tmp_path / "script.py",
        "import importlib.util as u, sys\n"
        "spec = u.find_spec('torch'); loader = u.LazyLoader(spec.loader); spec.loader = loader\n"
        "torch = u.module_from_spec(spec); sys.modules['torch'] = torch; loader.exec_module(torch)\n"
        "waits = lambda: any('WaitForTorch' in str(f) for f in sys.meta_path)\n"
        "print(waits(), torch.__version__, waits())\n",
    )
    ours = recorded("script.py", cwd=tmp_path, env=WITH_FAKE)
    assert ours.stdout == "True 0.0 False\n", ours.stderr


def test_the_sitecustomize_that_is_hidden_still_runs(tmp_path: Path) -> None:
    write(tmp_path / "sitecustomize.py", "import sys; sys.foreign = __file__, __name__, __spec__.origin")
    write(tmp_path / "script.py", "import sys, sitecustomize; print(sys.foreign, sitecustomize.__file__)")
    env = environment(PYTHONPATH=str(tmp_path))
    look_alike(tmp_path, "script.py", env=env)


@pytest.mark.parametrize("fault", ["raise RuntimeError('broken')", "import no_such_module", "def f(:", "1/0"])
def test_a_broken_sitecustomize_is_reported_as_plain_python_reports_it(tmp_path: Path, fault: str) -> None:
    write(tmp_path / "sitecustomize.py", fault)
    write(tmp_path / "script.py", "import sys; print('sitecustomize' in sys.modules)")
    env = environment(PYTHONPATH=str(tmp_path))
    ours, theirs = recorded("script.py", cwd=tmp_path, env=env), plain("script.py", cwd=tmp_path, env=env)
    assert (ours.code, ours.stdout) == (theirs.code, theirs.stdout) == (0, "False\n")
    assert "Error in sitecustomize" in theirs.stderr
    # Twice: it is broken for the command `gradctl`, too.
    assert ours.own_stderr == theirs.stderr * 2


def test_an_import_hook_of_the_program_works_beside_ours(tmp_path: Path) -> None:
    write(
        tmp_path / "sitecustomize.py",
        "import sys, importlib.util\n"
        "class Hook:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'torch' or self.busy: return None\n"
        "        self.busy = True\n"
        "        try: spec = importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        "        plain = spec.loader.exec_module\n"
        "        spec.loader.exec_module = lambda module: (plain(module), setattr(module, 'hooked', True))\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Hook())\n",
    )
    write(tmp_path / "script.py", "import sys, torch; print(torch.hooked, 'Hook' in str(sys.meta_path))")
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), FAKE_TORCH]))
    ours = recorded("script.py", cwd=tmp_path, env=env)
    assert ours.stdout == "True True\n"
    # Ours has seen this torch, too: what it says is that this one is not PyTorch.
    assert "nothing was recorded" in ours.stderr


def test_a_script_without_torch_gets_one_line_and_leaves_no_directory(tmp_path: Path) -> None:
    write(tmp_path / "script.py", "print('done')")
    ours = recorded("script.py", cwd=tmp_path)
    assert ours.stderr == "gradctl: torch was never imported: nothing to record\n"
    assert not (tmp_path / "gradctl-runs").exists()
    assert recorded("-q", "script.py", cwd=tmp_path).stderr == ""


@pytest.mark.parametrize("command", [["script.py"], ["-m", "nomodule"], ["-c", "import sys; sys.exit(2)"]])
def test_a_program_that_fails_before_torch_is_told_nothing_about_torch(tmp_path: Path, command: list[str]) -> None:
    write(tmp_path / "script.py", "def f(:\n  pass")
    ours, theirs = recorded(*command, cwd=tmp_path), plain(*command, cwd=tmp_path)
    assert theirs.code != 0
    assert (ours.code, ours.stderr) == (theirs.code, theirs.stderr)
    assert not (tmp_path / "gradctl-runs").exists()


def test_a_script_without_torch_dies_of_ctrl_c(tmp_path: Path) -> None:
    write(tmp_path / "script.py", ENDINGS["KeyboardInterrupt"])
    ours, theirs = recorded("script.py", cwd=tmp_path), plain("script.py", cwd=tmp_path)
    assert (ours.code, ours.own_stderr) == (theirs.code, theirs.stderr)
    assert ours.code == -2


def test_modules_of_the_script_are_not_taken_for_those_of_the_standard_library(tmp_path: Path) -> None:
    for name in ("nt", "json", "pathlib", "signal", "gradctl", "atexit"):
        write(tmp_path / f"{name}.py", f"print('{name} of the script')")
    write(tmp_path / "script.py", "print('done')")
    ours = launch([sys.executable, "-P", "-m", "gradctl", "run", "script.py"], tmp_path)
    assert (ours.stdout, ours.stderr) == ("done\n", "gradctl: torch was never imported: nothing to record\n")


def test_a_program_with_a_gradctl_of_its_own_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "gradctl.py", "print('the gradctl of the script')")
    write(tmp_path / "script.py", "import torch, gradctl; print('done')")
    ours = launch([sys.executable, "-P", "-m", "gradctl", "run", "script.py"], tmp_path, env=WITH_FAKE)
    assert ours.stdout == "the gradctl of the script\ndone\n"
    assert ours.stderr == f"gradctl: nothing was recorded: it finds another gradctl: {tmp_path / 'gradctl.py'}\n"


@pytest.mark.parametrize("flag", ["-I", "-E", "-S", "-uI"])
def test_under_flags_that_hide_us_the_script_runs_and_that_is_said_once(tmp_path: Path, flag: str) -> None:
    write(tmp_path / "script.py", "import os, sys; print('done', 'GRADCTL_RUN' in os.environ); sys.exit(7)")
    ours = recorded(flag, "script.py", cwd=tmp_path)
    assert (ours.code, ours.stdout) == (7, "done False\n")
    assert ours.stderr.count("\n") == 1
    assert "nothing can be recorded under `python -" in ours.stderr
    assert not (tmp_path / "gradctl-runs").exists()


def test_children_that_never_import_torch_are_not_touched(tmp_path: Path) -> None:
    write(
        tmp_path / "script.py",
        "import subprocess, sys\n"
        "code = 'import sys; print(\"json\" in sys.modules, sys.exit.__class__.__name__, sys.path[1:3])'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n",
    )
    look_alike(tmp_path, "script.py")


def test_a_child_of_another_python_is_left_alone_and_named(tmp_path: Path) -> None:
    # The child is this interpreter; what it is told is that the run belongs to another version.
    write(
        tmp_path / "script.py",
        "import os, subprocess, sys, torch\n"
        "told = os.environ['GRADCTL_RUN'].replace('\"python\": \"3.', '\"python\": \"2.')\n"
        "subprocess.run([sys.executable, '-c', 'import torch'], env={**os.environ, 'GRADCTL_RUN': told}, check=True)\n"
        "os._exit(0)\n",
    )
    ours = recorded("script.py", cwd=tmp_path, env=WITH_FAKE)
    assert ours.code == 0
    noted = (run_directory(tmp_path) / "not_seen.jsonl").read_text()
    assert f"it is Python {sys.version_info[0]}.{sys.version_info[1]}" in noted


def test_the_run_directory_is_the_owners_alone_and_never_shared(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "import torch, os; os._exit(0)")
    for _ in range(3):
        assert recorded("--name", "try-1", "train.py", cwd=tmp_path, env=WITH_FAKE).code == 0
    found = list((tmp_path / "gradctl-runs").iterdir())
    assert len(found) == 3
    assert all(path.name.startswith("train-20") and "Z-try-1" in path.name for path in found)
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o700}


def refused(ours: Outcome, *words: str) -> None:
    """Whether gradctl refused with those words before the script ran."""
    assert (ours.code, ours.stdout) == (2, "")
    assert [word for word in words if word not in ours.stderr] == [], ours.stderr
    assert "Traceback" not in ours.stderr


def test_what_is_not_a_python_script_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "launch.sh", "#!/bin/bash\npython train.py\n")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02\0\0\0\0binary")
    refused(recorded("trian.py", cwd=tmp_path), "no script trian.py", "train.py?")
    refused(recorded("folder", cwd=tmp_path), "folder is a directory", "__main__.py")
    refused(recorded("launch.sh", cwd=tmp_path), "not a Python script", "/bin/bash", "gradctl run train.py")
    refused(recorded("weights.pt", cwd=tmp_path), "not a Python script", "binary")
    refused(recorded("torchrun", "--nproc-per-node", "2", "train.py", cwd=tmp_path), "torchrun ... -m gradctl run")
    refused(recorded("python", "train.py", cwd=tmp_path), "leave the word out")
    assert not (tmp_path / "gradctl-runs").exists()


def test_a_run_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "print('ran')")
    out = tmp_path / "out"
    out.mkdir()
    assert recorded("--out", "out", "train.py", cwd=tmp_path).stdout == "ran\n"
    out.mkdir(exist_ok=True)
    write(out / "journal.rank0.jsonl", "old")
    write(out / "notes.txt", "mine")
    refused(recorded("--out", "out", "train.py", cwd=tmp_path), "RunDirectoryError", "in use", "--force")
    assert recorded("--out", "out", "--force", "train.py", cwd=tmp_path).stdout == "ran\n"
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "print('ran')")
    write(tmp_path / "gradctl-runs", "a file")
    refused(recorded("train.py", cwd=tmp_path), "RunDirectoryError", "--out")
    ours = recorded("--out", "train.py", "train.py", cwd=tmp_path)
    refused(ours, "RunDirectoryError", "is a file", "--out")
    assert "--force" not in ours.stderr
    refused(recorded("--out", "/proc/nothing", "train.py", cwd=tmp_path), "RunDirectoryError", "--out")
    refused(recorded("--out", "train.py/deep", "train.py", cwd=tmp_path), "RunDirectoryError", "--out")


@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(exec true)"])
def test_output_that_nobody_takes_does_not_change_the_exit_code(tmp_path: Path, redirect: str) -> None:
    write(tmp_path / "script.py", "import sys; sys.exit(int(sys.argv[1]))")
    for code in (0, 7):
        command = f"{sys.executable} -m gradctl run script.py {code} {redirect}"
        launch(["bash", "-c", f"{{ {command}; }}; echo $? > code"], tmp_path)
        assert (tmp_path / "code").read_text() == f"{code}\n"
