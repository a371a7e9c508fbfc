"""Where we listen to torch: one interception per entry point, shared by everyone who listens there.

Nothing is touched when this is imported. A tap installs its stub when its first subscriber comes and puts back
exactly what stood there when the last one goes, unless somebody else has patched over it in between; then a stub that
only passes through stays below the other patch and is used again.
"""

from __future__ import annotations

from gradctl._taps._entries import (
    ALL,
    autograd_compiler,
    clip,
    compile,
    data_next,
    ddp_created,
    dual_level,
    dual_value,
    dynamo_callback,
    engine,
    extension_import,
    from_numpy,
    function_apply,
    functional_grad,
    functorch_grad,
    functorch_jvp,
    inference_entered,
    inference_left,
    jit_save,
    library_open,
    load_library,
    module_registered,
    module_requires_grad,
    module_zero_grad,
    optimizer_created,
    optimizer_step,
    os_exit,
    parameter_made,
    parameter_registered,
    popen,
    process_start,
    requires_grad_call,
    retain_grad,
    rpc_backward,
    saved_hooks_disabled,
    scaler_scale,
    scaler_step,
    thread_start,
    variable_made,
    zero_grad,
)
from gradctl._taps._tap import AttributeTap, Handle, Order

__all__ = [
    "AttributeTap",
    "Handle",
    "Order",
    "autograd_compiler",
    "clip",
    "compile",
    "data_next",
    "ddp_created",
    "dual_level",
    "dual_value",
    "dynamo_callback",
    "engine",
    "extension_import",
    "from_numpy",
    "function_apply",
    "functional_grad",
    "functorch_grad",
    "functorch_jvp",
    "inference_entered",
    "inference_left",
    "installed",
    "jit_save",
    "library_open",
    "load_library",
    "module_registered",
    "module_requires_grad",
    "module_zero_grad",
    "optimizer_created",
    "optimizer_step",
    "os_exit",
    "parameter_made",
    "parameter_registered",
    "popen",
    "process_start",
    "requires_grad_call",
    "retain_grad",
    "rpc_backward",
    "saved_hooks_disabled",
    "scaler_scale",
    "scaler_step",
    "thread_start",
    "variable_made",
    "zero_grad",
]


def installed() -> list[str]:
    """Return the names of the entry points that are intercepted now."""
    return [tap.name for tap in ALL if tap.is_installed()]
