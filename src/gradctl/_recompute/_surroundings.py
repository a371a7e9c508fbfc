"""What a function sees besides the values of its arguments: taken before a call, put back when it is run again.

That is random state of torch (all devices), Python, NumPy and of every generator in reach; modes; and what lies in
reach of the function: modules (attributes, flags, buffers), plain objects, lists and dicts, closure variables, and
global names that hold simple values. In reach are its arguments, what it is bound to, its closure, and what those hold.
What it reads beyond that is not put back; the fingerprints of what is made again tell when that mattered.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from gradctl import _torch_private as private
from gradctl._errors import StaleSource

LARGEST_COPY: Final = 16384
"""Bytes up to which a tensor in reach is copied before each call; a larger one when it was seen to change."""
_LONGEST: Final = 4096
_DEEPEST: Final = 3
_MOST: Final = 5000
_SIMPLE = (int, float, complex, bool, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_OF_MODULES = frozenset(vars(Module())) - {"_parameters", "_buffers", "_modules"}
_NORMS = (torch.nn.modules.batchnorm._NormBase,)


class Reach:
    """What lies in reach of a function.

    Attributes:
        spaces: dictionaries of attributes or global names whose bindings are put back.
        containers: lists, dicts, sets and deques whose members are put back.
        names: pairs of a module's globals and a name in them.
        cells: closure variables.
        generators: of random numbers.
        tensors: buffers and other tensors without history; parameters are left out.
        quiet: which of them may change without their version counter telling (running statistics).
        params: parameters of the modules in reach.
    """

    def __init__(self) -> None:
        self.spaces: list[dict[str, Any]] = []
        self.containers: list[Any] = []
        self.names: list[tuple[dict[str, Any], str]] = []
        self.cells: list[CellType] = []
        self.generators: list[Any] = []
        self.tensors: list[Tensor] = []
        self.quiet: set[int] = set()
        self.params: list[Tensor] = []
        self._seen: set[int] = set()

    def function(self, function: Any, depth: int = 0) -> None:
        """Add what a callable is bound to, closes over and reads of its globals."""
        if isinstance(function, functools.partial):
            self.function(function.func, depth)
            self.values((*function.args, *function.keywords.values()), depth)
        elif isinstance(function, MethodType):
            self.value(function.__self__, depth)
            self.function(function.__func__, depth)
        elif isinstance(function, FunctionType):
            if id(function) in self._seen:
                return
            self._seen.add(id(function))
            self.values((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), depth)
            for cell in function.__closure__ or ():
                self.cells.append(cell)
                try:
                    self.value(cell.cell_contents, depth)
                except ValueError:
                    pass  # not assigned yet
            self._globals(function)
        elif not isinstance(function, type):
            self.value(function, depth)

    def _globals(self, function: FunctionType) -> None:
        space = function.__globals__
        for name in _names_in(function.__code__):
            value = space.get(name, self)
            if isinstance(value, _SIMPLE):
                self.names.append((space, name))
            elif isinstance(value, (*_CONTAINERS, *_GENERATORS)):
                self.names.append((space, name))
                self.value(value, _DEEPEST)

    def values(self, values: Iterable[Any], depth: int) -> None:
        """Add values and what they hold."""
        for value in values:
            self.value(value, depth)

    def value(self, value: Any, depth: int = 0) -> None:
        """Add a value and what it holds."""
        if isinstance(value, _SIMPLE) or id(value) in self._seen or len(self._seen) > _MOST:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if value.grad_fn is None and value.layout is torch.strided:
                (self.params if value.requires_grad else self.tensors).append(value)
        elif isinstance(value, Module):
            for module in value.modules():
                self._module(module, depth)
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _LONGEST:
                self.containers.append(value)
                if depth < _DEEPEST:
                    self.values(list(value.values() if isinstance(value, dict) else value), depth + 1)
        elif isinstance(value, tuple):
            self.values(value, depth)
        elif isinstance(value, _GENERATORS):
            self.generators.append(value)
        elif isinstance(value, (FunctionType, MethodType, functools.partial)):
            if depth < _DEEPEST:
                self.function(value, depth + 1)
        elif depth < _DEEPEST and not isinstance(value, type) and not _is_foreign(value):
            space = getattr(value, "__dict__", None)
            if isinstance(space, dict):
                self.spaces.append(space)
                self.values(list(space.values()), depth + 1)

    def _module(self, module: Module, depth: int) -> None:
        space = module.__dict__
        if id(space) in self._seen:
            return
        self._seen.add(id(space))
        self.spaces.append(space)
        self.containers += [module._parameters, module._buffers, module._modules]
        self.values(module._parameters.values(), depth)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in self._seen:
                self.value(buffer)
                if isinstance(module, _NORMS):
                    self.quiet.add(id(buffer))
        for name, value in space.items():
            if name not in _OF_MODULES and not isinstance(value, _SIMPLE):
                self.value(value, depth + 1)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in hooks.values():
                self.function(hook, depth + 1)
        forward = type(module).forward
        if isinstance(forward, FunctionType) and not forward.__module__.startswith("torch."):
            self._globals(forward)


def version_of(tensor: Tensor) -> int:
    """Return the version of a tensor; one from inference mode has none, and stays at 0."""
    return 0 if tensor.is_inference() else tensor._version


@functools.lru_cache(maxsize=4096)
def _names_in(code: Any) -> tuple[str, ...]:
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            found.update(dict.fromkeys(_names_in(constant)))
    return tuple(found)


def _is_foreign(value: Any) -> bool:
    """Whether an object belongs to a library whose insides are not a program's state."""
    return type(value).__module__.partition(".")[0] in ("torch", "builtins", "types", "numpy", "functools")


class Snapshot:
    """The state of what lies in reach, and of random numbers, at one moment.

    Args:
        reach: what to look at.
        copied: positions of its tensors whose content is copied.
    """

    def __init__(self, reach: Reach, copied: Iterable[int]) -> None:
        self.reach = reach
        self.spaces = [dict(space) for space in reach.spaces]
        self.members = [_copy(container) for container in reach.containers]
        self.names = [space.get(name) for space, name in reach.names]
        self.cells = [_content(cell) for cell in reach.cells]
        self.states = [_state(generator) for generator in reach.generators]
        self.random = torch.get_rng_state()
        self.cuda = _cuda_states()
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.versions = [version_of(tensor) for tensor in reach.tensors]
        self.params = [version_of(param) for param in reach.params]
        with torch.no_grad():
            self.copies: dict[int, Tensor] = {i: reach.tensors[i].detach().clone() for i in copied}

    def put(self) -> None:
        """Make everything as it was at that moment, version counters too."""
        reach = self.reach
        for space, before in zip(reach.spaces, self.spaces, strict=True):
            _bind(space, before)
        for container, before in zip(reach.containers, self.members, strict=True):
            _refill(container, before)
        for (space, name), value in zip(reach.names, self.names, strict=True):
            space[name] = value
        for cell, value in zip(reach.cells, self.cells, strict=True):
            if value is not _EMPTY:
                cell.cell_contents = value
        for generator, state in zip(reach.generators, self.states, strict=True):
            _set_state(generator, state)
        torch.set_rng_state(self.random)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        if self.copies:
            with torch.no_grad():
                for i, copy in self.copies.items():
                    tensor = reach.tensors[i]
                    tensor.data.copy_(copy)  # .data: a version counter of its own
                    if version_of(tensor) != self.versions[i]:
                        _set_versions((tensor,), (self.versions[i],))


_set_versions = private.get("set_versions")
_EMPTY: Final = object()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _copy(container: Any) -> Any:
    return list(container) if isinstance(container, deque) else container.copy()


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        _bind(container, before)
    elif isinstance(container, list):
        if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container[:] = before
    elif isinstance(container, set):
        if container != before:
            container.clear()
            container.update(before)
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.extend(before)


def _bind(space: dict[Any, Any], before: dict[Any, Any]) -> None:
    for key in [key for key in space if key not in before]:
        del space[key]
    for key, value in before.items():
        if space.get(key, _EMPTY) is not value:
            space[key] = value


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _cuda_states() -> dict[int, Tensor]:
    if not torch.cuda.is_initialized():
        return {}
    return {device: torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())}


class Modes:
    """The modes that a call ran under: default dtype, autocast, attention kernels, function modes."""

    def __init__(self) -> None:
        self.dtype = torch.get_default_dtype()
        self.autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}
        self.cached = torch.is_autocast_cache_enabled()
        self.kernels = _kernels()
        self.functions = _function_modes()

    @contextmanager
    def entered(self) -> Generator[None]:
        """Enter them, where others are in force now.

        Raises:
            StaleSource: a function mode stands around backward that did not stand around the forward.
        """
        now = Modes()
        with ExitStack() as stack:
            for mode in self._missing(now):
                stack.enter_context(mode)
            for device, (on, dtype) in self.autocast.items():
                if now.autocast[device] != (on, dtype):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=self.cached))
            if now.dtype != self.dtype:
                stack.callback(torch.set_default_dtype, now.dtype)
                torch.set_default_dtype(self.dtype)
            if now.kernels != self.kernels:
                stack.callback(_set_kernels, now.kernels)
                _set_kernels(self.kernels)
            yield

    def _missing(self, now: Modes) -> list[Any]:
        shared = len(now.functions)
        if len(self.functions) < shared or any(a is not b for a, b in zip(self.functions, now.functions, strict=False)):
            raise StaleSource(
                "backward runs under a TorchFunctionMode that its forward did not run under",
                what=", ".join(type(mode).__name__ for mode in now.functions),
                why="the forward of this region is run again, and would run under it",
                fix="call backward() outside of the mode",
            )
        return self.functions[shared:]


def _function_modes() -> list[Any]:
    found = private.find("function_modes")
    return list(found()) if found is not None else []


_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _kernels() -> tuple[bool, ...]:
    return tuple(get() for get, _ in _KERNELS)


def _set_kernels(kernels: tuple[bool, ...]) -> None:
    for (_, put), on in zip(_KERNELS, kernels, strict=True):
        put(on)
