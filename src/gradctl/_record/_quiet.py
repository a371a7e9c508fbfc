"""Measuring without being seen: no mode, subclass or autocast of the program takes part in what we compute."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from gradctl import _torch_private as private

_inference: Any = private.find("inference_guard") or torch.inference_mode
_no_dispatch: Any = private.find("disable_dispatch")
_no_function: Any = torch._C.DisableTorchFunction
function_modes: Any = private.find("function_mode_depth") or (lambda: 1)
"""How many torch-function modes are active in this thread."""
dispatch_modes: Any = private.find("dispatch_mode_depth") or (lambda: 1)
"""How many torch-dispatch modes are active in this thread."""
graph_task: Any = private.find("graph_task") or (lambda: -1)
"""The backward that this thread is in, or -1."""


class Quiet(ExitStack):
    """Enters everything that keeps a measurement from touching the program.

    Inference mode makes what we compute invisible to autograd and keeps version counters as they are; modes of the
    program (function, dispatch, autocast) are not asked. The state of the thread is restored on exit.
    """

    def __enter__(self) -> Quiet:
        super().__enter__()
        self.enter_context(_no_function())
        self.enter_context(_inference(True))
        if dispatch_modes() and _no_dispatch is not None:
            self.enter_context(_no_dispatch())
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                self.enter_context(torch.autocast("cuda", enabled=False))
        return self


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may be added to it, and nothing may be waited for."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_here(tensor: torch.Tensor) -> bool:
    """Whether the numbers of `tensor` can be read without waiting for a device."""
    return tensor.is_cpu
