"""Modules that compute in float32 inside of a 16-bit forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import GroupNorm, LayerNorm, Module, Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from gradctl import _torch_private as private
from gradctl._names._patterns import named_modules, named_parameters, select
from gradctl._precision._mode import Pattern

_NORMS = (
    _NormBase,
    LayerNorm,
    GroupNorm,
)  # torch's kernels take float32 weights beside 16-bit inputs; RMSNorm's does not


def islands(model: Module, patterns: Sequence[Pattern]) -> list[Module]:
    """Return the modules that compute in float32: outermost ones, all of whose parameters were chosen or their owners.

    Raises:
        PatternMatchesNothing: a pattern names no parameter.
    """
    if not patterns:
        return []
    chosen = {id(parameter) for parameter in select(named_parameters(model), list(patterns)).values()}
    found: list[Module] = []
    covered: set[int] = set()
    for _, module in sorted(named_modules(model).items(), key=lambda item: item[0].count(".") + bool(item[0])):
        if id(module) in covered:
            continue
        below = [id(parameter) for parameter in module.parameters()]
        own = any(id(parameter) in chosen for parameter in module.parameters(recurse=False))
        if own or (below and all(each in chosen for each in below)):
            found.append(module)
            covered.update(id(inner) for inner in module.modules())
    return found


def kept_in_float32(model: Module, fp32_modules: Sequence[Module]) -> set[int]:
    """Return the ids of parameters that no 16-bit copy may replace: those of the islands and of normalisations."""
    kept: set[int] = set()
    for module in fp32_modules:
        kept.update(id(parameter) for parameter in module.parameters())
    for module in model.modules():
        if isinstance(module, _NORMS):
            kept.update(id(parameter) for parameter in module.parameters(recurse=False))
    return kept


class Island:
    """Switches autocast off around one module, and gives it float32 inputs.

    Only inside of autocast: a forward of the program's own, outside of the precision, is left as it is. It keeps what
    it has entered, so that a module that calls itself comes out again in order.
    """

    def __init__(self, module: Module, device_type: str) -> None:
        self._device_type = device_type
        # The two halves of `with torch.autocast(...)`: unlike its `__enter__`, the compiler follows them into a hook.
        self._enter: Any = private.get("enter_autocast")
        self._exit: Any = private.get("exit_autocast")
        self._entered: list[Any] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not torch.is_autocast_enabled(self._device_type):
            self._entered.append(None)
            return None
        dtype = torch.get_autocast_dtype(self._device_type)
        self._entered.append(self._enter(self._device_type, dtype, False, True))
        return _float32(args), _float32(kwargs)

    def _after(self, module: Module, args: Any, output: Any) -> None:
        entered = self._entered.pop() if self._entered else None
        if entered is not None:
            self._exit(entered)


def _float32(value: Any) -> Any:
    """Cast 16-bit tensors in the common containers; anything else is passed as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if type(value) in (tuple, list):
        return type(value)(_float32(each) for each in value)
    if type(value) is dict:
        return {key: _float32(each) for key, each in value.items()}
    return value


def weights_in_16_bits(model: Module, kept: set[int]) -> dict[str, Parameter]:
    """Return the parameters that are to be 16-bit in the forward, each once, by the first of its names."""
    found: dict[int, tuple[str, Parameter]] = {}
    for name, parameter in named_parameters(model).items():
        if parameter.is_floating_point() and id(parameter) not in kept:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())
