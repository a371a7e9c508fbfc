"""What one thread has done, in order, while its steps are watched; and how long a stretch of them is."""

from __future__ import annotations

from gradctl._record._forms import LONGEST, Op
from gradctl._record._marks import Marks
from gradctl._record._places import Stand

_TRIM = 4 * LONGEST


class Lane:
    """The operations of one thread.

    `marks` are those of each optimizer after the last operation that is known; `pending` are the places of the
    backwards since the last step.
    """

    __slots__ = (
        "after",
        "begin",
        "clip",
        "fetched",
        "grads",
        "inside",
        "marks",
        "ops",
        "pending",
        "scale",
        "scaling",
        "stack",
        "stepped",
        "trimmed",
        "unscaled",
    )

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.trimmed = 0
        self.begin: dict[int, int] = {}
        self.after: dict[int, str] = {}
        self.marks: dict[int, Marks] = {}
        self.unscaled: dict[int, int] = {}
        self.pending: list[int] = []
        self.stack: tuple[Stand, ...] = ()
        self.inside = self.scaling = 0
        self.grads = False
        self.fetched = -1
        self.scale: float | None = None
        self.clip: tuple[float | None, float, float | None] | None = None
        self.stepped: int | None = None

    def add(self, op: Op) -> None:
        """Append an operation; of very many only the last are kept."""
        self.ops.append(op)
        if len(self.ops) > _TRIM:
            del self.ops[:LONGEST]
            self.trimmed += LONGEST

    def group(self, key: int) -> list[Op] | None:
        """Return what came since the last step of the optimizer with that `id`; None if it was too much."""
        begin = self.begin.get(key, 0) - self.trimmed
        if begin < 0 or len(self.ops) - begin > LONGEST:
            return None
        return self.ops[begin:]

    def close(self, key: int, how: str) -> None:
        """Begin the next group of an optimizer after what ended its last one: `step` or `skip`."""
        self.begin[key] = self.trimmed + len(self.ops)
        self.after[key] = how
        self.pending.clear()
        self.clip = None


class Stretch:
    """How many steps are watched before the watching stops.

    Args:
        first: the first stretch of the run, which is longer.
        clean: `id` of the optimizer whose step has just ended; None if nothing has happened yet. Of the others the
            first group is a part only.
    """

    __slots__ = ("_counts", "clean", "first")

    FIRST, LATER = 12, 3
    LONG = 64

    def __init__(self, *, first: bool, clean: int | None) -> None:
        self.first = first
        self._counts: dict[int, int] = {}
        self.clean = clean

    def counts(self, key: int) -> bool:
        """Count a step of the optimizer with that `id`; return whether its group is whole."""
        known = self._counts.get(key, 0)
        self._counts[key] = known + 1
        return known > 0 or self.clean is None or self.clean == key

    @property
    def over(self) -> bool:
        """Whether enough was seen."""
        most, total = max(self._counts.values(), default=0), sum(self._counts.values())
        if total >= self.LONG:
            return True
        if self.first:
            return total >= self.FIRST and min(self._counts.values()) >= 3
        return most >= self.LATER
