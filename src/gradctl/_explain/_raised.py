"""The exception that ended the program: its message, its frames, what was known of the torch call that raised it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from gradctl._explain._context import Context
from gradctl._explain._source import source_of
from gradctl._lineage import ErrorFacts, Node, Site, Stack, site


@dataclass(frozen=True, slots=True)
class Raised:
    """One exception of the chain that ended the program.

    Args:
        error: the exception.
        facts: what the tracer noted when a torch call raised it; None if it did not come from one.
        frames: `(frame, lasti)` of its traceback, outermost first, libraries included.
        stack: the user's frames among them, innermost first.
        certainty: 1 for the exception itself, less for one that it was raised from.
    """

    error: BaseException
    facts: ErrorFacts | None
    frames: tuple[tuple[FrameType, int], ...]
    stack: Stack
    certainty: float

    @property
    def message(self) -> str:
        """Its text."""
        return str(self.error)

    @property
    def here(self) -> Site | None:
        """The innermost line of the user that it passed."""
        return site(self.stack[0]) if self.stack else None

    @property
    def root(self) -> Node | None:
        """The first tensor of the call that raised; for a backward the loss."""
        return self.facts.nodes[0] if self.facts is not None and self.facts.nodes else None

    @property
    def frame(self) -> FrameType | None:
        """The frame of that line."""
        if not self.stack:
            return None
        code = self.stack[0][0]
        return next((frame for frame, _ in reversed(self.frames) if frame.f_code is code), None)

    @property
    def callers(self) -> tuple[tuple[Site | None, str], ...]:
        """The user's lines further out, as evidence."""
        return tuple([(site(entry), "called") for entry in self.stack[1:4]])


def raised(context: Context, *texts: str) -> Raised | None:
    """Return the first exception of the chain whose message holds one of `texts` (in any case)."""
    for depth, error in enumerate(_chain(context.error)):
        message = str(error).lower()
        if any(text.lower() in message for text in texts):
            return _raised(context, error, 1.0 if depth == 0 else 0.9)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen and len(seen) < 8:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _raised(context: Context, error: BaseException, certainty: float) -> Raised:
    frames: list[tuple[FrameType, int]] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lasti))
        trace = trace.tb_next
    is_user = context.tracer.frames.is_user
    stack = tuple([(frame.f_code, lasti) for frame, lasti in reversed(frames) if is_user(frame.f_code.co_filename)])
    noted = context.facts.error
    facts = noted if noted is not None and noted.error is error else None
    if not stack and facts is not None:
        stack = facts.stack
    return Raised(error, facts, tuple(frames), stack, certainty)


def value_in(frame: FrameType, expression: ast.AST) -> Any:
    """Return what a name, attribute or constant index stands for in a frame, without running code of the program.

    Raises:
        LookupError: it cannot be told.
    """
    if isinstance(expression, ast.Name):
        for names in (frame.f_locals, frame.f_globals):
            if expression.id in names:
                return names[expression.id]
        raise LookupError(expression.id)
    if isinstance(expression, ast.Attribute):
        return attribute(value_in(frame, expression.value), expression.attr)
    if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
        holder = value_in(frame, expression.value)
        if type(holder) in (list, tuple, dict):
            try:
                return holder[expression.slice.value]
            except (TypeError, KeyError, IndexError) as error:
                raise LookupError(expression.slice.value) from error
    raise LookupError(ast.dump(expression)[:80])


def attribute(holder: Any, name: str) -> Any:
    """Return an attribute that lies in an object's dictionary, or in those of a module; properties are not run.

    Raises:
        LookupError: there is none.
    """
    own: Mapping[str, Any] = getattr(holder, "__dict__", {})
    if name in own:
        return own[name]
    for registry in ("_parameters", "_buffers", "_modules"):
        inside = own.get(registry)
        if isinstance(inside, dict) and name in inside:
            return inside[name]
    for cls in type(holder).__mro__:
        if name in vars(cls) and not isinstance(vars(cls)[name], property):
            return vars(cls)[name]
    raise LookupError(name)


def receiver(raised: Raised, method: str) -> ast.expr | None:
    """Return the expression whose method of that name the innermost user line calls."""
    if not raised.stack:
        return None
    source = source_of(raised.stack[0])
    statement = source.statement(raised.stack[0]) if source is not None else None
    if statement is None:
        return None
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and node.attr == method:
            return node.value
    return None
