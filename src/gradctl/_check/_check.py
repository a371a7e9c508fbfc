"""`gradctl.check`: run a function or a model in float64 and compare its gradients with finite differences."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedParameter

from gradctl._check._graph import Graph, read, still_rows
from gradctl._check._judge import Circumstances, judged
from gradctl._check._reached import reached
from gradctl._check._stand_ins import StandIns, hooks_of
from gradctl._errors import NoSecondDerivative, UsageError
from gradctl._finite_difference import Subject, compare_in_double
from gradctl._finite_difference._double import differentiable
from gradctl._finite_difference._function import function_subject
from gradctl._finite_difference._trees import tensors
from gradctl._freeze._rows import held_of
from gradctl._names._patterns import Pattern, select
from gradctl._results import Findings

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_NOT_TWICE = re.compile(
    r"derivative for (?:'(\w+)'|(\S+)) is not implemented|once_differentiable|not (?:twice )?differentiable"
)
_NO_DERIVATIVE = re.compile(
    r"the derivative for '(\w+)' is not implemented|is not differentiable with respect to argument '(\w+)'"
)


def check(
    fn_or_module: Callable[..., Any],
    inputs: Any = (),
    params: Module | Mapping[str, Tensor] | Sequence[Pattern] | None = None,
    *,
    order: Literal[1, 2] = 1,
    probes: int = 2,
    seed: int = 0,
    expected: Sequence[Pattern] = (),
    notes: bool = False,
) -> Findings:
    """Say which gradients are not the derivative of what was computed, and how they differ from it.

    The function runs on float64 copies of its inputs, of the parameters and buffers of every module that it is or
    refers to, and of other tensors that it holds; afterwards these, every `.grad` and random state are as before.
    Gradients are compared with central differences along random directions; when they disagree the direction is halved
    until single tensors are left. Hooks on parameters count: what they make of a gradient is what an optimizer gets
    (but for those of `freeze(rows=...)`, which keep rows at zero by design).

    Args:
        fn_or_module: what is checked. It may return nested structures of tensors; those without a graph are left out,
            unless no output has one.
        inputs: one argument, a tuple or list of positional ones, or a mapping of keywords. If some tensors require a
            gradient only these are checked, else all of a floating or complex dtype.
        params: which parameters are checked: a module, a mapping by name, or patterns of names and tensors; () for
            none. By default all that require a gradient of all modules and closures that the function refers to.
        order: 2 checks the gradient of the gradient instead (the double backward).
        probes: how many random directions.
        seed: of the directions.
        expected: names of inputs and parameters, or patterns of them, whose gradient is another by design (straight
            through, reversed); they are left out.
        notes: also list what does no harm: kinks, and gradients that are only rounded.

    Returns:
        Findings, one for each way of being wrong; empty when all gradients are right. Slugs: `none`, `factor`,
        `transposed`, `swapped`, `conjugate`, `elements`, `missing-term`, `piecewise-constant`, `nonfinite`,
        `non-determinism`, `float32`, `kink`. `remarks` say what could not be checked.

    Raises:
        UsageError: there is nothing to check, an output is not finite, half precision that cannot be raised to float64,
            a wrapped, sharded, scripted or lazy module, or an input for which torch has no derivative at all.
        NoSecondDerivative: with `order=2`, an operation on the way has no double backward.
        PatternMatchesNothing: `expected` or `params` names nothing.
        Exception: what the function raises on its own dtypes.

    Source: as `torch.autograd.gradcheck` in fast mode (a direction instead of all columns), with steps and thresholds
    from measured errors (Ridders 1982; More and Wild 2011) in place of fixed ones.
    """
    _checked_arguments(fn_or_module, order, probes)
    names, args, kwargs = _named(fn_or_module, inputs)
    found = reached(fn_or_module)
    if isinstance(params, Module) and all(module is not params for _, module in found.modules):
        found.modules.append(("" if not found.modules else "params", params))
    _refuse_modules([module for _, root in found.modules for module in root.modules()])
    with StandIns(found) as stand_ins:
        chosen = _parameters(stand_ins, params)
        circumstances = Circumstances(subject=_title(fn_or_module), order=order, graph=Graph())
        builder = _Builder(fn_or_module, names, args, kwargs, stand_ins, chosen, expected, order, circumstances)
        builder.generators = tuple(found.generators)
        given = [t for _, t in tensors([args, kwargs])] + [t for _, t in stand_ins.tensors()]
        try:
            comparison = compare_in_double(builder.subject, given, probes=probes, order=order, seed=seed)
        except (RuntimeError, NotImplementedError) as error:
            raise _known(error, order) from error
        finally:
            stand_ins.start(lambda tensor: tensor)
    return judged(comparison, circumstances, notes=notes)


class _Builder:
    """Builds the subject in one precision or another."""

    generators: tuple[torch.Generator, ...] = ()

    def __init__(
        self,
        fn: Callable[..., Any],
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stand_ins: StandIns,
        chosen: Mapping[str, Tensor],
        expected: Sequence[Pattern],
        order: int,
        circumstances: Circumstances,
    ) -> None:
        self.fn, self.names, self.args, self.kwargs = fn, names, args, kwargs
        self.stand_ins, self.chosen, self.order, self.circumstances = stand_ins, chosen, order, circumstances
        self.by_design: set[str] = set()
        floating = {n: t for n, t in self._input_tensors() if differentiable(t)}
        if expected:
            self.by_design = set(select({**floating, **chosen}, expected, of="input or parameter"))
            circumstances.remarks.append(f"by design, not checked: {', '.join(sorted(self.by_design))}")
        marked = [name for name, tensor in floating.items() if tensor.requires_grad]
        self.inputs = [name for name in (marked or floating) if name not in self.by_design]
        self.params = {name: t for name, t in chosen.items() if name not in self.by_design}
        if not self.inputs and not self.params:
            passed = ", ".join(name for name, _ in self._input_tensors()) or "none"
            left_out = "; the rest is left out by expected=" if self.by_design else ""
            raise UsageError(
                "there is nothing to check",
                what=f"inputs: {passed}; parameters: none that require a gradient{left_out}",
                why="a derivative is taken of floating or complex tensors",
                fix="pass the inputs that the function is differentiated by, or its module",
            )

    def _input_tensors(self) -> list[tuple[str, Tensor]]:
        labelled = [*zip(self.names, self.args, strict=True), *self.kwargs.items()]
        return [pair for name, value in labelled for pair in tensors(value, name)]

    def subject(self, convert: Callable[[Tensor], Tensor]) -> Subject:
        """Return the subject whose tensors are converted by `convert`."""
        self.stand_ins.start(convert)
        plain = function_subject(self.fn, self.args, self.kwargs, self.names, convert, wanted=self.inputs)
        count, real = len(plain.values), list(self.params.values())
        hooks = hooks_of(real)
        still: dict[int, Tensor] = {}
        looked = False

        def run(leaves: Sequence[Tensor]) -> Sequence[Tensor]:
            nonlocal looked
            for leaf, registered in zip(leaves[count:], hooks, strict=False):
                for hook in registered:
                    leaf.register_hook(hook)
            self.stand_ins.install({id(t): leaf for t, leaf in zip(real, leaves[count:], strict=False)})
            with sdpa_kernel(SDPBackend.MATH) if self.order == 2 else contextlib.nullcontext():
                outputs = plain.run(leaves[:count])
            if not looked:
                looked = True
                graph = read(outputs, leaves)
                names = (*plain.names, *self.params)
                graph.padded = [names[i] for i in graph.padding]
                self.circumstances.graph = graph
                still.update({i: still_rows(leaves[i].detach(), rows) for i, rows in graph.padding.items()})
                graph.frozen = [name for name, parameter in self.params.items() if held_of(parameter)]
            return outputs

        return Subject(
            run=run,
            names=(*plain.names, *self.params),
            values=(*plain.values, *(convert(t.detach()).clone() for t in real)),
            still=still,
            hooks={count + i: len(registered) for i, registered in enumerate(hooks) if registered},
            generators=self.generators,
        )


def _checked_arguments(fn: Any, order: object, probes: object) -> None:
    if not callable(fn):
        raise UsageError(
            f"check() was given a {type(fn).__name__}",
            why="only a function or a module can be run at other points",
            fix="pass the function that computes it: gradctl.check(lambda x: ..., x)",
        )
    if order not in (1, 2):
        raise UsageError(f"order={order!r}", why="1 checks gradients, 2 the gradients of gradients", fix="order=2")
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 1:
        raise UsageError(f"probes={probes!r}", why="at least one direction is needed", fix="probes=3")
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "check() was called under torch.inference_mode()",
            why="nothing that is computed there has a gradient",
            fix="call it outside of that block",
        )


def _named(fn: Any, inputs: Any) -> tuple[list[str], tuple[Any, ...], dict[str, Any]]:
    """Return the names of the positional arguments, these, and the keyword arguments."""
    if isinstance(inputs, Mapping):
        return [], (), {str(key): value for key, value in inputs.items()}
    whole = not isinstance(inputs, (tuple, list)) or hasattr(inputs, "_fields")
    args: tuple[Any, ...] = (inputs,) if whole else tuple(inputs)
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, Module) else fn)
        bound = signature.bind(*args).arguments
    except (TypeError, ValueError):
        return [f"input[{i}]" for i in range(len(args))], args, {}
    names: list[str] = []
    for label, value in bound.items():
        many = signature.parameters[label].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{label}[{i}]" for i in range(len(value))] if many else [label]
    return names, args, {}


def _parameters(stand_ins: StandIns, params: Any) -> dict[str, Tensor]:
    every = {name: tensor for name, tensor in stand_ins.tensors() if differentiable(tensor)}
    leaves = {name: tensor for name, tensor in every.items() if tensor.requires_grad and tensor.is_leaf}
    if params is None:
        return leaves
    if isinstance(params, Module):
        inside = {id(param) for param in params.parameters()}
        return {name: tensor for name, tensor in leaves.items() if id(tensor) in inside}
    if isinstance(params, Mapping):
        held = {id(tensor) for tensor in every.values()}
        for name, tensor in params.items():
            if not isinstance(tensor, Tensor) or not differentiable(tensor):
                raise UsageError(f"params[{name!r}] is no floating tensor", fix="map names to parameters")
            if id(tensor) not in held:
                raise _not_held(name)
        return {str(name): tensor for name, tensor in params.items()}
    if isinstance(params, Tensor) or not isinstance(params, Iterable) or isinstance(params, str):
        raise UsageError(
            f"params is a {type(params).__name__}",
            fix="a module, a mapping from names to parameters, or a sequence of names, patterns and parameters",
        )
    chosen: dict[str, Tensor] = {}
    patterns: list[Any] = []
    for pattern in params:
        if isinstance(pattern, Tensor) and not isinstance(pattern, torch.nn.Parameter):
            name = next((name for name, tensor in every.items() if tensor is pattern), None)
            if name is None:
                raise _not_held(f"a tensor of shape {tuple(pattern.shape)}")
            chosen[name] = pattern
        else:
            patterns.append(pattern)
    return chosen | select(leaves, patterns)


def _not_held(name: str) -> UsageError:
    return UsageError(
        f"{name} of params is not found in the function",
        why="it is neither a parameter of a module nor a variable that the function refers to, so it cannot be moved",
        fix="pass it as an input, or pass the module that holds it",
    )


def _refuse_modules(modules: Sequence[Module]) -> None:
    for module in modules:
        kind = type(module).__name__
        if kind in _WRAPPERS:
            raise UsageError(
                f"{kind} cannot be checked",
                why="it exchanges gradients with other processes or devices while it runs",
                fix="check the module that it wraps, before wrapping or as .module",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{kind} is a scripted module", fix="check the module before it is scripted")
        for name, param in module._parameters.items():
            if isinstance(param, UninitializedParameter):
                raise UsageError(f"{name} of {kind} has no shape yet", fix="run the model once before it is checked")
            if param is not None and type(param).__name__ == "DTensor":
                raise UsageError(f"{name} of {kind} is sharded", fix="check the model before it is sharded")
            if param is not None and param.device.type == "meta":
                raise UsageError(f"{name} of {kind} is on the meta device", fix="give it numbers before it is checked")


def _title(fn: Any) -> str:
    return type(fn).__name__ if isinstance(fn, Module) else getattr(fn, "__name__", type(fn).__name__)


def _known(error: Exception, order: int) -> Exception:
    """Return our error for what torch cannot differentiate, or the error itself."""
    text = next(iter(str(error).splitlines()), "")
    missing = _NO_DERIVATIVE.search(text)
    if missing is not None and order == 1:
        return UsageError(
            f"torch has no derivative by {missing.group(missing.lastindex or 0)!r} at all",
            what=text,
            fix="say which inputs are checked: x.requires_grad_() on those, or fix the other inside the function",
        )
    if "use_reentrant=True" in text:
        return UsageError(
            "a reentrant checkpoint cannot be checked",
            why="it gives gradients to .backward() only, not to torch.autograd.grad",
            fix="torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
        )
    twice = _NOT_TWICE.search(text) if order == 2 else None
    if twice is not None:
        return NoSecondDerivative(
            f"{next((name for name in twice.groups() if name), 'a function on the way')} has no second derivative",
            what=text,
            fix="use an operation that has one, or order=1 when nothing differentiates its gradient",
        )
    return error
