"""What a backward is looked at for: the leaves that it reached, and the graphs of earlier ones that live on."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradctl._explain._held import TINY, largest
from gradctl._lineage._tracer import grad_fn_of

_MARK = "gradctl_passed"
_REMEMBER = 64
_EVERY = 16
_DEEPEST = 4000
_LEAST_PASSES = 3


class Token:
    """Lives exactly as long as the graph function that it was laid into."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Leaf:
    """A leaf that backwards reach.

    Args:
        ref: weak reference to it.
        shape: its shape.
        is_parameter: whether it is an nn.Parameter.
        passes: how many of the backwards that were looked at have reached it.
        held: whether an optimizer that stepped since then holds it.
        state: "zero" or "nonfinite" when its gradient was that, each time it was looked at; else "ok".
        name: its FQN, if anything names it.
    """

    ref: weakref.ref[Tensor]
    shape: tuple[int, ...]
    is_parameter: bool
    passes: int = 0
    held: bool = False
    state: str = ""
    name: str | None = None


class Passages:
    """The backwards of one program.

    Attributes:
        count: how many there were.
        looked: how many of them were looked at.
        kept: the largest number of earlier graphs that were alive at one time.
        leaves: the leaves that they reached, by id.
    """

    def __init__(self) -> None:
        self.count = 0
        self.looked = 0
        self.kept = 0
        self.leaves: dict[int, Leaf] = {}
        self._tokens: deque[weakref.ref[Token]] = deque(maxlen=_REMEMBER)

    def begun(self, outputs: Sequence[Any], *, look: bool) -> tuple[list[Tensor], set[Any]]:
        """Note a backward that is about to begin.

        Args:
            outputs: its roots.
            look: walk its whole graph.

        Returns:
            The leaves that it can reach and the functions that it can run; empty without `look`.
        """
        self.count += 1
        roots = [fn for output in outputs if isinstance(output, Tensor) and (fn := grad_fn_of(output)) is not None]
        if self.count <= 2 * _REMEMBER or self.count % _EVERY == 0:
            self.kept = max(self.kept, self.kept_now())
            for root in roots[:1]:
                self._lay_token(root)
        return walk(roots) if look else ([], set())

    def ended(self, leaves: Sequence[Tensor]) -> None:
        """Look at the gradients that a backward has left.

        Args:
            leaves: what it could reach.
        """
        self.looked += 1
        there = [leaf for leaf in leaves if leaf.grad is not None]
        for leaf, size in zip(there, largest([leaf.grad for leaf in there if leaf.grad is not None]), strict=True):
            known = self.leaves.get(id(leaf))
            if known is None or known.ref() is not leaf:
                known = Leaf(weakref.ref(leaf), tuple(leaf.shape), isinstance(leaf, Parameter))
                self.leaves[id(leaf)] = known
            known.passes += 1
            state = "ok" if size is None or TINY < size < float("inf") else "zero" if size <= TINY else "nonfinite"
            if known.state != state:
                both = (state, known.state)
                known.state = state if not known.state else "nonfinite" if "nonfinite" in both else "ok"

    def kept_now(self) -> int:
        """Return how many of the graphs of earlier backwards are still alive."""
        return sum(1 for token in self._tokens if token() is not None)

    def hold(self, ids: Iterable[int]) -> None:
        """Note which leaves an optimizer that has just stepped holds.

        Args:
            ids: of all that it holds.
        """
        for key in ids:
            leaf = self.leaves.get(key)
            if leaf is not None and leaf.ref() is not None:
                leaf.held = True

    def trained_by_nobody(self) -> list[Leaf]:
        """Return the leaves that backwards reach again and again and that no optimizer holds."""
        # A plain tensor that comes once is an input whose gradient is wanted; one that stays is trained, or should be.
        least = min(_LEAST_PASSES, self.looked)
        return [leaf for leaf in self.leaves.values() if not leaf.held and (leaf.is_parameter or leaf.passes >= least)]

    def _lay_token(self, root: Any) -> None:
        """Leave a token in the deepest function below a root: it stays when any value above it is kept."""
        function = root
        for _ in range(_DEEPEST):
            below = [following for following, _ in function.next_functions if following is not None]
            inner = next((following for following in below if getattr(following, "variable", None) is None), None)
            if inner is None:
                break
            function = inner
        metadata = function.metadata
        if metadata.get(_MARK) is None:
            token = metadata[_MARK] = Token()
            self._tokens.append(weakref.ref(token))


def walk(roots: Sequence[Any]) -> tuple[list[Tensor], set[Any]]:
    """Return the leaves behind some graph functions, and every function behind them, these included."""
    seen: set[Any] = set(roots)
    stack = list(roots)
    leaves: list[Tensor] = []
    while stack:
        function = stack.pop()
        leaf = getattr(function, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
            continue
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, seen
