"""A fixture that fails any test which leaves something behind in the process.

A snapshot before and after each test; what differs is named. When something seems to have leaked, the second snapshot
is taken again for a short while (a thread may be ending, a file may wait for the collector): only a leak costs time.
What `gradctl.off` keeps in place after its first use, by design, is taken back first: every test that uses it also
shows that it is undone exactly.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from _signal import getsignal as _getsignal  # plain values: making enum members took half of the time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Snapshot = dict[str, dict[Any, Any]]

# Places in torch and the standard library where a patch would stay behind: `module:owner.attribute`.
PATCHED_PLACES = (
    "torch:Tensor.backward",
    "torch:Tensor.requires_grad_",
    "torch:Tensor.requires_grad",
    "torch:Tensor.retain_grad",
    "torch:Tensor.__torch_function__",
    "torch:compile",
    "torch:load",
    "torch:save",
    "torch:ops.load_library",
    "torch:no_grad.__enter__",
    "torch:enable_grad.__enter__",
    "torch:is_grad_enabled",
    "torch:set_grad_enabled",
    "torch._C:_set_grad_enabled",
    "torch._C._autograd:_saved_tensors_hooks_disable",
    "torch.autograd:Function.apply",
    "torch.autograd:Variable._execution_engine",
    "torch.autograd:backward",
    "torch.autograd:grad",
    "torch.autograd.function:_SingleLevelFunction.apply",
    "torch.autograd.functional:_autograd_grad",
    "torch.amp.grad_scaler:GradScaler._maybe_opt_step",
    "torch.amp.grad_scaler:GradScaler.scale",
    "torch.amp.grad_scaler:GradScaler.step",
    "torch._functorch.eager_transforms:grad_increment_nesting",
    "torch._functorch.eager_transforms:jvp_increment_nesting",
    "torch._functorch.predispatch:_enter_dual_level_impl",
    "torch.jit:save",
    "torch.nn:Module.__call__",
    "torch.nn:Module.__init__",
    "torch.nn:Module.register_parameter",
    "torch.nn:Module.requires_grad_",
    "torch.nn:Parameter.__new__",
    "torch.nn.utils:clip_grad_norm_",
    "torch.nn.utils.clip_grad:_clip_grads_with_norm_",
    "torch.optim:AdamW.step",
    "torch.optim:LBFGS.step",
    "torch.optim:Optimizer._patch_step_function",
    "torch.optim:Optimizer.zero_grad",
    "torch.optim:SGD.step",
    "torch.utils.data.dataloader:_BaseDataLoaderIter.__next__",
    "builtins:__import__",
    "multiprocessing.process:BaseProcess.start",
    "os:_exit",
    "os:fork",
    "subprocess:Popen.__init__",
    "threading:Thread.start",
)
HOOK_TABLES = (
    "torch.nn.modules.module:_global_backward_hooks",
    "torch.nn.modules.module:_global_backward_pre_hooks",
    "torch.nn.modules.module:_global_buffer_registration_hooks",
    "torch.nn.modules.module:_global_forward_hooks",
    "torch.nn.modules.module:_global_forward_pre_hooks",
    "torch.nn.modules.module:_global_module_registration_hooks",
    "torch.nn.modules.module:_global_parameter_registration_hooks",
    "torch.optim.optimizer:_global_optimizer_post_hooks",
    "torch.optim.optimizer:_global_optimizer_pre_hooks",
)
# Set on import by libraries that tests use, or by pytest itself.
ENVIRONMENT_OF_OTHERS = frozenset(
    {"PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
)
# Threads and processes that live as long as the interpreter by their library's design.
THREADS_OF_OTHERS = ("pytest_timeout", "tqdm", "execnet", "InductorSubproc", "SubprocPool", "QueueFeederThread")
PROCESSES_OF_OTHERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker")
FILES_OF_OTHERS = ("/dev/null", "/dev/urandom", "/dev/random", "/proc/", "anon_inode:[eventfd]")
_MISSING = object()
# Kinds that may be on their way out when a test ends.
_ENDING = ("thread ", "child process ", "open file ")
SETTLE_SECONDS = 1.5

_places: dict[str, tuple[Any, str]] = {}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail the test if it leaves a hook, patch, mode, thread, process, file, variable or handler behind."""
    before = snapshot()
    yield
    leaks = find_leaks(before)
    if leaks:
        pytest.fail("the test leaked:\n  " + "\n  ".join(leaks), pytrace=False)


def find_leaks(before: Snapshot) -> list[str]:
    """Compare the process with what it was, giving what is still ending a short while to end."""
    leaks = _still_off()
    _take_back_what_off_keeps()
    found = differences(before, snapshot())
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(line.startswith(_ENDING) for line in found) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
        found = differences(before, snapshot())
    return leaks + found


def _still_off() -> list[str]:
    off = sys.modules.get("gradctl._off")
    return ["gradctl.off: gradients are still switched off"] if off is not None and off.is_off() else []


def _take_back_what_off_keeps() -> None:
    off = sys.modules.get("gradctl._off")
    if off is not None and not off.is_off():
        off.uninstall()


def snapshot() -> Snapshot:
    """Look at everything that a test could leave behind."""
    return {
        "environment variable": {k: v for k, v in os.environ.items() if k not in ENVIRONMENT_OF_OTHERS},
        "working directory": {"cwd": _cwd()},
        "file in the working directory": _files(),
        "open file": _open_files(),
        "thread": {t: t.name for t in threading.enumerate() if not t.name.startswith(THREADS_OF_OTHERS)},
        "child process": _children(),
        "signal handler": {name: _getsignal(number) for number, name in _SIGNALS.items()},
        "interpreter": _interpreter(),
        "patch": _patches(),
        "torch hook": _hooks(),
        "torch mode": _torch_modes(),
        "gradctl": _ours(),
    }


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Name what differs between two snapshots; what the first could not see (torch not loaded) is passed over."""
    found: list[str] = []
    moved = before["working directory"] != after["working directory"]
    for kind, was in before.items():
        if kind == "file in the working directory" and moved:
            continue
        now = after[kind]
        for key in was.keys() | now.keys():
            old, new = was.get(key, _MISSING), now.get(key, _MISSING)
            if old is new or (old is not _MISSING and new is not _MISSING and old == new):
                continue
            if old is _UNSEEN or new is _UNSEEN:
                continue
            if new is _MISSING and kind in {"thread", "child process", "open file", "file in the working directory"}:
                continue  # something older than the test has ended
            name = new if kind == "thread" else key
            found.append(f"{kind} {name}: {_short(old)} -> {_short(new)}" if kind != "thread" else f"thread {name!r}")
    return sorted(found)


class _Unseen:
    def __repr__(self) -> str:
        return "<not loaded>"


_UNSEEN: Any = _Unseen()
_SIGNALS = {
    int(number): number.name if isinstance(number, signal.Signals) else str(number)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGALRM}  # pytest-timeout uses ALRM
}


def _short(value: object) -> str:
    return "nothing" if value is _MISSING else repr(value)[:120]


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "<removed>"


def _files() -> dict[str, bool]:
    names: list[str] = []
    with contextlib.suppress(OSError):
        names += [name for name in os.listdir(".") if not name.startswith((".", "__pycache__"))]
    with contextlib.suppress(OSError):
        names += [f"gradctl-runs/{name}" for name in os.listdir("gradctl-runs")]
    return dict.fromkeys(names, True)


def _open_files() -> dict[str, bool]:
    found: dict[str, bool] = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith(FILES_OF_OTHERS):
            found[f"{number} ({target})"] = True
    return found


def _children() -> dict[int, str]:
    found: dict[int, str] = {}
    multiprocessing.process.active_children()  # reaps those that have ended
    for task in os.listdir("/proc/self/task"):
        try:
            numbers = Path(f"/proc/self/task/{task}/children").read_bytes().split()
        except OSError:
            continue
        for number in numbers:
            try:
                command = (
                    Path(f"/proc/{int(number)}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if not any(word in command for word in PROCESSES_OF_OTHERS):
                found[int(number)] = command or "<ended, never waited for>"
    return found


def _interpreter() -> dict[str, Any]:
    return {
        "sys.path": tuple(sys.path),
        "sys.meta_path": tuple(map(id, sys.meta_path)),
        "sys.excepthook": _excepthook(),
        "threading.excepthook": threading.excepthook,
        "sys.gettrace": sys.gettrace(),
        "sys.getprofile": sys.getprofile(),
        "gc.isenabled": gc.isenabled(),
        "gc.get_freeze_count": gc.get_freeze_count(),
        "recursion limit": sys.getrecursionlimit(),
    }


def _excepthook() -> object:
    # `init_process_group` sets its own, which calls the one before, and `destroy_process_group` leaves it there.
    hook = sys.excepthook
    return sys.__excepthook__ if hook.__module__.startswith("torch.distributed") else hook


def _resolve(place: str) -> tuple[Any, str] | None:
    """Find the owner of an attribute, once its module has been loaded."""
    if place not in _places:
        module_name, _, path = place.partition(":")
        owner: Any = sys.modules.get(module_name)
        if owner is None:
            return None
        *owners, name = path.split(".")
        for step in owners:
            owner = getattr(owner, step, None)
            if owner is None:
                return None
        _places[place] = owner, name
    return _places[place]


def _patches() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place in PATCHED_PLACES:
        at = _resolve(place)
        # `vars` and not getattr: no bound method is made, and an attribute laid over an inherited one is seen.
        value = None if at is None else vars(at[0]).get(at[1])
        if getattr(value, "hooked", False):
            # torch itself wraps `step`, also one that is inherited, when the first optimizer of a class is made
            own = value.__wrapped__.__qualname__ == f"{at[0].__name__}.{at[1]}"  # type: ignore[index]
            value = value.__wrapped__ if own else None
        found[place] = _UNSEEN if at is None else id(value)
    return found


def _hooks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place in HOOK_TABLES:
        at = _resolve(place)
        found[place] = _UNSEEN if at is None else tuple(getattr(*at))
    return found


def _torch_modes() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):
        return dict.fromkeys(_MODES, _UNSEEN)
    found = {name: look(torch) for name, look in _MODES.items()}
    distributed = sys.modules.get("torch.distributed")
    found["process group"] = bool(distributed and distributed.is_available() and distributed.is_initialized())
    return found


_MODES: dict[str, Callable[[Any], Any]] = {
    "grad mode": lambda torch: torch.is_grad_enabled(),
    "inference mode": lambda torch: torch.is_inference_mode_enabled(),
    "default dtype": lambda torch: torch.get_default_dtype(),
    "default device": lambda torch: torch.get_default_device(),
    "deterministic algorithms": lambda torch: torch.are_deterministic_algorithms_enabled(),
    "anomaly mode": lambda torch: torch.is_anomaly_enabled(),
    "autocast": lambda torch: torch.is_autocast_enabled("cpu"),
    "multithreaded backward": lambda torch: torch.autograd.is_multithreading_enabled(),
    "number of threads": lambda torch: torch.get_num_threads(),
    "saved-tensor hooks": lambda torch: torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    "function modes": lambda torch: torch._C._len_torch_function_stack(),
    "dispatch modes": lambda torch: torch._C._len_torch_dispatch_stack(),
    "process group": lambda torch: False,
}


def _ours() -> dict[str, Any]:
    taps = sys.modules.get("gradctl._taps")
    journal = sys.modules.get("gradctl._journal")
    return {
        "taps": tuple(taps.installed()) if taps is not None else (),
        "current journal": None if journal is None else journal.current(),
    }
