"""What a torch function is to the tracer: passed by, an operation, an escape into Python, or handled on its own."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["pass", "operation", "escape", "special"]

_ASK = frozenset(
    "shape dtype device layout ndim is_leaf grad_fn requires_grad is_cuda is_sparse _version is_quantized "
    "is_nested output_nr _base nbytes _backward_hooks is_mps is_meta names retains_grad is_cpu _grad_fn "
    "itemsize is_xla".split()
)
"""Properties that only tell something about the tensor; reading `requires_grad` is among them, writing it is not."""

_PASS = frozenset(
    "dim size numel stride is_floating_point is_complex __len__ storage_offset data_ptr is_contiguous "
    "register_hook __repr__ __format__ __hash__ _record_function_enter_new element_size untyped_storage "
    "is_inference is_same_size register_post_accumulate_grad_hook get_device is_conj is_neg _is_view __dir__ "
    "result_type nelement ndimension is_pinned is_shared is_set_to storage _typed_storage dense_dim "
    "sparse_dim is_coalesced can_cast __reduce_ex__ __setstate__ _reduce_ex_internal __deepcopy__ retain_grad "
    "share_memory_ record_stream pin_memory __contains__ is_tensor is_nonzero iinfo is_storage backward grad".split()
)
ESCAPES = frozenset(
    ["item", "__float__", "__int__", "tolist", "numpy", "__array__", "__index__", "__complex__", "__dlpack__"]
)
COMPARISONS = frozenset(
    "gt lt ge le eq ne __eq__ __ne__ __gt__ __lt__ __ge__ __le__ logical_and logical_or logical_not "
    "logical_xor isclose greater less greater_equal less_equal isnan isinf isfinite not_equal".split()
)
CASTS = frozenset(["long", "int", "short", "byte", "bool", "char", "to", "type", "type_as"])
REWRAPS = frozenset({"tensor", "as_tensor", "asarray", "scalar_tensor"})
SAME_AS_FIRST = frozenset({"to", "type", "type_as", "view_as", "expand_as", "reshape_as"})
_NAMED_IN_PLACE = frozenset({"__setitem__"})
_MAY_BE_IN_PLACE = frozenset(
    "relu dropout leaky_relu elu relu6 hardtanh silu selu celu rrelu hardswish hardsigmoid threshold mish "
    "alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout batch_norm normalize".split()
)
ONE_TO_ONE = frozenset({"broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d", "align_tensors"})
"""Operations on several tensors whose outputs belong to the inputs one by one."""
VIEWS = frozenset(
    "view reshape permute transpose t squeeze unsqueeze expand flatten unflatten chunk split unbind "
    "__getitem__ select narrow expand_as view_as swapaxes movedim contiguous detach T mT __iter__ diagonal "
    "unfold detach_ requires_grad_ split_with_sizes tensor_split ravel T.__get__ mT.__get__ data.__get__ "
    "real.__get__ imag.__get__ to".split()
)
"""Operations whose output holds the same numbers as an input: nothing new to check for NaN."""


class Plan(NamedTuple):
    """How the tracer treats one torch function.

    Args:
        kind: what it is.
        name: its name; `data.__get__` for a property.
        in_place: whether it may change one of its arguments.
        values: which tensor arguments the output's numbers come from: "all", "first", "none" (only shapes do).
    """

    kind: Kind
    name: str
    in_place: bool
    values: Literal["all", "first", "none"]


def name_of(function: Any) -> str:
    """Return the name of a torch function; `requires_grad.__set__` for a property's setter."""
    name = getattr(function, "__name__", None) or str(function)
    if name in ("__get__", "__set__", "__delete__"):
        name = f"{getattr(getattr(function, '__self__', None), '__name__', '?')}.{name}"
    return name


def plan_for(function: Any, special: frozenset[str]) -> Plan:
    """Return how to treat a function; those in `special` have handlers of their own."""
    name = name_of(function)
    if name in special:
        return Plan("special", name, False, "all")
    stem, _, access = name.partition(".")
    if name in _PASS or (access == "__get__" and stem in _ASK):
        return Plan("pass", name, False, "all")
    if name in ESCAPES:
        return Plan("escape", name, False, "all")
    in_place = (
        (name[-1] == "_" and not name.endswith("__"))
        or name in _NAMED_IN_PLACE
        or name in _MAY_BE_IN_PLACE
        or (name.startswith("__i") and name not in ("__invert__", "__index__", "__iter__"))
    )
    if name.endswith("_like") or name.startswith("new_"):
        return Plan("operation", name, in_place, "none")
    if name in SAME_AS_FIRST:
        return Plan("operation", name, in_place, "first")
    return Plan("operation", name, in_place, "all")
