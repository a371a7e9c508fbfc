"""Crumbs: lines of the program at which a value with history left autograd, seen in a few steps only.

A function mode and not patched methods: libraries compare functions by identity (`func is torch.Tensor.detach`), and a
script of TorchScript looks its builtins up in the same way. A mode sees more (`torch.tensor` among them) and changes
neither.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradctl import _torch_private as private
from gradctl._explain._fixes import fix_for
from gradctl._lineage import Frames, Site, site
from gradctl._lineage._tracer import grad_fn_of
from gradctl._results import Finding, Span

_CRUMB = "gradctl_crumb"
_PASSED = "gradctl_done"
_MOST = 40
_MOST_CALLS = 100_000
_SMALL = 1e-5

_SLUGS = {
    "detach": "detach",
    "detach_": "detach",
    "data.__get__": "data",
    "item": "item",
    "__float__": "item",
    "__int__": "item",
    "tolist": "item",
    "numpy": "numpy_roundtrip",
    "__array__": "numpy_roundtrip",
    "tensor": "rewrap_tensor",
    "as_tensor": "rewrap_tensor",
    "asarray": "rewrap_tensor",
}
_ESCAPES = frozenset({"item", "numpy_roundtrip"})
_WORDS = {"data.__get__": ".data", "__float__": "float()", "__int__": "int()", "__array__": "a numpy array"}


@dataclass(slots=True)
class Crumb:
    """A place at which something left autograd.

    Args:
        slug: the cause that it would be.
        place: the user's line.
        text: what left, in words.
        step: the optimizer step, from 1.
        dropped: it turned out to be harmless.
    """

    slug: str
    place: Site
    text: str
    step: int
    dropped: bool = False

    def finding(self) -> Finding:
        """Return the crumb as a finding of low confidence."""
        return Finding(
            slug=self.slug,
            severity="warning",
            symptom=self.text,
            why="what is computed from it afterwards cannot reach the parameters behind it; "
            "whether that was meant, one run does not show",
            fix=fix_for(self.slug),
            confidence=0.3,
            primary=Span(self.place.file, self.place.line),
        )


class CrumbMode(TorchFunctionMode):
    """Picks up crumbs in the thread that entered it, until it is closed.

    Args:
        frames: tells the user's code.
    """

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames
        self.step = 1
        self.closed = False
        self.faults: list[BaseException] = []
        self.backwards = 0
        self._opened = False
        self._armed = True
        self._calls = 0
        self._found: dict[Any, Crumb] = {}
        self._reads: dict[Any, Crumb] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        look = None if self.closed or torch.compiler.is_compiling() else _LOOKS.get(func)
        if look is None:
            self._calls += 1
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        try:
            with torch._C.DisableTorchFunction():
                look(self, args, out)
        except Exception as fault:
            self.faults.append(fault)
            self.closed = True
        return out

    def open(self) -> None:
        """Begin to look, in this thread."""
        self._calls = 0
        self._armed = not self._opened
        self._opened = True
        self.closed = False
        self.__enter__()

    def close(self) -> None:
        """Look no more; where a mode of the program stands above, this one stays below it and passes through."""
        self.closed = True
        depth = private.get("function_mode_depth")()
        if depth and private.get("function_mode_at")(depth - 1) is self:
            self.__exit__(None, None, None)

    @property
    def weary(self) -> bool:
        """Whether it has seen so many calls that looking on would cost more than it is worth."""
        return self._calls > _MOST_CALLS

    def settle(self, functions: Iterable[Any]) -> None:
        """Drop what has been passed by a backward after all: a number that was read from a loss for the log.

        Args:
            functions: those that the backward has run.
        """
        self._armed = True
        for function in functions:
            metadata = function.metadata
            crumb = metadata.get(_CRUMB)
            if crumb is not None and crumb.slug in _ESCAPES:
                crumb.dropped = True
            metadata[_PASSED] = True

    def crumbs(self) -> list[Crumb]:
        """Return what was picked up and not dropped."""
        return [crumb for crumb in self._found.values() if not crumb.dropped]

    def reads(self) -> list[Crumb]:
        """Return the lines that read a `.grad` which was None, or wrote one."""
        return list(self._reads.values())

    # ---------------------------------------------------------------------------------------------- what is seen

    def _place(self) -> Site | None:
        """Return the line that called, if it is the user's own and not a library's."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(("_crumbs.py", "overrides.py", "_tensor.py")):
            frame = frame.f_back
        if frame is None or not self.frames.is_user(frame.f_code.co_filename):
            return None
        return site((frame.f_code, frame.f_lasti))

    def _drop(self, slug: str, tensor: Tensor, text: str) -> None:
        # What a backward has passed before these eyes were opened again bears no mark: wait for the next.
        if not self._armed or len(self._found) >= _MOST or not torch.is_grad_enabled():
            return
        function: Any = grad_fn_of(tensor)
        if function is None or function.metadata.get(_PASSED):
            return
        place = self._place()
        if place is None:
            return
        crumb = Crumb(slug, place, text, self.step)
        known = self._found.get((slug, place))
        # Only a place that is harmless each time is harmless.
        if known is None or known.dropped:
            self._found[slug, place] = crumb
        if slug in _ESCAPES:
            function.metadata.setdefault(_CRUMB, crumb)

    def left(self, name: str, args: tuple[Any, ...]) -> None:
        """Note a value that left through a method or a constructor."""
        source = args[0] if args else None
        parts = [source] if isinstance(source, Tensor) else _tensors(source, 2)
        for part in parts:
            if part.grad_fn is not None:
                self._drop(_SLUGS[name], part, f"a value with history left autograd through {_WORDS.get(name, name)}")
                return

    def added(self, args: tuple[Any, ...]) -> None:
        """Note a loss to which a constant is added: a term of it that left autograd before."""
        if len(args) < 2 or not torch.is_grad_enabled():
            return
        one, other = args[0], args[1]
        if not isinstance(one, Tensor):
            one, other = other, one
        if not isinstance(one, Tensor) or one.numel() != 1:
            return
        if isinstance(other, Tensor):
            if one.requires_grad is other.requires_grad or other.numel() != 1:
                return
            live = one if one.requires_grad else other
            if live.grad_fn is not None:
                self._drop("item", live, "a term without history was added to a value with history")
        elif type(other) is float and abs(other) > _SMALL and one.grad_fn is not None:
            self._drop("item", one, f"the number {other:.4g} was added to a value with history")

    def grad_read(self, args: tuple[Any, ...], out: Any) -> None:
        """Note a `.grad` that the program reads after a backward, and that is not there."""
        if out is not None or not self.backwards or not args[0].requires_grad:
            return
        place = self._place()
        if place is not None and len(self._reads) < _MOST:
            what = "a leaf" if args[0].is_leaf else "a tensor that is no leaf"
            crumb = Crumb("non_leaf_grad", place, f"the .grad of {what} was read and is None", self.step)
            self._reads.setdefault(place, crumb)

    def grad_written(self, args: tuple[Any, ...]) -> None:
        """Note a `.grad` that the program assigns."""
        if len(args) < 2 or args[1] is None or not self.backwards:
            return
        place = self._place()
        if place is not None and len(self._reads) < _MOST:
            crumb = Crumb("grad_overwritten", place, "the program writes to .grad itself", self.step)
            self._reads.setdefault(place, crumb)


def _tensors(value: Any, depth: int) -> list[Tensor]:
    if not isinstance(value, (list, tuple)) or not depth:
        return []
    found: list[Tensor] = []
    for item in value[:1000]:
        if isinstance(item, Tensor):
            found.append(item)
        else:
            found += _tensors(item, depth - 1)
    return found


def _looks() -> dict[Any, Callable[[CrumbMode, tuple[Any, ...], Any], None]]:
    """Return what to do for each torch function that is of interest."""
    table: dict[Any, Callable[[CrumbMode, tuple[Any, ...], Any], None]] = {}
    tensor: Any = Tensor

    def leaving(name: str) -> Callable[[CrumbMode, tuple[Any, ...], Any], None]:
        return lambda mode, args, out: mode.left(name, args)

    for name in ("detach", "detach_", "item", "__float__", "__int__", "tolist", "numpy", "__array__"):
        table[getattr(tensor, name)] = leaving(name)
    for name in ("tensor", "as_tensor", "asarray"):
        table[getattr(torch, name)] = leaving(name)
    table[torch.detach] = leaving("detach")
    table[tensor.data.__get__] = leaving("data.__get__")
    table[tensor.grad.__get__] = lambda mode, args, out: mode.grad_read(args, out)
    table[tensor.grad.__set__] = lambda mode, args, out: mode.grad_written(args)
    for function in (tensor.add, tensor.add_, tensor.sub, tensor.sub_, tensor.__rsub__, torch.add, torch.sub):
        table[function] = lambda mode, args, out: mode.added(args)
    return table


_LOOKS = _looks()
