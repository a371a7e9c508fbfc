"""Processes that are started while gradients are off: they start with gradients off, and only they."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import gradctl
import settled
from gradctl._off import _children
from off_children import Outcomes, outcome, outcome_of, put_outcome
from recording import records

settled.processes()

OFF = (False, False, "BackwardRefused")
ON = (True, True, "")
METHODS = ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
HERE = str(Path(__file__).parent)


def _outcome_of_process(method: str, *arguments: Any) -> tuple[bool, bool, str]:
    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=put_outcome, args=(queue, *arguments))
    process.start()
    try:
        return queue.get()
    finally:
        process.join(60)
        queue.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_process_started_inside_is_off_and_one_started_afterwards_is_not(method: str) -> None:
    with gradctl.off():
        assert _outcome_of_process(method, torch.ones(2)) == OFF
    if method == "fork":  # the other two are begun afresh, and import torch for seconds
        assert _outcome_of_process(method) == ON


def test_a_process_object_keeps_nothing_of_ours() -> None:
    process = multiprocessing.get_context("fork").Process(target=outcome)
    with gradctl.off():
        process.start()
        process.join(60)
    assert process.exitcode == 0
    assert _children._TOKEN not in vars(process)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_workers_of_a_pool_and_of_a_data_loader_are_off(method: str) -> None:
    with gradctl.off():
        context: Any = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            assert pool.submit(outcome_of, 0).result(timeout=60) == OFF
        loader = DataLoader(Outcomes(), num_workers=1, multiprocessing_context=method)
        assert next(iter(loader)).tolist() == [[False, False]]


def test_a_forked_child_may_switch_for_itself() -> None:
    with gradctl.off():
        pass
    pid = os.fork()
    if pid == 0:
        fine = records()
        with gradctl.off():
            fine = fine and not records()
        os._exit(0 if fine and records() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


CODE = "import json; from off_children import outcome; print(json.dumps(outcome()))"


def _python(*arguments: str, env: dict[str, str] | None = None, positional: bool = False) -> tuple[Any, ...]:
    command = [sys.executable, *arguments]
    if positional:  # Popen(args, bufsize, executable, stdin, stdout, stderr, preexec_fn, close_fds, shell, cwd, env)
        popen = subprocess.Popen(command, -1, None, None, subprocess.PIPE, None, None, True, False, HERE, env)
        out = popen.communicate(timeout=60)[0].decode()
    else:
        out = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True, timeout=60, check=True).stdout
    return tuple(json.loads(out))


def test_a_python_subprocess_is_off_with_the_environment_that_it_is_given() -> None:
    before = dict(os.environ)
    given = {**os.environ, "MINE": "1"}
    with gradctl.off():
        assert _python("-c", CODE, env=given) == OFF
        assert dict(os.environ) == before
    assert "GRADCTL_OFF" not in given


def test_a_subprocess_is_given_the_variable_however_it_is_started() -> None:
    code = "import os, json; print(json.dumps([os.environ.get('GRADCTL_OFF'), os.environ.get('MINE')]))"
    given = {**os.environ, "MINE": "1"}
    with gradctl.off():
        assert _python("-c", code) == ("1", None)
        assert _python("-c", code, env=given) == ("1", "1")
        assert _python("-c", code, env=given, positional=True) == ("1", "1")
    assert _python("-c", code, env=given) == (None, "1")


def test_a_gradctl_run_started_inside_says_so_in_its_journal_and_in_its_refusal(tmp_path: Path) -> None:
    code = "import gradctl, torch; print(gradctl.is_off()); torch.ones(2, requires_grad=True).sum().backward()"
    command = [sys.executable, "-m", "gradctl", "run", "-q", "--no-report", "--out", str(tmp_path / "run"), "-c", code]
    with gradctl.off():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "True\n")
    assert "why   switched off by the process that started this one\n" in done.stderr
    head = json.loads((tmp_path / "run" / "journal.rank0.jsonl").read_text().splitlines()[0])
    assert head["grad"] == "off"


@pytest.mark.slow
def test_a_python_subprocess_started_afterwards_is_on() -> None:
    with gradctl.off():
        pass
    assert _python("-c", CODE) == ON


@pytest.mark.slow
def test_a_python_subprocess_of_a_python_subprocess_is_off_too() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CODE!r}], check=True)"
    with gradctl.off():
        assert _python("-c", code) == OFF


def test_a_python_subprocess_without_torch_is_not_made_to_import_it() -> None:
    code = "import sys, json; print(json.dumps(['torch' in sys.modules, sys.path]))"
    plain = _python("-c", code)
    with gradctl.off():
        assert _python("-c", code) == plain
        assert plain[0] is False


@pytest.mark.slow
def test_the_sitecustomize_of_the_program_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.mine = True")
    code = "import builtins, json; import off_children; print(json.dumps([builtins.mine, *off_children.outcome()]))"
    with gradctl.off():
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), HERE])}
        assert _python("-c", code, env=env) == (True, *OFF)


def test_a_child_that_is_no_python_gets_its_arguments_and_its_output_through() -> None:
    with gradctl.off():
        done = subprocess.run(["sh", "-c", "echo $GRADCTL_OFF $0", "zero"], capture_output=True, text=True, check=True)
    assert done.stdout == "1 zero\n"


def test_the_folder_is_put_in_front_of_the_path_once() -> None:
    once = _children.environment({"PYTHONPATH": "a"})
    assert once["PYTHONPATH"].split(os.pathsep)[1:] == ["a"]
    assert _children.environment(once) == once
    assert _children.environment({b"PYTHONPATH": b"a"}) == once
    assert _children.environment({})["PYTHONPATH"] == once["PYTHONPATH"].split(os.pathsep)[0]


def test_a_token_means_what_the_switch_says_when_it_is_pickled() -> None:
    token = _children.Token()
    assert pickle.loads(pickle.dumps(token)) is None
    with gradctl.off():
        inside = pickle.dumps(token)
    assert b"_switch_off" in inside
    assert not gradctl.is_off()


def test_starting_from_the_environment_holds_the_switch_once() -> None:
    from gradctl import _off

    switch = _off.start_from_environment()
    try:
        assert _off.start_from_environment() is switch
        assert not records()
    finally:
        switch.remove()
    assert records()


def test_a_child_that_cannot_find_gradctl_says_so_and_goes_on(tmp_path: Path) -> None:
    broken = tmp_path / "gradctl" / "_off" / "_inherit"
    broken.mkdir(parents=True)
    source = _children._SITE / "sitecustomize.py"
    (broken / "sitecustomize.py").write_text(source.read_text())
    (tmp_path / "gradctl" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    env = {**os.environ, "GRADCTL_OFF": "1", "PYTHONPATH": os.pathsep.join([str(broken), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-c", "print('went on')"], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "went on\n"
    assert "gradients are NOT off in process" in done.stderr
    assert "broken on purpose" in done.stderr
