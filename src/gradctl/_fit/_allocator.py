"""What the allocator gave out and took back over a stretch of the program, in order, by its own account.

The events are those that the allocators tell a profiler, had without kineto: the older profiler of torch keeps them in
the order in which they came, with the operations around them, and says nothing on the terminal. On the CPU a block that
was there before is freed without an event; tensors that are known beforehand are watched for that.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._errors import UsageError

_OURS: Final = "gradctl."
_DIED: Final = "gradctl.died "
_QUIET: Final = ("gradctl.quiet", "gradctl.loud")
_ERRORS_ONLY: Final = 2
_mark = private.get("fast_record_function")


@dataclass(frozen=True, slots=True)
class Change:
    """One event of an allocator, or a mark.

    Args:
        seconds: since the beginning.
        nbytes: given out, or, negative, taken back; 0 for a mark.
        device: as in `cpu` and `cuda:0`.
        mark: what was marked; None for an event of the allocator.
    """

    seconds: float
    nbytes: int
    device: str
    mark: str | None = None


class Allocated:
    """Everything that allocators do on behalf of this thread and its backwards, while it is entered.

    Args:
        known: tensors that are there before and may be freed meanwhile.

    Attributes:
        changes: what happened, in order; there once it is left.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.changes: list[Change] = []
        self._known = [tensor.untyped_storage() for tensor in known if tensor.layout is torch.strided]
        self._references: list[Any] = []
        self._level: Any = None

    def __enter__(self) -> Allocated:
        """Begin.

        Raises:
            UsageError: a profiler of the program is running: there can be one only.
        """
        config = private.get("profiler_config")(
            private.get("profiler_state").CPU, False, True, False, False, False, private.get("profiler_experimental")()
        )
        try:
            private.get("enable_profiler")(config)
        except RuntimeError as error:
            raise UsageError(
                "the allocator cannot be watched while a profiler is running",
                why=str(error).partition("\n")[0],
                fix="stop that profiler, or measure outside of it",
            ) from error
        self._level = _log_level()
        if self._level is not None:
            # The CPU's allocator warns of each block that it did not see being made; those are watched from here.
            self._level.value, self._level_before = max(self._level.value, _ERRORS_ONLY), self._level.value
        watched = {storage._cdata: storage for storage in self._known}
        self._references = [_watched(storage) for storage in watched.values()]
        self._known.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._references.clear()
        if self._level is not None:
            self._level.value = self._level_before
        self.changes = _in_order(private.get("disable_profiler")())

    def curve(self, device: str | None = None) -> list[int]:
        """Return the bytes above the start, after each change.

        Args:
            device: count this one only.
        """
        total = 0
        found: list[int] = []
        for change in self.changes:
            if device in (None, change.device):
                total += change.nbytes
            found.append(total)
        return found

    def peak(self, device: str | None = None) -> int:
        """Return the most bytes above the start."""
        return max(self.curve(device), default=0)


def mark(text: str) -> None:
    """Put a mark among the events, where somebody watches this thread."""
    with _mark(f"{_OURS}{text}"):
        pass


def died(nbytes: int, device: str) -> None:
    """Say that a block is being freed which may have been there before."""
    mark(f"died {nbytes} {device}")


@contextmanager
def unseen() -> Generator[None]:
    """What is allocated inside does not count; it must be freed inside, or after the end."""
    mark("quiet")
    try:
        yield
    finally:
        mark("loud")


def _watched(storage: Any) -> Any:
    nbytes, device = storage.nbytes(), name_of(storage.device)

    def gone(_: Any) -> None:
        died(nbytes, device)

    return weakref.ref(storage, gone)


def name_of(device: torch.device) -> str:
    """Return how a device is called here and in a ledger: `cpu`, `cuda:0`."""
    return device.type if device.index is None else str(device)  # pyright: ignore[reportUnnecessaryComparison]


def _in_order(threads: Any) -> list[Change]:
    events = [event for thread in threads for event in thread]
    if len(threads) > 1:
        events.sort(key=lambda event: event.start_us())
    found: list[Change] = []
    begin = events[0].start_us() if events else 0.0
    quiet = 0
    waiting: Change | None = None
    for event in events:
        kind = event.kind()
        if kind == "memory_alloc":
            cpu = event.cpu_memory_usage()
            nbytes = cpu or event.cuda_memory_usage()
            device = "cpu" if cpu else f"cuda:{event.device()}"
            own = waiting is not None and device == waiting.device and nbytes < 0
            if waiting is not None and not quiet:
                found.append(waiting)
            waiting = None
            # The block's own event, if it has one, comes next. On the CPU it may tell the size of an earlier block at
            # that address, which was freed while nobody watched.
            if not quiet and not own:
                found.append(Change((event.start_us() - begin) / 1e6, nbytes, device))
            continue
        if kind != "push" or not (name := event.name()).startswith(_OURS):
            continue
        if waiting is not None and not quiet:
            found.append(waiting)
        waiting = None
        if name in _QUIET:
            quiet += 1 if name == _QUIET[0] else -1
        elif name.startswith(_DIED):
            size, device = name.removeprefix(_DIED).split(" ")
            waiting = Change((event.start_us() - begin) / 1e6, -int(size), device)
        elif not quiet:
            found.append(Change((event.start_us() - begin) / 1e6, 0, "", name.removeprefix(_OURS)))
    if waiting is not None and not quiet:
        found.append(waiting)
    return found


def _log_level() -> Any:
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        return None  # then the warning is seen
