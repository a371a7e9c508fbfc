"""Runs programs under one tool, each in a fork of one process that has loaded torch already; see `explain_peers.py`.

    python explain_peers_child.py TOOL FOLDER ANSWERS.json

FOLDER holds the programs and `cases.json`: a list of `{"name": ..., "check": ...}`. What the tool said about each of
them goes to ANSWERS.json. It runs under the interpreter of gradctl or under that of the peers, and imports neither
unless TOOL is theirs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

TIMEOUT_SECONDS = 60
Answer = dict[str, Any]


# -- what Python and torch say ----------------------------------------------------------------------------------------


def plain(script: Path, check: str, *, anomaly: bool = False) -> Answer:
    """Run a script; the answer is the innermost line of the user in what Python prints at its end.

    In anomaly mode torch prints a second traceback, of the forward call behind the failing function; where there is
    one, its innermost line of the user is the answer. A script that ends well may still have been warned: then the
    lines of the warnings are hints.
    """
    told: list[tuple[str, str, int]] = []
    warnings.showwarning = lambda message, category, file, line, *_: told.append((str(message), file, line))
    torch.autograd.set_detect_anomaly(anomaly)
    error = _run(script)
    told = [(text.partition(" (Triggered")[0], file, line) for text, file, line in told]
    forward = [text for text, _, _ in told if "Traceback of forward call" in text]
    if forward:
        frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', forward[0])]
    elif error is not None:
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    else:
        frames = []
    return {
        "places": _own(script, frames)[-1:],
        "hints": _own(script, [(file, line) for _, file, line in told]) if error is None else [],
        "texts": [_words(error)] if error is not None else [text for text, _, _ in told],
    }


def _own(script: Path, frames: list[tuple[str, int]]) -> list[list[Any]]:
    """Return the places that lie in the user's files."""
    return [[Path(file).name, line] for file, line in frames if Path(file).parent == script.parent]


def gradctl(script: Path, check: str) -> Answer:
    """Trace a script from its first line on, as the child of `gradctl explain --full` does."""
    from gradctl._explain import Tracing

    tracing = Tracing(script=str(script))
    tracing.start()
    try:
        error = _run(script)
        findings = [finding.to_json() for finding in tracing.findings(error)]
    finally:
        tracing.stop()
    return {
        "places": [[f["primary"]["file"], f["primary"]["line"]] for f in findings if f["primary"]],
        "texts": [f["symptom"] for f in findings],
        "causes": [f["slug"] for f in findings],
        "faults": list(tracing.faults),
    }


def _run(script: Path) -> BaseException | None:
    """Run a script as `__main__`; return what it raised."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException as error:
        return error
    return None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# -- guardtower -------------------------------------------------------------------------------------------------------


class _Reached(BaseException):
    """Carries the loss out of the script at its first backward()."""


class Script:
    """A script that is run statement by statement, in a module of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.statements = ast.parse(path.read_text(encoding="utf-8")).body
        module = types.ModuleType("__main__")
        module.__file__ = str(path)
        sys.modules["__main__"] = module
        self.names: dict[str, Any] = module.__dict__

    def execute(self, first: int, last: int) -> None:
        """Run the statements from `first` up to, not including, `last`."""
        for statement in self.statements[first:last]:
            exec(compile(ast.Module([statement], []), str(self.path), "exec"), self.names)

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the optimizers that have a name at the top of the script."""
        return {name: value for name, value in self.names.items() if isinstance(value, Optimizer)}

    def model(self, optimizer: Optimizer | None) -> nn.Module | None:
        """Return what a person would hand to a tool as "the model".

        The modules with a name at the top of the script that have a parameter in the optimizer; all modules with
        parameters where there are none of these. Several of them are put into one ModuleDict.
        """
        named = {name: value for name, value in self.names.items() if isinstance(value, nn.Module)}
        inner = {id(child) for each in named.values() for child in list(each.modules())[1:]}
        outer: dict[int, tuple[str, nn.Module]] = {}
        for name, each in named.items():
            if id(each) not in inner and any(True for _ in each.parameters()):
                outer.setdefault(id(each), (name, each))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        found = [pair for pair in outer.values() if any(id(p) in held for p in pair[1].parameters())]
        found = found or list(outer.values())
        if len(found) < 2:
            return found[0][1] if found else None
        return nn.ModuleDict(dict(found))

    def signature(self) -> list[Any]:
        """Return what changes when the script makes or changes a model or an optimizer."""
        modules = [value for value in self.names.values() if isinstance(value, nn.Module)]
        states = [(id(p), p.requires_grad) for module in modules for p in module.parameters()]
        return [*map(id, modules), *map(id, self.optimizers().values()), *states]


def _at_backward(call: Callable[[Any], None]) -> Callable[[], None]:
    """Let `call` have the loss before each backward(); return what puts torch back."""
    method, function = Tensor.backward, torch.autograd.backward

    def of_tensor(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        call(self)
        return method(self, *args, **kwargs)

    def of_tensors(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        call(tensors if isinstance(tensors, Tensor) else next(iter(tensors)))
        return function(tensors, *args, **kwargs)

    def put_back() -> None:
        Tensor.backward, torch.autograd.backward = method, function  # type: ignore[method-assign]

    Tensor.backward, torch.autograd.backward = of_tensor, of_tensors  # type: ignore[method-assign,assignment]
    return put_back


def probe(path: Path, check: str) -> Answer:
    """Run a whole script and say where its step is: which statements set up, and which compute the first loss.

    The step is the top-level statement in which the first backward() runs, or that raises before any; where that is a
    bare call it is every statement since the last one that made or changed a model or an optimizer.
    """
    script = Script(path)
    found: dict[str, int] = {}
    steppers: list[Optimizer] = []
    position, changed = 0, 0
    _at_backward(lambda loss: found.setdefault("backward", position) and None)
    register_optimizer_step_pre_hook(lambda optimizer, *_: steppers.append(optimizer))
    error: BaseException | None = None
    before = script.signature()
    for position in range(len(script.statements)):
        try:
            script.execute(position, position + 1)
        except BaseException as raised:
            error = raised
            found.setdefault("backward", position)
            break
        after = script.signature()
        if after != before and "backward" not in found:
            changed = position + 1
        before = after
    step = found.get("backward")
    if step is None:
        return {"step": None}
    alone = isinstance(script.statements[step], (ast.For, ast.While, ast.With, ast.Try, ast.If))
    stepper = next((name for name, each in script.optimizers().items() if steppers and each is steppers[0]), None)
    model = script.model(script.names.get(stepper) if stepper else next(iter(script.optimizers().values()), None))
    return {
        "begin": step if alone else min(changed, step),
        "step": step,
        "optimizer": stepper,
        "error": _words(error) if error is not None else None,
        "concerned": _concerned(check, script.names, model) if error is None and model is not None else [],
    }


def _concerned(check: str, names: dict[str, Any], model: nn.Module) -> list[str]:
    """Return the parameters that the label's check, a Python expression over the finished script, calls unsound.

    It is a conjunction; a part with `is not None`, `> 0` or `is False` says what is sound, one that begins with `len(`
    how many there are: these are left out. In the others every expression that is a parameter or a module counts.
    """
    if not check:
        return []
    tree = ast.parse(check, mode="eval").body
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    ids: set[int] = set()
    for part in parts:
        if re.search(r"is not None|> 0$|is False|^len\(", ast.unparse(part)):
            continue
        for node in ast.walk(part):
            if not isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
                continue
            try:
                value = eval(compile(ast.Expression(node), "check", "eval"), dict(names))
            except Exception:  # a variable of a comprehension, or the None of a missing gradient
                continue
            if isinstance(value, nn.Parameter):
                ids.add(id(value))
            elif isinstance(value, nn.Module) and not _is_prefix(node, part):
                ids |= {id(param) for param in value.parameters()}
    return [name for name, param in model.named_parameters() if id(param) in ids]


def _is_prefix(node: ast.expr, part: ast.expr) -> bool:
    """Whether a longer expression of `part`, other than `.parameters`, begins with `node`."""
    for other in ast.walk(part):
        if isinstance(other, (ast.Attribute, ast.Subscript)) and other.value is node:
            return not (isinstance(other, ast.Attribute) and other.attr == "parameters")
    return False


def guardtower(path: Path, check: str) -> Answer:
    """Attach guardtower as its README does, once model and optimizer exist: `audit(model, closure, optimizer=...)`."""
    import guardtower as tool  # type: ignore[import-not-found]

    where = _in_fork(lambda: probe(path, check))
    if where.get("step") is None:
        return {"places": [], "unattachable": "no backward() is reached", "findings": []}
    script = Script(path)
    script.execute(0, where["begin"])
    optimizer = script.names.get(where["optimizer"]) if where["optimizer"] else None
    optimizer = optimizer or next(iter(script.optimizers().values()), None)
    model = script.model(optimizer)
    if model is None:
        return {"places": [], "unattachable": "no module at the top of the script before its step", "findings": []}
    unreached: list[bool] = []

    def closure() -> Any:
        def reached(loss: Tensor) -> None:
            raise _Reached(loss)

        put_back = _at_backward(reached)
        try:
            script.execute(where["begin"], where["step"] + 1)
        except _Reached as found:
            return found.args[0]
        finally:
            put_back()
        unreached.append(True)
        return None

    report = tool.audit(model, closure, optimizer=optimizer)
    if unreached:
        return {"places": [], "unattachable": "the closure came to no backward()", "findings": []}
    findings = [
        {
            "check": finding.check,
            "level": finding.severity.label,
            "id": finding.catalog_id,
            "text": finding.message,
            "params": list(finding.details.get("params", ())),
        }
        for finding in report.findings
    ]
    return {"places": [], "findings": findings, "error": where["error"], "concerned": where["concerned"]}


# -- forks ------------------------------------------------------------------------------------------------------------

TOOLS: dict[str, Callable[[Path, str], Answer]] = {
    "plain": plain,
    "anomaly": lambda script, check: plain(script, check, anomaly=True),
    "gradctl": gradctl,
    "guardtower": guardtower,
}


def _in_fork(work: Callable[[], Answer]) -> Answer:
    """Do the work in a child whose output nobody sees; return its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.alarm(TIMEOUT_SECONDS)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            try:
                answer = work()
            except BaseException:
                answer = {"places": [], "failed": traceback.format_exc()[-2000:]}
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe, default=str)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"places": [], "failed": f"ended without an answer ({TIMEOUT_SECONDS} s?)"}


def main() -> None:
    tool, folder, answers = sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[3])
    sys.dont_write_bytecode = True
    sys.path[0] = str(folder)  # the programs import what lies beside them
    os.chdir(folder)
    torch.set_num_threads(1)
    if tool == "gradctl":
        from gradctl._explain.rules import every_rule

        every_rule()  # loads every rule, which a trace does at its end
    # What a first step imports, without a backward: no engine may exist at a fork.
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()
    found: dict[str, Answer] = {}
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        script = folder / f"{case['name']}.py"
        sys.argv = [str(script)]
        found[case["name"]] = _in_fork(lambda script=script, case=case: TOOLS[tool](script, case["check"]))
    answers.write_text(json.dumps({"torch": torch.__version__, "answers": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
