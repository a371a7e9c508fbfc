"""Every private torch name that gradctl uses, in one place.

Each entry says where the name lives, in which versions it was seen, who needs it and what happens when it is gone.
`get` returns it or raises; `probe` looks at all of them without raising (`gradctl env` shows the result).

What was run: every test with torch 2.13, those of `off` also with 2.14. In 2.11, 2.12 and 2.15 nothing was run: a name
that is gone there is announced as its entry says.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from gradctl._errors import GradctlError


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A private torch name.

    Args:
        key: what we call it.
        path: `module:attribute.attribute`.
        seen: torch versions in which it was found and works.
        needed_by: the part of gradctl that uses it.
        without: what happens if it is gone.
    """

    key: str
    path: str
    seen: str
    needed_by: str
    without: str


NAMES: tuple[PrivateName, ...] = (
    PrivateName(
        "execution_engine",
        "torch.autograd:Variable._execution_engine",
        "2.13-2.14",
        "off, run, explain",
        "backward calls are neither refused nor recorded nor traced; off refuses to start",
    ),
    PrivateName(
        "single_level_function",
        "torch.autograd.function:_SingleLevelFunction",
        "2.13-2.14",
        "off, explain",
        "autograd.Function.apply records a graph while gradients are off",
    ),
    PrivateName(
        "function_base",
        "torch._C:_FunctionBase",
        "2.13-2.14",
        "off",
        "the class attribute `apply` is patched instead; on torch 2.14 and later, aliases captured before record",
    ),
    PrivateName(
        "allow_single_level_function",
        "torch._functorch.utils:enable_single_level_autograd_function",
        "2.13-2.14",
        "off",
        "first use inside of a torch.func transform patches the class attribute `apply` instead of its C method",
    ),
    PrivateName(
        "module_call",
        "torch.nn:Module._wrapped_call_impl",
        "2.13-2.14",
        "off",
        "a step that the switch cut is noticed without naming the module, and fewer of them are",
    ),
    PrivateName(
        "clip_with_norm",
        "torch.nn.utils.clip_grad:_clip_grads_with_norm_",
        "2.13",
        "run",
        "clipping is not recorded",
    ),
    PrivateName(
        "scaler_maybe_step",
        "torch.amp.grad_scaler:GradScaler._maybe_opt_step",
        "2.13",
        "run",
        "steps that a GradScaler skipped are not recorded",
    ),
    PrivateName(
        "foreach_mul",
        "torch:_foreach_mul_",
        "2.13",
        "Step",
        "gradients are clipped one by one",
    ),
    PrivateName(
        "foreach_copy",
        "torch:_foreach_copy_",
        "2.13",
        "precision",
        "weights are cast one at a time",
    ),
    PrivateName(
        "enter_autocast",
        "torch.amp.autocast_mode:_enter_autocast",
        "2.13",
        "precision",
        "modules cannot be kept in float32 (overrides)",
    ),
    PrivateName(
        "exit_autocast",
        "torch.amp.autocast_mode:_exit_autocast",
        "2.13",
        "precision",
        "as for enter_autocast",
    ),
    PrivateName(
        "active_ddp",
        "torch.nn.parallel:DistributedDataParallel._get_active_ddp_module",
        "2.13",
        "precision",
        "16-bit weights below DistributedDataParallel are refused only where the wrapper itself is attached",
    ),
    PrivateName(
        "unscale_kernel",
        "torch:_amp_foreach_non_finite_check_and_unscale_",
        "2.13",
        "precision",
        "there is no loss scale, and no look for inf and NaN in one pass",
    ),
    PrivateName(
        "scheduler_moves",
        "torch.optim.lr_scheduler:_enable_get_lr_call.__enter__",
        "2.13",
        "run",
        "where a scheduler steps is not watched: its two rules stay silent",
    ),
    PrivateName(
        "optimizer_patch_step",
        "torch.optim:Optimizer._patch_step_function",
        "2.13",
        "run, explain",
        "optimizers that never step are not seen",
    ),
    PrivateName(
        "loader_iterator",
        "torch.utils.data.dataloader:_BaseDataLoaderIter",
        "2.13",
        "run",
        "time spent in the data loader is counted as forward",
    ),
    PrivateName(
        "distributed_autograd",
        "torch._C:_distributed_autograd",
        "2.13-2.14",
        "off, run",
        "autograd over RPC is neither refused nor recorded",
    ),
    PrivateName(
        "inference_guard",
        "torch._C:_InferenceMode",
        "2.13",
        "run",
        "the public, slower torch.inference_mode is used",
    ),
    PrivateName(
        "disable_dispatch",
        "torch._C:_DisableTorchDispatch",
        "2.13",
        "run, explain",
        "a dispatch mode of the program sees the recorder's own operations; there is no traced run",
    ),
    PrivateName(
        "function_mode_depth",
        "torch._C:_len_torch_function_stack",
        "2.13",
        "run, explain",
        "the loss is read the slow way in every step; there is no traced run",
    ),
    PrivateName(
        "function_mode_at",
        "torch._C:_get_function_stack_at",
        "2.13",
        "explain",
        "there is no traced run",
    ),
    PrivateName(
        "functorch_level",
        "torch._C:_functorch.maybe_current_level",
        "2.13",
        "explain",
        "there is no traced run",
    ),
    PrivateName(
        "dispatch_mode",
        "torch.utils._python_dispatch:TorchDispatchMode",
        "2.13",
        "check",
        "a wrong gradient is not told from one that was rounded to a lower dtype",
    ),
    PrivateName(
        "dispatch_mode_depth",
        "torch._C:_len_torch_dispatch_stack",
        "2.13",
        "run",
        "the loss is read the slow way in every step",
    ),
    PrivateName(
        "graph_task",
        "torch._C:_current_graph_task_id",
        "2.13",
        "run",
        "a backward inside a backward is counted as one of its own",
    ),
    PrivateName(
        "foreach_norm",
        "torch:_foreach_norm",
        "2.13",
        "run",
        "norms are computed one tensor at a time",
    ),
    PrivateName(
        "dynamo_skip",
        "torch._dynamo.trace_rules:add",
        "2.13",
        "run",
        "torch.compile of a whole step traces the recorder's hooks",
    ),
    PrivateName(
        "ddp_logging",
        "torch.nn.parallel:DistributedDataParallel._get_ddp_logging_data",
        "2.13",
        "run",
        "the communication times of DistributedDataParallel are not recorded",
    ),
    PrivateName(
        "push_saved_hooks",
        "torch._C._autograd:_push_saved_tensors_default_hooks",
        "2.13",
        "run --lines",
        "saved bytes are shown by operation, not by line",
    ),
    PrivateName(
        "pop_saved_hooks",
        "torch._C._autograd:_pop_saved_tensors_default_hooks",
        "2.13",
        "run --lines",
        "saved bytes are shown by operation, not by line",
    ),
    PrivateName(
        "top_saved_hooks",
        "torch._C._autograd:_top_saved_tensors_default_hooks",
        "2.13",
        "run --lines",
        "saved bytes are shown by operation, not by line",
    ),
    PrivateName(
        "saved_hooks_enabled",
        "torch._C._autograd:_saved_tensors_hooks_is_enabled",
        "2.13",
        "run --lines",
        "saved bytes are shown by operation, not by line",
    ),
    PrivateName(
        "saved_value_data",
        "torch._C._autograd:SavedTensor.data",
        "2.13",
        "run",
        "what backward remembers is not shown",
    ),
    PrivateName(
        "no_torch_function",
        "torch._C:DisableTorchFunctionSubclass",
        "2.13",
        "run",
        "what backward remembers is not shown",
    ),
    PrivateName(
        "preserve_version",
        "torch.autograd:_unsafe_preserve_version_counter",
        "2.13",
        "derivatives",
        "a graph that was recorded before a product by forward-mode AD cannot be differentiated after it",
    ),
    PrivateName(
        "autograd_compiler",
        "torch._C:_dynamo.compiled_autograd",
        "2.13-2.14",
        "off",
        "backwards that C++ and TorchScript start are not refused; off refuses to start",
    ),
    PrivateName(
        "run_backward_frame",
        "torch.autograd.graph:_engine_run_backward",
        "2.13-2.14",
        "off",
        "backwards that run when gradients are first switched off are not found and not awaited",
    ),
    PrivateName(
        "dispatch_guard",
        "torch._C:_ForceDispatchKeyGuard",
        "2.13-2.14",
        "off",
        "the self-test of the switch cannot hide from the modes of its caller; off refuses to start",
    ),
    PrivateName(
        "dispatch_included",
        "torch._C:_dispatch_tls_local_include_set",
        "2.13-2.14",
        "off",
        "as for dispatch_guard",
    ),
    PrivateName(
        "dispatch_excluded",
        "torch._C:_dispatch_tls_local_exclude_set",
        "2.13-2.14",
        "off",
        "as for dispatch_guard",
    ),
    PrivateName(
        "dispatch_is_excluded",
        "torch._C:_dispatch_tls_is_dispatch_key_excluded",
        "2.13-2.14",
        "off",
        "there is no portable engine",
    ),
    PrivateName(
        "dispatch_exclude",
        "torch._C:_dispatch_tls_set_dispatch_key_excluded",
        "2.13-2.14",
        "off",
        "there is no portable engine",
    ),
    PrivateName(
        "dispatch_key",
        "torch._C:DispatchKey",
        "2.13-2.14",
        "off",
        "there is no portable engine",
    ),
    PrivateName(
        "functorch_grad",
        "torch._functorch.eager_transforms:grad_increment_nesting",
        "2.13-2.14",
        "off",
        "torch.func grad returns zeros while gradients are off; off refuses to start",
    ),
    PrivateName(
        "functorch_jvp",
        "torch._functorch.eager_transforms:jvp_increment_nesting",
        "2.13-2.14",
        "off",
        "torch.func jvp returns zeros while gradients are off; off refuses to start",
    ),
    PrivateName(
        "dual_level",
        "torch._functorch.predispatch:_enter_dual_level_impl",
        "2.13-2.14",
        "off",
        "forward-mode AD is not refused; off refuses to start",
    ),
    PrivateName(
        "dual_unpack",
        "torch._functorch.predispatch:_unpack_dual_impl",
        "2.13-2.14",
        "off",
        "tangents of a level that was entered before can be read while gradients are off; they are right",
    ),
    PrivateName(
        "functional_grad",
        "torch.autograd.functional:_autograd_grad",
        "2.13-2.14",
        "off",
        "torch.autograd.functional returns zeros while gradients are off; off refuses to start",
    ),
    PrivateName(
        "script_parameters",
        "torch._C:ParameterDict",
        "2.13-2.14",
        "off",
        "saving a script module is not refused, and writes requires_grad=False",
    ),
    PrivateName(
        "dynamo_stance",
        "torch._dynamo.eval_frame:_stance",
        "2.13-2.14",
        "off",
        "what is compiled while gradients are off is compiled again afterwards",
    ),
    PrivateName(
        "dynamo_callback",
        "torch._dynamo.eval_frame:_callback_from_stance",
        "2.13-2.14",
        "off",
        "what is compiled while gradients are off is compiled again afterwards",
    ),
    PrivateName(
        "dynamo_lock",
        "torch._dynamo.convert_frame:compile_lock",
        "2.13-2.14",
        "off",
        "a compilation that is running when gradients go off is not awaited",
    ),
    PrivateName(
        "dynamo_count",
        "torch._dynamo.convert_frame:FRAME_COUNTER",
        "2.13-2.14",
        "off",
        "what is compiled in spite of the stance is not dropped afterwards",
    ),
    PrivateName(
        "transforms_active",
        "torch._C:_are_functorch_transforms_active",
        "2.13",
        "custom gradients",
        "none of them can be used",
    ),
    PrivateName(
        "transform_wrapped",
        "torch._C:_functorch.is_functorch_wrapped_tensor",
        "2.13",
        "custom gradients",
        "a parameter that forward of custom_vjp reads from around itself is not seen under torch.func",
    ),
    PrivateName(
        "transform_unwrap",
        "torch._C:_functorch.get_unwrapped",
        "2.13",
        "custom gradients",
        "as for transform_wrapped",
    ),
    PrivateName(
        "forward_level",
        "torch.autograd.forward_ad:_current_level",
        "2.13",
        "custom gradients",
        "forward-mode AD through them raises torch's error instead of working or of ours",
    ),
    PrivateName(
        "pytree",
        "torch.utils:_pytree",
        "2.13",
        "custom gradients",
        "none of them can be used",
    ),
    PrivateName(
        "dispatch_key_guard",
        "torch._C:_SetExcludeDispatchKeyGuard",
        "2.13",
        "recompute, fit",
        "nothing can be recomputed by replay",
    ),
    PrivateName(
        "no_torch_dispatch",
        "torch._C:_DisableTorchDispatch",
        "2.13",
        "recompute, fit",
        "nothing can be recomputed by replay",
    ),
    PrivateName(
        "below_autograd",
        "torch._C:_AutoDispatchBelowAutograd",
        "2.13",
        "recompute, fit",
        "nothing can be recomputed by replay",
    ),
    PrivateName(
        "no_dispatch_modes",
        "torch.utils._python_dispatch:_disable_current_modes",
        "2.13",
        "recompute, fit",
        "nothing can be recomputed by replay",
    ),
    PrivateName(
        "graph_is_kept",
        "torch._C:_autograd._get_current_graph_task_keep_graph",
        "2.13",
        "recompute, fit",
        "the recipe of a region is kept until its graph is gone, which costs memory",
    ),
    PrivateName(
        "storage_uses",
        "torch._C:_storage_Use_Count",
        "2.13",
        "fit",
        "the gradient of a cross-entropy has a place of its own",
    ),
    PrivateName(
        "dispatch_modes",
        "torch.utils._python_dispatch:_get_current_dispatch_mode_stack",
        "2.13",
        "fit",
        "fit is not available",
    ),
    PrivateName(
        "set_versions",
        "torch._C:_autograd._unsafe_set_version_counter",
        "2.13",
        "recompute",
        "nothing can be recomputed by running a function again",
    ),
    PrivateName(
        "function_modes",
        "torch.overrides:_get_current_function_mode_stack",
        "2.13",
        "recompute",
        'function modes around a forward are not entered again by engine="rerun"',
    ),
    PrivateName(
        "saved_hooks_on_top",
        "torch._C:_autograd._top_saved_tensors_default_hooks",
        "2.13",
        "recompute, fit",
        "tensors kept inside a region pass by the saved-tensor hooks around it",
    ),
    PrivateName(
        "node_metadata",
        "torch.autograd.graph:Node._input_metadata",
        "2.13",
        "per_sample_grads, per_sample_norms",
        "views of a weight keep its own shape there; where that is wrong the check at the first call finds it",
    ),
    PrivateName(
        "tensor_hooks",
        "torch:Tensor._backward_hooks",
        "2.13",
        "per_sample_grads",
        "a gradient hook is not named as the cause when per-sample gradients do not add up",
    ),
    PrivateName(
        "enable_profiler",
        "torch.autograd:_enable_profiler_legacy",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "disable_profiler",
        "torch.autograd:_disable_profiler_legacy",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "profiler_config",
        "torch.autograd:ProfilerConfig",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "profiler_state",
        "torch.autograd:ProfilerState",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "profiler_experimental",
        "torch._C._profiler:_ExperimentalConfig",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "fast_record_function",
        "torch._C._profiler:_RecordFunctionFast",
        "2.13",
        "memory, fit",
        "no memory is measured",
    ),
    PrivateName(
        "current_node",
        "torch._C:_current_autograd_node",
        "2.13",
        "memory",
        "what backward allocates is not traced to the line of its forward",
    ),
    PrivateName(
        "sequence_number",
        "torch.autograd:_get_sequence_nr",
        "2.13",
        "memory",
        "what backward allocates is not traced to the line of its forward",
    ),
)

_BY_KEY = {entry.key: entry for entry in NAMES}


def get(key: str) -> Any:
    """Return the private torch object `key`.

    Raises:
        GradctlError: this torch does not have it.
    """
    entry = _BY_KEY[key]
    try:
        return _resolve(entry.path)
    except (ImportError, AttributeError) as error:
        raise GradctlError(
            f"this torch has no {entry.path.replace(':', '.')}",
            what=f"{entry.needed_by} needs it ({entry.without})",
            why=f"a private name, seen in torch {entry.seen}; {error}",
            fix="use a torch version that gradctl supports, or report it; `gradctl env` lists every such name",
        ) from error


def find(key: str) -> Any | None:
    """Return the private torch object `key`, or None when this torch does not have it."""
    try:
        return _resolve(_BY_KEY[key].path)
    except (ImportError, AttributeError):
        return None


def probe() -> dict[PrivateName, bool]:
    """Look for every private name; imports torch, changes nothing."""
    return {entry: find(entry.key) is not None for entry in NAMES}


def _resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
