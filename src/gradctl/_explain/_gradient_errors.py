"""Which exceptions are about gradients: torch's own messages, and what Python says when a gradient is not there."""

from __future__ import annotations

import linecache
from types import TracebackType

_MESSAGES = (
    "does not require grad",
    "backward through the graph a second time",
    "modified by an inplace operation",
    "is being modified inplace",
    "is being used in an in-place operation",
    "Can't detach views in-place",
    "grad can be implicitly created only for",
    "that requires grad",
    "can require gradients",
    "requires_grad flags of leaf variables",
    "can't retain_grad on Tensor",
    "Inference tensors cannot be",
    "update to inference tensor outside InferenceMode",
    "have been used in the graph",
    "Only Tensors created explicitly by the user",
    "can't optimize a non-leaf Tensor",
    "optimizer got an empty parameter list",
    "finished reduction in the prior iteration",
    "marked as ready twice",
    "incorrect number of gradients",
    "returned an invalid gradient",
    "Mismatch in shape: grad_output",
    "has changed the size of value",
    "derivative for ",
    "No inf checks were recorded for this optimizer",
    "for gradients from `parameters` is non-finite",
    "no gradient function",
)
_WITHOUT_BACKWARD = ("has no attribute 'backward'", 'has no attribute "backward"')
_NONE = "NoneType"


def is_gradient_error(error: BaseException | None) -> bool:
    """Say whether an exception is about gradients.

    An exception that was raised from another one is judged by that one too: libraries wrap what torch raises.

    Args:
        error: what ended the program; None for nothing.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if _is_one(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_one(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, (SyntaxError, AssertionError)):
        return False
    try:
        text = str(error)
    except Exception:
        return False  # the program's own class, which cannot say what it is
    if isinstance(error, AttributeError) and any(words in text for words in _WITHOUT_BACKWARD):
        return True
    if isinstance(error, (AttributeError, TypeError)) and _NONE in text:
        return _reads_grad(error.__traceback__)
    return any(words in text for words in _MESSAGES)


def _reads_grad(trace: TracebackType | None) -> bool:
    """Whether the function that raised works with a `.grad`; its own line may only use what an earlier one has read."""
    last: TracebackType | None = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    if ".grad" in linecache.getline(code.co_filename, last.tb_lineno):
        return True
    names = {*code.co_names, *code.co_varnames}
    return "grad" in names or "grads" in names
