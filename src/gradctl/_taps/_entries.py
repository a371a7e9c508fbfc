"""The entry points: one line each, so that no name is intercepted twice."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gradctl import _torch_private as private
from gradctl._taps._tap import AttributeTap, EngineTap, Location, RegistrationTap, StepTap


def _at(*places: str) -> Callable[[], Sequence[Location]]:
    """Return a function that finds `module:owner.attribute` for each place."""

    def locate() -> list[Location]:
        found: list[Location] = []
        for place in places:
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            owner: Any = importlib.import_module(module)
            for step in owners:
                owner = getattr(owner, step)
            found.append((owner, name))
        return found

    return locate


def _everywhere(place: str) -> Callable[[], Sequence[Location]]:
    """Return a function that finds `module:name` and every loaded torch module that imported it by name."""
    module, _, name = place.partition(":")

    def locate() -> list[Location]:
        value = getattr(importlib.import_module(module), name)
        return [
            (loaded, name)
            for key, loaded in list(sys.modules.items())
            if key.split(".")[0] == "torch" and vars(loaded).get(name) is value
        ]

    return locate


def _function_apply() -> list[Location]:
    found = list(_at("torch.autograd.function:_SingleLevelFunction.apply")())
    function: Any = importlib.import_module("torch.autograd").Function
    if type(vars(function).get("apply")).__name__ == "classmethod_descriptor":
        found.append((function, "apply"))  # from torch 2.14 on it carries the C method itself and hides its base's
    return found


def _rpc_backward() -> list[Location]:
    owners = [private.find("distributed_autograd"), sys.modules.get("torch.distributed.autograd")]
    return [(owner, "backward") for owner in owners if owner is not None and hasattr(owner, "backward")]


def _if_there(*places: str) -> Callable[[], Sequence[Location]]:
    """Return a function that finds those of `places`, as `_everywhere` does, that this torch has."""

    def locate() -> list[Location]:
        found: list[Location] = []
        for place in places:
            try:
                found += _everywhere(place)()
            except (ImportError, AttributeError):
                continue  # renamed or not yet there; `_torch_private` says what that costs
        return found

    return locate


engine = EngineTap(lambda: _at("torch.autograd:Variable._execution_engine")()[0])
optimizer_step = StepTap()
parameter_registered = RegistrationTap("parameter_registered", "register_module_parameter_registration_hook")
module_registered = RegistrationTap("module_registered", "register_module_module_registration_hook")

optimizer_created = AttributeTap("optimizer_created", _at("torch.optim:Optimizer._patch_step_function"))
zero_grad = AttributeTap("zero_grad", _at("torch.optim:Optimizer.zero_grad"))
module_zero_grad = AttributeTap("module_zero_grad", _at("torch.nn:Module.zero_grad"))
clip = AttributeTap("clip", _at("torch.nn.utils.clip_grad:_clip_grads_with_norm_"))
scaler_scale = AttributeTap("scaler_scale", _at("torch.amp.grad_scaler:GradScaler.scale"))
scaler_step = AttributeTap("scaler_step", _at("torch.amp.grad_scaler:GradScaler._maybe_opt_step"))
scaler_call = AttributeTap("scaler_call", _at("torch.amp.grad_scaler:GradScaler.step"))
scaler_unscale = AttributeTap("scaler_unscale", _at("torch.amp.grad_scaler:GradScaler.unscale_"))
scaler_update = AttributeTap("scaler_update", _at("torch.amp.grad_scaler:GradScaler.update"))
scheduler_moves = AttributeTap("scheduler_moves", _at("torch.optim.lr_scheduler:_enable_get_lr_call.__enter__"))
data_next = AttributeTap("data_next", _at("torch.utils.data.dataloader:_BaseDataLoaderIter.__next__"))
function_apply = AttributeTap("function_apply", _function_apply)
retain_grad = AttributeTap("retain_grad", _at("torch:Tensor.retain_grad"))
compile = AttributeTap("compile", _at("torch:compile"))
dynamo_callback = AttributeTap("dynamo_callback", _at("torch._dynamo.eval_frame:_callback_from_stance"))
load_library = AttributeTap("load_library", _at("torch:ops.load_library"))
module_called = AttributeTap("module_called", _at("torch.nn:Module._call_impl"))
jit_save = AttributeTap("jit_save", _at("torch._C:ScriptModule.save", "torch._C:ScriptModule.save_to_buffer"))
functorch_grad = AttributeTap("functorch_grad", _everywhere("torch._functorch.eager_transforms:grad_increment_nesting"))
functorch_jvp = AttributeTap("functorch_jvp", _everywhere("torch._functorch.eager_transforms:jvp_increment_nesting"))
dual_level = AttributeTap("dual_level", _everywhere("torch._functorch.predispatch:_enter_dual_level_impl"))
dual_value = AttributeTap(
    "dual_value",
    _if_there("torch._functorch.predispatch:_make_dual_impl", "torch._functorch.predispatch:_unpack_dual_impl"),
)
functional_grad = AttributeTap("functional_grad", _at("torch.autograd.functional:_autograd_grad"))
rpc_backward = AttributeTap("rpc_backward", _rpc_backward)
saved_hooks_disabled = AttributeTap("saved_hooks_disabled", _at("torch._C._autograd:_saved_tensors_hooks_disable"))
autograd_compiler = AttributeTap("autograd_compiler", _at("torch._C:_dynamo.compiled_autograd.set_autograd_compiler"))
requires_grad_call = AttributeTap("requires_grad_call", _at("torch:Tensor.requires_grad_"))
module_requires_grad = AttributeTap("module_requires_grad", _at("torch.nn:Module.requires_grad_"))
variable_made = AttributeTap("variable_made", _at("torch.autograd.variable:VariableMeta.__call__"))
from_numpy = AttributeTap("from_numpy", _at("torch:from_numpy"))
parameter_made = AttributeTap("parameter_made", _at("torch.nn:Parameter.__new__"))
inference_entered = AttributeTap("inference_entered", _at("torch.autograd.grad_mode:inference_mode.__enter__"))
inference_left = AttributeTap("inference_left", _at("torch.autograd.grad_mode:inference_mode.__exit__"))
thread_start = AttributeTap("thread_start", _at("_thread:start_new_thread", "threading:_start_new_thread"))
extension_import = AttributeTap("extension_import", _at("importlib.machinery:ExtensionFileLoader.create_module"))
library_open = AttributeTap("library_open", _at("ctypes:CDLL.__init__"))
os_exit = AttributeTap("os_exit", _at("os:_exit"))
process_start = AttributeTap("process_start", _at("multiprocessing.process:BaseProcess.start"))
ddp_created = AttributeTap("ddp_created", _at("torch.nn.parallel:DistributedDataParallel.__init__"))
group_destroyed = AttributeTap("group_destroyed", _if_there("torch.distributed.distributed_c10d:destroy_process_group"))
popen = AttributeTap("popen", _at("subprocess:Popen.__init__"))

ALL = (
    engine,
    optimizer_step,
    parameter_registered,
    module_registered,
    optimizer_created,
    zero_grad,
    module_zero_grad,
    clip,
    ddp_created,
    scaler_scale,
    scaler_step,
    scaler_call,
    scaler_unscale,
    scaler_update,
    scheduler_moves,
    data_next,
    function_apply,
    retain_grad,
    compile,
    dynamo_callback,
    load_library,
    jit_save,
    module_called,
    functorch_grad,
    functorch_jvp,
    dual_level,
    dual_value,
    functional_grad,
    autograd_compiler,
    requires_grad_call,
    module_requires_grad,
    parameter_made,
    variable_made,
    from_numpy,
    inference_entered,
    inference_left,
    thread_start,
    extension_import,
    library_open,
    rpc_backward,
    saved_hooks_disabled,
    os_exit,
    process_start,
    group_destroyed,
    popen,
)
