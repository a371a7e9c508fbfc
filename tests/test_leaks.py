"""The fixture in `leaks.py`: each kind of leak fails the test that made it, by name; a clean test passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import leaks

LEAKS = {
    "environment": ("os.environ['LEFT_BEHIND'] = '1'", "os.environ.pop('LEFT_BEHIND')", "LEFT_BEHIND"),
    "file": ("open('left.txt', 'w').close()", "os.remove(HERE + '/left.txt')", "left.txt"),
    "run_directory": (
        "os.makedirs('gradctl-runs/x-1')",
        "os.removedirs(HERE + '/gradctl-runs/x-1')",
        "gradctl-runs",
    ),
    "descriptor": ("KEEP.append(open('/etc/hostname'))", "KEEP.pop().close()", "/etc/hostname"),
    "thread": (
        "threading.Thread(target=EVENT.wait, name='left-thread', daemon=True).start()",
        "EVENT.set()",
        "left-thread",
    ),
    "process": (
        "KEEP.append(subprocess.Popen(['sleep', '60']))",
        "((p := KEEP.pop()).kill(), p.wait())",
        "sleep 60",
    ),
    "signal": (
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
        "signal.signal(signal.SIGUSR1, signal.SIG_DFL)",
        "SIGUSR1",
    ),
    "import_path": ("sys.path.append('/left')", "sys.path.remove('/left')", "sys.path"),
    "patch": (
        "KEEP.append(torch.optim.SGD.step); torch.optim.SGD.step = lambda self: None",
        "setattr(torch.optim.SGD, 'step', KEEP.pop())",
        "torch.optim:SGD.step",
    ),
    "engine": (
        "KEEP.append(V._execution_engine); V._execution_engine = object()",
        "setattr(V, '_execution_engine', KEEP.pop())",
        "Variable._execution_engine",
    ),
    "class_method_patch": (
        "KEEP.append(vars(torch.autograd.Function)['apply']); torch.autograd.Function.apply = classmethod(print)",
        "setattr(torch.autograd.Function, 'apply', KEEP.pop())",
        "Function.apply",
    ),
    "module_hook": (
        "KEEP.append(torch.nn.modules.module.register_module_forward_hook(print))",
        "KEEP.pop().remove()",
        "_global_forward_hooks",
    ),
    "optimizer_hook": (
        "KEEP.append(STEP_HOOK(print))",
        "KEEP.pop().remove()",
        "_global_optimizer_pre_hooks",
    ),
    "grad_mode": ("torch.set_grad_enabled(False)", "torch.set_grad_enabled(True)", "grad mode: True -> False"),
    "inference_mode": (
        "KEEP.append(torch.inference_mode()); KEEP[-1].__enter__()",
        "KEEP.pop().__exit__(None, None, None)",
        "inference mode",
    ),
    "default_dtype": ("torch.set_default_dtype(torch.float64)", "torch.set_default_dtype(torch.float32)", "float64"),
    "default_device": ("torch.set_default_device('meta')", "torch.set_default_device(None)", "default device"),
    "saved_hooks": (
        "KEEP.append(SAVED(lambda t: t, lambda t: t)); KEEP[-1].__enter__()",
        "KEEP.pop().__exit__(None, None, None)",
        "saved-tensor hooks",
    ),
    "threads_of_torch": ("torch.set_num_threads(3)", "torch.set_num_threads(THREADS)", "number of threads"),
    "process_group": (
        "torch.distributed.init_process_group('gloo', init_method=f'file://{HERE}/store', rank=0, world_size=1)",
        "torch.distributed.destroy_process_group()",
        "process group: False -> True",
    ),
    "tap": (
        "KEEP.append(_taps.zero_grad.subscribe(lambda inner: inner, order='record'))",
        "KEEP.pop().remove()",
        "gradctl taps",
    ),
    "working_directory": ("os.chdir('/')", "os.chdir(HERE)", "working directory cwd"),
}
HEAD = """
import os, pathlib, pytest, signal, subprocess, sys, threading, torch, torch.distributed
from torch.autograd import Variable as V
from torch.optim.optimizer import register_optimizer_step_pre_hook as STEP_HOOK
from torch.autograd.graph import saved_tensors_hooks as SAVED
from gradctl import _taps
from leaks import no_leaks
HERE, THREADS, EVENT, UNDO = os.getcwd(), torch.get_num_threads(), threading.Event(), []

@pytest.fixture(autouse=True, scope="module")
def tidy():
    yield
    for undo in reversed(UNDO):
        undo()
"""


def test_every_kind_of_leak_fails_the_test_that_made_it_and_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "SETTLE_SECONDS", 0.1)
    body = HEAD
    for name, (leak, undo, _) in LEAKS.items():
        body += f"\ndef test_{name}():\n    KEEP = []\n    UNDO.append(lambda: ({undo}))\n    {leak}\n"
    body += "\ndef test_clean(tmp_path, monkeypatch):\n    monkeypatch.setenv('X', '1'); monkeypatch.chdir(tmp_path)\n"
    pytester.makepyfile(body)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=len(LEAKS) + 1, errors=len(LEAKS))
    text = result.stdout.str()
    for name, (_, _, named) in LEAKS.items():
        start = text.index(f"ERROR at teardown of test_{name} ")
        assert named in text[start : text.find("ERROR at teardown", start + 1)], name


def test_what_a_test_tidies_up_itself_is_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leaks.snapshot()
    with monkeypatch.context() as patch:
        patch.setenv("GRADCTL_TEST", "1")
        patch.chdir(tmp_path)
        patch.setattr(torch.optim.SGD, "step", None)
        (tmp_path / "file").touch()
        with torch.no_grad(), torch.autograd.graph.save_on_cpu():
            assert leaks.differences(before, leaks.snapshot()) != []
    assert leaks.differences(before, leaks.snapshot()) == []


def test_a_snapshot_equals_the_next_one() -> None:
    assert leaks.differences(leaks.snapshot(), leaks.snapshot()) == []
