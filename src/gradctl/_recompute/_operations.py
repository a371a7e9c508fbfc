"""What an operation does besides returning values, read off its schema: what it writes, and whether it draws."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

_aten = torch.ops.aten

# Operations that write arguments of which their schema says nothing: positions of the running statistics.
_HIDDEN_WRITES: dict[Any, tuple[int, ...]] = {
    _aten.native_batch_norm.default: (3, 4),
    _aten.cudnn_batch_norm.default: (3, 4),
    _aten.miopen_batch_norm.default: (3, 4),
}
# Operations that draw random numbers without the tag that says so.
_ALSO_RANDOM = frozenset({_aten.rrelu_with_noise.default, _aten.native_dropout.default})
# Operations that give a tensor another storage, or carry random state of their own: not replayed.
_NEVER = frozenset(
    {"aten::set_", "aten::resize_", "aten::resize_as_", "aten::_cudnn_rnn", "aten::_cudnn_init_dropout_state"}
)
# Outputs with bytes that nobody has written: two calls need not agree in them.
_UNWRITTEN: dict[Any, tuple[int, ...]] = {_aten.mkldnn_rnn_layer.default: (3,)}
# Their schemas do not say which arguments they write, and some write them later.
_WRITES_WHAT_IT_LIKES = frozenset({"c10d"})
_OURS_TO_REPLAY = ("aten", "prims", "torchvision", "quantized_decomposed")


@dataclass(frozen=True, slots=True)
class Signature:
    """What the schema of an operation says.

    Args:
        writes: positions of arguments that it writes.
        named_writes: names of keyword arguments that it writes.
        hidden: positions that it writes without saying so; they must not be written again when it is replayed.
        random: whether it draws random numbers.
        quiet: whether what it writes keeps its version counter, so that autograd reads what is there in backward.
        unwritten: positions of outputs with bytes that mean nothing.
        chosen: whether switches of the process choose its kernel.
        replayable: whether calling it again with the same arguments gives the same and does nothing else.
    """

    writes: tuple[int, ...]
    named_writes: tuple[str, ...]
    hidden: tuple[int, ...]
    random: bool
    quiet: bool
    unwritten: tuple[int, ...]
    chosen: bool
    replayable: bool

    @property
    def writes_something(self) -> bool:
        """Whether it writes any argument."""
        return bool(self.writes or self.named_writes or self.hidden)


@functools.cache
def signature(function: Any) -> Signature:
    """Return the signature of an operation, an `OpOverload`."""
    positions: list[int] = []
    names: list[str] = []
    schema = function._schema
    if function.namespace in _WRITES_WHAT_IT_LIKES:
        positions += range(len(schema.arguments))
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if position in positions:
                continue
            if argument.kwarg_only:
                names.append(argument.name)
            else:
                positions.append(position)
    hidden = tuple(i for i in _HIDDEN_WRITES.get(function, ()) if i not in positions)
    random = torch.Tag.nondeterministic_seeded in function.tags or function in _ALSO_RANDOM
    replayable = function.namespace in _OURS_TO_REPLAY and schema.name not in _NEVER
    quiet = not schema.name.endswith("_") and not any(a.kwarg_only and a.is_out for a in schema.arguments)
    chosen = is_matmul(function) or function in _HIDDEN_WRITES
    return Signature(
        tuple(positions), tuple(names), hidden, random, quiet, _UNWRITTEN.get(function, ()), chosen, replayable
    )


@functools.cache
def drawing_from(function: Any) -> tuple[Any, int] | None:
    """Return an operation that does the same with a generator of the caller's, and the position of that argument.

    None where there is no such operation: it draws from the generator of the device only.
    """
    names = [argument.name for argument in function._schema.arguments]
    packet = function.overloadpacket
    for candidate in (function, *(getattr(packet, name) for name in packet.overloads())):
        given = [argument.name for argument in candidate._schema.arguments]
        if "generator" in given and [n for n in given if n != "generator"] == [n for n in names if n != "generator"]:
            position = given.index("generator")
            return candidate, -1 if candidate._schema.arguments[position].kwarg_only else position
    return None


_MATMUL = frozenset(
    {
        "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "convolution", "_convolution", "linear",
        "mkldnn_rnn_layer", "_scaled_mm", "_grouped_mm", "einsum",
    }
)  # fmt: skip
_ATTENTION = frozenset(
    {
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward",
        "flex_attention",
    }
)  # fmt: skip


def is_matmul(function: Any) -> bool:
    """Whether it multiplies matrices or convolves: what costs most to compute again."""
    return function._schema.name.partition("::")[2] in _MATMUL


def is_attention(function: Any) -> bool:
    """Whether it is a fused attention."""
    return function._schema.name.partition("::")[2] in _ATTENTION
