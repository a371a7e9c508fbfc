"""What rules look at: the facts of a traced run, and the questions that several of them ask."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

import torch

from gradctl._lineage import Facts, Node, OptimizerFacts, ParameterFacts, Site, Stack, Tracer, path, site, upstream
from gradctl._names import NameBook
from gradctl._results import Severity, Span


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rule found, before it is ranked against the others.

    Args:
        slug: the cause.
        place: the line; None where there is none (then the confidence is low).
        symptom: what goes wrong, in one line, with a number.
        why: the chain from the line to the symptom, in one or two sentences.
        fix: what to change; code where a line of code mends it. Empty: the standard fix of the slug.
        confidence: from 0 to 1. Below `THRESHOLD` it is shown with --notes only.
        severity: "error" (broken), "warning" (look at it), "note" (harmless, most likely).
        evidence: `(place, role)` pairs.
        parameters: ids of the parameters concerned.
        node, leaf, root: for the path line: from `leaf` through `node` to the loss `root`. Where a rule leaves out the
            ends, `chain` looks for them.
        left, back: for a value that left autograd at `node`: through what, and the value that was made of it again.
        explains: what it explains: "error" (the exception), or a symptom ("none", "zero", "nonfinite", "wiring",
            "order", "memory", "wrong"). Of several candidates for one parameter and symptom only the best is shown.
    """

    slug: str
    place: Site | None
    symptom: str
    why: str
    fix: str = ""
    confidence: float = 0.9
    severity: Severity = "error"
    evidence: tuple[tuple[Site | None, str], ...] = ()
    parameters: tuple[int, ...] = ()
    node: Node | None = None
    leaf: Node | None = None
    root: Node | None = None
    left: str = ""
    back: Node | None = None
    explains: str = "none"
    measured: dict[str, float] | None = None


THRESHOLD = 0.5


@dataclass(slots=True)
class Context:
    """The facts, and who is who in them.

    Args:
        tracer: the tracer, stopped or not; rules only read it.
        error: what ended the program, or None.
        finished: whether the program came to its end (so that "never" means never).
        folder: the script's folder; places below it are written relative to it.
        book: names parameters.
    """

    tracer: Tracer
    error: BaseException | None = None
    finished: bool = True
    folder: str = ""
    book: NameBook = field(default_factory=NameBook)
    _names: dict[int, str] = field(default_factory=dict[int, str])

    @contextlib.contextmanager
    def looking(self) -> Generator[None]:
        """While rules look: no function mode of the program sees us, and nothing is recorded."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            yield

    @property
    def facts(self) -> Facts:
        """The facts of the run."""
        return self.tracer.facts

    @property
    def message(self) -> str:
        """The text of the error; empty when there was none."""
        return "" if self.error is None else str(self.error)

    @property
    def last_step(self) -> int:
        """Number of the last optimizer step, from 0; -1 when there was none."""
        return self.facts.steps - 1

    def held(self) -> dict[int, OptimizerFacts]:
        """Return the ids of the parameters that optimizers held at their last steps, with the optimizer."""
        found: dict[int, OptimizerFacts] = {}
        for optimizer in self.facts.optimizers.values():
            for key in optimizer.held:
                found[key] = optimizer
        return found

    def parameters(self) -> list[tuple[int, ParameterFacts]]:
        """Return the leaves by their ids; most programs drop their model before they end, so they may be gone."""
        return list(self.facts.parameters.items())

    def is_hand_written(self, parameter: ParameterFacts) -> bool:
        """Whether the program itself writes that parameter as it trains: an average of weights, a target network."""
        return parameter.hand_written * 5 >= max(len(parameter.states), 1)

    def name(self, key: int) -> str | None:
        """Return the FQN of a leaf by its id, if anything that we may read names it."""
        return self._names.get(key)

    def name_all(self, keys: Iterable[int]) -> None:
        """Look for the names of these leaves, all at once (a search costs milliseconds)."""
        wanted = [
            (key, tensor)
            for key in keys
            if key not in self._names
            and (facts := self.facts.parameters.get(key)) is not None
            and (tensor := facts.ref()) is not None
        ]
        if not wanted:
            return
        naming = self.book.names_for([tensor for _, tensor in wanted])
        for (key, _), name in zip(wanted, naming.names, strict=True):
            if name is not None:
                self._names[key] = name

    def ids_on_path(self, candidate: Candidate) -> set[int]:
        """Return the ids of the leaves at which the path of a candidate begins."""
        return {key for node in chain(self, candidate)[0][:1] if node.leaf and (key := self.key_of(node)) is not None}

    def key_of(self, node: Node) -> int | None:
        """Return the id of the leaf that a node stands for."""
        tensor = node.tensor()
        if tensor is not None:
            return id(tensor)
        return next((key for key, facts in self.facts.parameters.items() if facts.node is node), None)

    def span(self, place: Site, role: str = "") -> Span:
        """Return a place as findings write it: relative to the script's folder where it lies below it.

        A line that is told as the library's begins with the name of the package.
        """
        path = os.path.abspath(place.file) if not place.file.startswith("<") else place.file
        if role == "library":
            return Span(re.split(r"(?:site|dist)-packages[/\\]", path)[-1], place.line, role)
        folder = self.folder.rstrip(os.sep) + os.sep if self.folder else ""
        return Span(path[len(folder) :] if folder and path.startswith(folder) else path, place.line, role)


def chain(context: Context, candidate: Candidate) -> tuple[list[Node], list[Node], bool]:
    """Return the values from a leaf to the candidate's node, those behind it, and whether they end at a loss.

    Behind a value that left autograd, they begin where it came back.
    """
    node = candidate.node
    if node is None:
        return [], [], False
    leaf = candidate.leaf
    below = path(node, leaf) if leaf is not None else []
    if not below:
        behind = {id(at) for at in upstream([node])}
        starts = (
            facts.node for key in candidate.parameters if (facts := context.facts.parameters.get(key)) is not None
        )
        leaf = next((start for start in starts if id(start) in behind), None)
        below = path(node, leaf) if leaf is not None else [node]
    begin = candidate.back if candidate.left else node
    if begin is None:
        return below, [], False
    above = path(candidate.root, begin) if candidate.root is not None else []
    backwards = [b for b in reversed(context.facts.backwards) if b.accumulates] if not above else []
    for root in (root for backward in backwards for root in backward.roots):
        above = path(root, begin)
        if above:
            break
    return below, above if candidate.left else above[1:], bool(above)


def place(stack: Stack, depth: int = 0) -> Site | None:
    """Return the user line of a stack: the innermost, or `depth` callers further out."""
    return site(stack[depth]) if len(stack) > depth else None


def count(number: int, what: str) -> str:
    """Return "1 parameter", "3 parameters"."""
    return f"{number} {what}" + ("" if number == 1 else "s")
