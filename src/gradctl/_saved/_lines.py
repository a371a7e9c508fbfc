"""Saved bytes by source line: saved-tensor hooks for the forward of one step, only when asked for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._saved._storage import SavedBytes, Tally

_TORCH = f"{Path(torch.__file__).parent}/"
_OWN = f"{Path(__file__).parents[1]}/"
_FRAMES = 200
_CALLS: frozenset[CodeType] = frozenset(
    getattr(torch.nn.Module, name).__code__
    for name in ("_call_impl", "_wrapped_call_impl")
    if hasattr(getattr(torch.nn.Module, name, None), "__code__")
)


class Tap(Protocol):
    """An entry point of torch that can be listened to: `_taps.saved_hooks_disabled` with its order chosen."""

    def subscribe(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], /) -> Any:
        """Wrap the entry point; the result has `remove()`."""
        ...


class LineWatch:
    """Hooks on what this thread saves for backward, until `disarm`.

    While armed, saved values are passed through unchanged and in-place changes of them are still refused by
    backward. `torch.func` needs the hooks gone: they step aside for it, and `cut_short` says so.
    """

    def __init__(self, tally: Tally, modules: Mapping[int, str]) -> None:
        self.cut_short = False
        self._tally = tally
        self._places = Places(modules)
        self._thread = threading.get_ident()
        self._watching = True
        self._pushed = False
        self._handle: Any = None
        self._seconds = 0.0
        self._fault: str | None = None
        # One object each: the top of torch's stack is compared with what was pushed.
        self._pack_hook: Callable[[Tensor], Any] = self._pack
        self._unpack_hook: Callable[[Any], Tensor] = _unpack

    def disarm(self) -> SavedBytes:
        """Stop, take the hooks back and return the bytes by line.

        From another thread, or with hooks of the program on top, ours stay below, count nothing and are taken back
        by a later call.
        """
        self._watching = False
        self._withdraw()
        tally = self._tally
        return SavedBytes(
            total=tally.total,
            count=tally.count,
            rows=tally.rows(),
            nodes=0,
            seconds=self._seconds,
            complete=not self.cut_short,
            unread=tally.unread,
            fault=self._fault,
        )

    @property
    def gone(self) -> bool:
        """Whether torch's stack no longer holds the hooks."""
        return not self._pushed

    def _push(self, hooks_disabled: Tap | None) -> None:
        if hooks_disabled is not None:
            self._handle = hooks_disabled.subscribe(self._step_aside)
        private.get("push_saved_hooks")(self._pack_hook, self._unpack_hook)
        self._pushed = True

    def _withdraw(self) -> None:
        if not self._pushed or threading.get_ident() != self._thread:
            return
        top = private.get("top_saved_hooks")(True)
        if top is None or top[0] is not self._pack_hook:
            return
        private.get("pop_saved_hooks")()
        self._pushed = False
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()

    def _step_aside(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def disable(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread and self._pushed:
                self.cut_short = self.cut_short or self._watching
                self._watching = False
                self._withdraw()
            return inner(*args, **kwargs)

        return disable

    def _pack(self, tensor: Tensor) -> Any:
        begin = time.perf_counter()
        token: Any = None
        if self._watching:
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    token = self._tally.add(tensor, *self._places.at(sys._getframe(1)))
            except Exception as error:
                self._fault = self._fault or f"{type(error).__name__}: {error}"
        # An output of the node that saves it would hold that node, and the node would hold it, for ever.
        kept = tensor.detach() if tensor.grad_fn is not None else tensor
        version = None if tensor.is_inference() else tensor._version
        self._seconds += time.perf_counter() - begin
        return kept, version, token


class Places:
    """Tells of a stack which line and which module it is in.

    Args:
        modules: FQN of each module by `id`; looked at anew each time.
    """

    def __init__(self, modules: Mapping[int, str]) -> None:
        self._modules = modules
        self._script = _script_folder()

    def at(self, frame: FrameType | None) -> tuple[str, str | None]:
        """Return the innermost line outside torch, and the FQN of the innermost module that is being called."""
        where: str | None = None
        module: str | None = None
        for _ in range(_FRAMES):
            if frame is None or (where is not None and module is not None):
                break
            code = frame.f_code
            if module is None and code in _CALLS:
                # torch's own frame: it holds the module and its arguments anyway, so reading it keeps nothing alive.
                module = self._modules.get(id(frame.f_locals.get("self")))
            if where is None and not code.co_filename.startswith((_TORCH, _OWN)):
                where = f"{self._shorten(code.co_filename)}:{frame.f_lineno} {code.co_name}"
            frame = frame.f_back
        return where or "(torch)", module

    def _shorten(self, file: str) -> str:
        for folder in ("/site-packages/", "/dist-packages/"):
            if folder in file:
                return file.rpartition(folder)[2]
        return file.removeprefix(self._script)


def arm_lines(
    exclude_storages: Collection[int] = frozenset(),
    *,
    modules: Mapping[int, str] | None = None,
    hooks_disabled: Tap | None = None,
    tally: Tally | None = None,
) -> LineWatch | None:
    """Count what this thread saves for backward by source line, from now until `disarm`.

    Args:
        exclude_storages: keys from `storage_keys`, usually of the parameters.
        modules: FQN of each module by `id` (`NameBook.modules`).
        hooks_disabled: where torch switches such hooks off (`_taps.saved_hooks_disabled`); without it `torch.func`
            fails while armed.
        tally: what counts instead of a plain one; what its `add` returns lives as long as the saved value.
    Returns:
        The watch; None if the program uses such hooks itself just now, or has switched them off.
    """
    if private.get("top_saved_hooks")(True) is not None or not private.get("saved_hooks_enabled")():
        return None
    watch = LineWatch(Tally(exclude_storages) if tally is None else tally, {} if modules is None else modules)
    watch._push(hooks_disabled)
    return watch


def _unpack(packed: Any) -> Tensor:
    tensor, version, _ = packed
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
            "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True)."
        )
    return tensor


def _script_folder() -> str:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return f"{Path(file).resolve().parent}/" if isinstance(file, str) else "\0"
