"""The facts of a traced run: what happened, in order. Nothing here judges."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from gradctl._lineage._frames import Stack
from gradctl._lineage._node import Node, Region

GradState = Literal["none", "zero", "ok", "nonfinite"]


class Escape(NamedTuple):
    """A value with history became a Python number or a numpy array.

    `result` is the number itself (kept, so that its identity stays its own), None for arrays and lists.
    """

    node: Node
    kind: str
    stack: Stack
    generation: int
    seq: int
    result: Any
    live: bool


class Mutation(NamedTuple):
    """An in-place operation raised the version of a tensor.

    `through_data`: the tensor was obtained by `.data`; `tensor_id` is then the id of the one whose `.data` it is.
    """

    storage: int
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    before: int
    after: int
    stack: Stack
    op: str
    generation: int
    seq: int
    in_optimizer: bool
    through_data: bool
    tensor_id: int


class DataEdit(NamedTuple):
    """A value was changed through `.data`: in place (`op`), or by assigning to `.data`."""

    op: str
    stack: Stack
    seq: int


class FlagChange(NamedTuple):
    """`requires_grad` of a tensor was changed from outside; `own`: the call of gradctl that did it, None for others."""

    tensor_id: int
    ref: weakref.ref[Tensor]
    to: bool
    stack: Stack
    generation: int
    seq: int
    own: str | None = None


class Placement(NamedTuple):
    """A parameter or a module was set as an attribute of a module.

    `key` is the id of the value; `before` is what stood there until then, None where nothing did.
    """

    owner: weakref.ref[Any]
    name: str
    value: weakref.ref[Any]
    before: weakref.ref[Any] | None
    stack: Stack
    seq: int
    key: int


class HookFacts(NamedTuple):
    """A hook was registered on a tensor; `code` is its function's. `after`: it runs once a gradient has accumulated."""

    tensor_id: int
    node: Node
    code: CodeType | None
    after: bool
    stack: Stack


class GradEvent(NamedTuple):
    """Something other than backward touched a `.grad`.

    kind: "set" (assigned a tensor), "none" (assigned None), "edit" (changed in place), "zero_grad" (of an optimizer or
    module: the ids of the parameters in `ids`), "read".
    sources: for "set" and "edit", whose gradients the new value (the other operands) came from, with the order of the
    newest reading; None if unknown.
    thread: identifier of the thread that did it.
    own: whether a call of gradctl did it, which the program means.
    """

    kind: str
    ids: frozenset[int]
    op: str
    stack: Stack
    generation: int
    seq: int
    value: int
    sources: dict[int, int] | None = None
    thread: int = 0
    own: bool = False


@dataclass(slots=True)
class ParameterFacts:
    """What became of the gradient of one leaf.

    Attributes:
        ref: weak reference to it.
        node: its node.
        is_parameter: whether it is an nn.Parameter.
        reached: number of backward calls that delivered a gradient to it.
        states: `(step, state)` at each step of an optimizer that holds it, oldest dropped after 4,000.
        first_reached: generation of the first gradient.
        explained: at which steps it was without a gradient and what the lineage said then: `(step, kind, node)`,
            kind as `_walk.why_unreached` returns it.
        hand_written: number of in-place changes by the user after the first step, none of them by an optimizer.
        norm: rough size of the last gradient that flowed to it (see `_numbers.magnitude`), with numerics only.
        killers: what kept its gradient away since it last had one: by kind the first hit and for how many backwards.
        last_reached, last_reached_seq: generation of the last gradient, and the order of the backward that brought it.
    """

    ref: weakref.ref[Tensor]
    node: Node
    is_parameter: bool
    reached: int = 0
    states: deque[tuple[int, GradState]] = field(default_factory=lambda: deque(maxlen=4000))
    first_reached: int | None = None
    explained: list[tuple[int, str, Any]] = field(default_factory=list)
    hand_written: int = 0
    norm: float | None = None
    last_reached: int = -1
    last_reached_seq: int = -1
    killers: dict[str, Any] = field(default_factory=dict)
    requires_grad: bool = True
    of_library: bool = False


@dataclass(slots=True)
class OptimizerFacts:
    """An optimizer: where it was made, what it held at its last step.

    `uncleared` lists steps, counted from 0, that used gradients which the step before had used already, and whose.
    """

    ref: weakref.ref[Any]
    stack: Stack
    seq: int
    name: str
    held: frozenset[int] = frozenset()
    empty_groups: tuple[int, ...] = ()
    steps: int = 0
    last_grads: dict[int, int] = field(default_factory=dict)
    last_step_seq: int = -1
    last_step_stack: Stack = ()
    last_step_generation: int = -1
    step_seqs: deque[int] = field(default_factory=lambda: deque[int](maxlen=512))
    uncleared: list[tuple[int, Stack, frozenset[int]]] = field(default_factory=list[tuple[int, Stack, frozenset[int]]])


class Joining(NamedTuple):
    """How a parameter came to stand where it stands: it, or a module above it, was set as an attribute of a module.

    `replaced`: what stood there before is, or was, held by an optimizer. `trained`: such a leaf was in the same tree of
    modules already.
    """

    kind: Literal["parameter", "module"]
    stack: Stack
    seq: int
    replaced: bool
    trained: bool


class Hidden(NamedTuple):
    """An attribute of a module that an optimizer trains holds a leaf which `parameters()` does not list.

    Attributes:
        owner: class of the module.
        name: the attribute.
        kind: class of what it holds.
        layers: whether there are modules in it.
        buffer: whether it is a buffer.
        derived: whether it holds a result computed from the leaf, not the leaf.
        direct: whether it is a tensor itself, not a container.
        asleep: whether there is one module in it, and that not in training mode.
        mapping: whether it is a dict.
    """

    owner: type
    name: str
    kind: str
    layers: bool
    buffer: bool
    derived: bool
    direct: bool
    asleep: bool
    mapping: bool


@dataclass(slots=True)
class Stranger:
    """A leaf that a backward reached when no optimizer held it.

    Attributes:
        parameter: its facts.
        is_parameter: whether it is an nn.Parameter.
        joinings: how it came to its place, newest first, the parameter's own before those of modules above it.
        in_trained_tree: whether a module that owns it, or one above that, owns a leaf that an optimizer holds too.
        hidden: where it hangs without being registered.
        stack: where it was made.
        born: order of its first registration; without one, of when it was first seen.
        like: class of its owner, name and shape.
        placed: number of placements when this was asked.
    """

    parameter: ParameterFacts
    is_parameter: bool
    joinings: tuple[Joining, ...]
    in_trained_tree: bool
    hidden: tuple[Hidden, ...]
    stack: Stack
    born: int
    like: tuple[Any, ...]
    placed: int


@dataclass(slots=True)
class Taken:
    """A line came between the last backward and the step, which therefore lacks gradients.

    Attributes:
        kind: "cleared", "zeroed" (an edit or assignment left zeros), "replaced" (by what does not come from this step's
            gradient), "discarded" (cleared before the next microbatch, at the same backward line).
        event: the last such event.
        optimizer: whose step it was.
        stack: where that optimizer steps.
        keys: ids of the leaves.
        count: number of steps.
        foreign: whether what replaced them came from gradients, and from those of other leaves only.
        whole: number of steps of which no gradient was left.
        at: the optimizer's own step numbers from 0, the last 50.
    """

    kind: str
    event: GradEvent
    optimizer: OptimizerFacts
    stack: Stack
    keys: set[int] = field(default_factory=set[int])
    count: int = 0
    whole: int = 0
    foreign: bool = False
    at: list[int] = field(default_factory=list[int])


class Held(NamedTuple):
    """A container as the program names it: `curve` in the function `code`, `self.curve` of an `owner`."""

    name: str
    owner: type | None
    code: CodeType | None
    bounded: bool


@dataclass(slots=True)
class Kept:
    """Values of one line whose graphs of several steps were alive at the same time.

    Attributes:
        node: the newest.
        chained: whether one value holds them all (a running sum), not a container of values.
        count: number of backwards whose graphs were alive.
        oldest: generation of the oldest graph.
        seen_at: generation when this was seen last.
        grown: how often it was seen to have grown while nothing old was let go.
        held: the container, if it was found.
    """

    node: Node
    chained: bool
    count: int = 0
    oldest: int = 1 << 62
    seen_at: int = 0
    grown: int = 0
    held: Held | None = None


@dataclass(slots=True)
class Reused:
    """A gradient tensor that was read at one step was used again when it had become the gradient of another step.

    Attributes:
        read: the reading.
        kind: "same" (it met itself in one operation), "stale" (used after it had changed, then read anew), "put back"
            (assigned to `.grad`, where it was already).
        op: the operation that used it.
        stack: where.
        count: how often.
    """

    read: Node
    kind: str
    op: str
    stack: Stack
    count: int = 0
    keys: set[int] = field(default_factory=set[int])


@dataclass(slots=True)
class Shared:
    """Two parameters had gradients in the same memory at a step.

    Attributes:
        optimizer, stack: whose step, and where.
        setting: the assignment that made them so, if one did.
        edit, edits: the last change in place after the assignment, and at how many steps there was one.
        added: at how many steps a backward had added to both.
        count: number of steps.
    """

    optimizer: OptimizerFacts
    stack: Stack
    setting: GradEvent | None
    edit: GradEvent | None = None
    edits: int = 0
    added: int = 0
    count: int = 0


@dataclass(slots=True)
class BackwardFacts:
    """One call of the engine.

    Attributes:
        generation: number of accumulating backwards before it.
        roots: nodes of the outputs.
        stack: user frames.
        accumulates: whether it writes `.grad` (backward), or returns (autograd.grad).
        retain, create_graph: as asked for.
        inputs: nodes of the tensors differentiated with respect to, for autograd.grad.
        leaves: ids of the leaves that the graph reaches.
        step: number of optimizer steps before it.
        seq: order.
        thread: identifier of the thread that called it.
        missing: positions of inputs that came back as None.
        root_sizes: rough size of each output (see `_numbers.magnitude`), with numerics only.
    """

    generation: int
    roots: tuple[Node, ...]
    stack: Stack
    accumulates: bool
    retain: bool
    create_graph: bool
    inputs: tuple[Node, ...]
    step: int
    seq: int
    leaves: frozenset[int] = frozenset()
    thread: int = 0
    missing: tuple[int, ...] = ()
    failed: bool = False
    root_sizes: tuple[float, ...] = ()


@dataclass(slots=True)
class ErrorFacts:
    """A torch call raised, with what is known about its arguments.

    Attributes:
        error: the exception (compared by identity with the one that ended the program).
        op: the operation.
        nodes: nodes of its tensor arguments.
        inference: for each, whether it is an inference tensor.
        stack: user frames.
        backward: the facts of the backward that raised, if it was one.
        graph: for a failed backward, its graph nodes (see `_backward.Graph`), kept until the findings are made.
        modes: grad mode at that moment, and the regions that were open.
    """

    error: BaseException
    op: str
    nodes: tuple[Node, ...]
    inference: tuple[bool, ...]
    stack: Stack
    backward: BackwardFacts | None = None
    graph: Any = None
    grad_enabled: bool = True
    regions: tuple[Region, ...] = ()


@dataclass(slots=True)
class Hit:
    """What the numeric probe found at one function of a backward graph.

    Attributes:
        kind: "nonfinite" (finite in, NaN or inf out), "zero" (something in, exactly zero out), "tiny" (below 1e-18),
            "none" (something in, nothing out).
        function: name of the autograd function.
        node: the operation of the forward that it belongs to, or that of its consumer.
        magnitude: size of what arrived.
        generation, step: when.
        leaf: id of the leaf that it kept from its gradient.
        detail: `edge` (number of the input; -1: what arrived sums to zero, or a hook emptied it), `size` (what went
            out), `saved` (what the function had saved, see `_probe.look_at_saved`), `dtype` of what went out, `masked`
            (whether all that broke came from a gradient of exactly zero), `empty` (a gradient without entries came in),
            `forward_class` of a custom Function, `after` (what used the output), `others` (further hits of the leaf).
    """

    kind: str
    function: str
    node: Node | None
    magnitude: float
    generation: int
    step: int
    leaf: int | None = None
    detail: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class NonfiniteFacts:
    """The first backward with a NaN or an infinity that was not merely passed over.

    Attributes:
        backward: its facts.
        hit: the function that broke it; None if what arrived from the loss was broken already.
        flags: values of the forward before it that were not finite (see `_forward.Flag`).
        leaves: ids of the leaves that got it.
        step, generation: when.
        largest: the largest finite gradient of that backward.
        growth: the lines that the engine ran most often, with how often, and the largest finite gradient there.
        backwards: further backwards that were broken.
        run: of the last backwards of the same loss, how many were broken without one that was not.
        last: the generation of the last of them.
        first: whether no backward of this loss was whole before.
        steps: optimizer steps that used a broken gradient.
    """

    backward: BackwardFacts
    hit: Hit | None
    flags: list[Any]
    leaves: tuple[int, ...]
    step: int
    generation: int
    largest: float = 0.0
    growth: tuple[tuple[Node, int, float], ...] = ()
    backwards: int = 0
    run: int = 1
    last: int = 0
    first: bool = False
    steps: int = 0


@dataclass(slots=True)
class DeadTerm:
    """A term of a loss that depends on parameters, by the line that makes it.

    Attributes:
        part: its node when it first carried no gradient.
        root: the loss then.
        step: the step then.
        dead: in how many backwards it carried none.
        live: in how many it did.
        run: in how many of the last ones, without a break, it did not.
    """

    part: Node
    root: Node
    step: int
    dead: int = 0
    live: int = 0
    run: int = 0


@dataclass(slots=True)
class Facts:
    """Everything that was heard, newest last; the queues are bounded."""

    escapes: deque[Escape] = field(default_factory=lambda: deque(maxlen=4000))
    mutations: deque[Mutation] = field(default_factory=lambda: deque(maxlen=20000))
    flags: deque[FlagChange] = field(default_factory=lambda: deque(maxlen=20000))
    grad_events: deque[GradEvent] = field(default_factory=lambda: deque(maxlen=4000))
    backwards: deque[BackwardFacts] = field(default_factory=lambda: deque(maxlen=16))
    parameters: dict[int, ParameterFacts] = field(default_factory=dict)
    optimizers: dict[int, OptimizerFacts] = field(default_factory=dict)
    error: ErrorFacts | None = None
    nonfinite: NonfiniteFacts | None = None
    passed: NonfiniteFacts | None = None
    withheld: dict[Any, NonfiniteFacts] = field(default_factory=dict[Any, NonfiniteFacts])
    whole_losses: set[Any] = field(default_factory=set[Any])
    recovered: int = 0
    exploded: NonfiniteFacts | None = None
    over_one: dict[Any, list[Any]] = field(default_factory=dict[Any, "list[Any]"])
    data_sets: deque[tuple[int, Stack, int]] = field(default_factory=lambda: deque(maxlen=1000))
    dead_terms: dict[Any, DeadTerm] = field(default_factory=dict[Any, "DeadTerm"])
    accumulated_into_one: dict[frozenset[int], int] = field(default_factory=dict[frozenset[int], int])
    dead_numbers: dict[Any, Any] = field(default_factory=dict)
    lost_derivatives: dict[Any, Any] = field(default_factory=dict)
    partial_cuts: dict[Any, Any] = field(default_factory=dict)
    breaks: dict[Any, Any] = field(default_factory=dict)
    constants: dict[Any, Any] = field(default_factory=dict)
    data_edits: dict[Any, Any] = field(default_factory=dict)
    kept: dict[Any, Kept] = field(default_factory=dict[Any, Kept])
    step_at: list[int] = field(default_factory=list[int])
    searches: int = 0
    garbage: dict[Any, int] = field(default_factory=dict[Any, int])
    read_by_user: set[int] = field(default_factory=set)
    none_read: tuple[Node, bool, Stack] | None = None
    non_leaf_reads: list[tuple[Node, Stack]] = field(default_factory=list)
    registered: list[Placement] = field(default_factory=list[Placement])
    modules_set: list[Placement] = field(default_factory=list[Placement])
    taken: dict[Any, Taken] = field(default_factory=dict[Any, Taken])
    shared: dict[tuple[int, int], Shared] = field(default_factory=dict[tuple[int, int], Shared])
    reused: dict[Any, Reused] = field(default_factory=dict[Any, Reused])
    hooks: deque[HookFacts] = field(default_factory=lambda: deque[HookFacts](maxlen=500))
    zeroed_by_hook: dict[int, tuple[OptimizerFacts, list[int]]] = field(
        default_factory=dict[int, tuple[OptimizerFacts, list[int]]]
    )
    strangers: dict[int, Stranger] = field(default_factory=dict[int, Stranger])
    differentiated: set[int] = field(default_factory=set[int])
    threads: int = 1
    steps: int = 0
    generation: int = 0
    fired: int = 0
    notes: list[str] = field(default_factory=list)
