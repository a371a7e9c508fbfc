"""`gradctl.explain`: run one training step traced, or read the graph of a loss, and say what is wrong with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import UsageError
from gradctl._explain._gradient_errors import is_gradient_error
from gradctl._explain._passages import walk
from gradctl._explain._reach import of_graph
from gradctl._explain._tracing import Tracing
from gradctl._explain._watch import check, folder, name_parameters, script
from gradctl._lineage import Frames, ParameterFacts, site
from gradctl._lineage._tracer import grad_fn_of
from gradctl._results import Finding, Findings

_CALLS = 2


def explain(
    loss_or_step: Tensor | Callable[[], Any],
    model: Module | None = None,
    optimizer: Optimizer | None = None,
    *,
    into: Sequence[str] = (),
    notes: bool = False,
) -> Findings:
    """Say what is wrong with the gradients of one training step: the file and line, why, and the fix.

    A function is called traced, a second time if the first call shows no error: some faults need two steps. It may
    return its loss (shape [], or a mapping or object with a `loss`): then backward is run on it here, and every
    `.grad` is left as it was found. Or it calls backward, and the optimizer, itself. Of a tensor only its graph is
    known: which parameters it reaches, not where it was cut; `remarks` of the result says so.

    Args:
        loss_or_step: a function without arguments, or a loss.
        model: its parameters are asked for a gradient; by default modules that the function refers to.
        optimizer: what it holds is asked for a gradient; by default one that the function refers to.
        into: installed packages that count as your own code.
        notes: also tell of breaks that do no harm.

    Returns:
        The findings, most certain first; a list that prints itself.

    Raises:
        UsageError: an argument does not fit: no loss and no function, a function that needs arguments or gives no
            loss, a model of which nothing was computed, an optimizer without parameters, gradients switched off.
        Exception: what the step raised, where that has nothing to do with gradients.
    """
    return examine(loss_or_step, model, optimizer, into=into, notes=notes).findings


@dataclass(frozen=True, slots=True)
class Examined:
    """What a traced step showed.

    Args:
        findings: what was found.
        states: of each parameter of the model that requires a gradient, by FQN: "ok", "none", "zero" or "nonfinite".
    """

    findings: Findings
    states: dict[str, str]


def examine(
    loss_or_step: Any,
    model: Module | None,
    optimizer: Optimizer | None,
    *,
    into: Sequence[str] = (),
    notes: bool = False,
    calls: int = _CALLS,
) -> Examined:
    """Do what `explain` does, and tell the state of each gradient as well.

    Args:
        loss_or_step: see `explain`, as the four that follow.
        model: as there.
        optimizer: as there.
        into: as there.
        notes: as there.
        calls: call the function at most so many times.
    """
    check(model, optimizer)
    if not torch.is_grad_enabled():
        raise UsageError(
            "gradients are switched off where explain() is called",
            why="torch.no_grad() or torch.inference_mode() is in force",
            fix="call it outside of that block",
        )
    if isinstance(loss_or_step, Tensor):
        stack = Frames(into, script()).stack()
        return Examined(of_graph(loss_or_step, model, optimizer, stack, folder()), {})
    step = _checked(loss_or_step)
    if model is None and optimizer is None:
        model, optimizer = _referred(step)
    return _Step(step, model, optimizer, into, notes).run(calls)


def _checked(step: Any) -> Callable[[], Any]:
    fix = "pass a loss, or a function without arguments: gradctl.explain(lambda: loss_fn(model(x), y), model)"
    if isinstance(step, Module):
        raise UsageError(f"a model ({type(step).__name__}) is not a training step", fix=fix)
    if not callable(step):
        raise UsageError(f"explain() was given a {type(step).__name__}", why="it is no tensor and no function", fix=fix)
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        raise UsageError("the step cannot be called without arguments", why=str(error), fix=fix) from None
    except ValueError:
        pass  # a builtin that tells no signature
    return step


def _referred(step: Callable[[], Any]) -> tuple[Module | None, Optimizer | None]:
    """Return the one model and the one optimizer that a function refers to, None where there is none or a choice."""
    function = inspect.unwrap(step)
    try:
        variables = inspect.getclosurevars(getattr(function, "__func__", function))
    except (TypeError, ValueError):
        return None, None
    values = [*variables.nonlocals.values(), *variables.globals.values()]
    owner = getattr(function, "__self__", None)
    if owner is not None:
        values += [owner, *vars(owner).values()] if hasattr(owner, "__dict__") else [owner]
    modules = list(
        {id(v): v for v in values if isinstance(v, Module) and next(v.parameters(), None) is not None}.values()
    )
    optimizers = list({id(v): v for v in values if isinstance(v, Optimizer)}.values())
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    outer = [module for module in modules if id(module) not in inner]
    return outer[0] if len(outer) == 1 else None, optimizers[0] if len(optimizers) == 1 else None


class _Step:
    """One call of `explain` with a function."""

    def __init__(
        self,
        step: Callable[[], Any],
        model: Module | None,
        optimizer: Optimizer | None,
        into: Sequence[str],
        notes: bool,
    ) -> None:
        self._step = step
        self._model = model
        self._optimizer = optimizer
        self._tracing = Tracing(into=into, script=script(), notes=notes)
        self._facts = self._tracing.context.facts

    def run(self, calls: int) -> Examined:
        tracing = self._tracing
        error: Exception | None = None
        found: list[Finding] = []
        tracing.start()
        try:
            name_parameters(tracing, self._model)
            for _ in range(calls):
                try:
                    number = self._call()
                except UsageError:
                    raise
                except Exception as raised:
                    error, number = raised, None
                found = tracing.findings(error) if number is None else [number]
                if error is not None or any(f.severity == "error" for f in found):
                    break
            states = self._states()
        finally:
            tracing.stop()
        if error is not None and not any(f.severity != "note" for f in found):
            if is_gradient_error(error):
                error.add_note("gradctl.explain has found no cause for this error")
            raise error
        if error is None:
            self._check_model()
        remarks = [f"the tracer switched itself off: {fault}" for fault in tracing.faults]
        return Examined(Findings(found, remarks=remarks, folder=tracing.context.folder, subject="this step"), states)

    def _call(self) -> Finding | None:
        """Run the step, and backward if that is left to do; return a finding where there is no loss to run it on."""
        facts = self._facts
        backwards, steps = self._backwards(), facts.steps
        result = self._step()
        if self._backwards() == backwards:
            loss = _loss_of(result)
            if not isinstance(loss, Tensor):
                return self._not_a_loss(loss)
            with _GradsKept(loss):
                loss.backward()
                self._ask()
        elif facts.steps == steps:
            self._ask()
        return None

    def _backwards(self) -> int:
        return self._facts.generation + sum(1 for b in self._facts.backwards if not b.accumulates)

    def _ask(self) -> None:
        """Ask for the gradients, as the step of an optimizer would."""
        if self._optimizer is not None:
            self._tracing.ask(self._optimizer)
        if self._model is not None:
            self._tracing.ask_leaves(list(self._model.parameters()))

    def _not_a_loss(self, value: Any) -> Finding:
        """Return the line at which the loss became a number.

        Raises:
            UsageError: what the step returned was never a tensor, as far as the trace knows.
        """
        for escape in reversed(self._facts.escapes):
            if escape.result is not None and escape.result is value and escape.stack:
                context = self._tracing.context
                return Finding(
                    slug="loss_not_tensor",
                    severity="error",
                    symptom=f"the step returned a {type(value).__name__}, which has no backward()",
                    why=f"the loss became a plain number here ({escape.kind.strip('_')}), and numbers have no history",
                    fix="return the tensor, and take its number for the log only",
                    confidence=0.95,
                    primary=context.span(site(escape.stack[0])),
                    evidence=tuple(context.span(site(entry), "called from") for entry in escape.stack[1:3]),
                )
        raise UsageError(
            f"the step returned {'nothing' if value is None else f'a {type(value).__name__}'} and called no backward()",
            fix="return the loss as a tensor, or call backward() in the step",
        )

    def _parameters(self) -> list[tuple[str, Tensor, ParameterFacts | None]]:
        if self._model is None:
            return []
        known = self._facts.parameters
        return [(name, p, known.get(id(p))) for name, p in self._model.named_parameters() if p.requires_grad]

    def _states(self) -> dict[str, str]:
        return {name: _state(facts) for name, _, facts in self._parameters()}

    def _check_model(self) -> None:
        """Refuse a model of which nothing was computed, where other leaves were reached."""
        params = self._parameters()
        if not params or any(facts is not None and facts.reached for _, _, facts in params):
            return
        mine = {id(p) for _, p, _ in params}
        others = sum(1 for key, facts in self._facts.parameters.items() if facts.reached and key not in mine)
        unused = all(
            facts is None or (facts.explained and facts.explained[-1][1] == "unused") for _, _, facts in params
        )
        if others and unused:
            raise UsageError(
                f"the step computes nothing with this {type(self._model).__name__}",
                what=f"it reaches {others} other {'leaf' if others == 1 else 'leaves'} and none of its parameters",
                why="another model (a copy, or one that was built anew) is trained",
                fix="pass the model that the step uses",
            )


def _state(facts: ParameterFacts | None) -> str:
    if facts is None or not facts.reached:
        return "none"
    norm = facts.norm
    if norm is None:
        return "ok"
    return "zero" if norm == 0.0 else "ok" if norm - norm == 0.0 else "nonfinite"


def _loss_of(result: Any) -> Any:
    """Return the loss in what a step returned: itself, or its `loss`."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and "loss" in result:
        return result["loss"]
    return getattr(result, "loss", result)


class _GradsKept:
    """While it is entered the leaves behind a loss have no gradient; afterwards they have what they had before."""

    def __init__(self, loss: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            function = grad_fn_of(loss)
            leaves = walk([function])[0] if function is not None else [loss] if loss.requires_grad else []
            self._kept = [(leaf, leaf.grad) for leaf in leaves]

    def __enter__(self) -> None:
        with torch._C.DisableTorchFunction():
            for leaf, _ in self._kept:
                leaf.grad = None

    def __exit__(self, *exc: object) -> None:
        with torch._C.DisableTorchFunction():
            for leaf, grad in self._kept:
                leaf.grad = grad
