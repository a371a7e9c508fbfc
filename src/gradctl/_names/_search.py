"""One request for names: the three looks, the choice between modules, and the prefixes that keep names apart."""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import Module

from gradctl._names._modules import Tree, all_modules, class_name, is_parameter, modules_of, outermost, tree_of
from gradctl._names._variables import Surroundings, look_around

How = Literal["registration", "scan", "none"]

_SHARE = 0.01
_FIRST_LOOKS = 8
_RIVALS = 64


@dataclass(slots=True)
class Naming:
    """The names found for one list of tensors.

    Args:
        names: one FQN per tensor, None where nothing that we may read holds it.
        how: "registration" if every named tensor was found through the registration hooks, "scan" if a variable or a
            scan was needed, "none" if no tensor could be named.
        roots: class name of each outermost module that gave names, and how many; most names first.
        seconds: what the search cost.
        aliases: the further names of tied parameters, by the name in `names`.
    """

    names: list[str | None]
    how: How
    roots: list[tuple[str, int]]
    seconds: float = 0.0
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


class _Known(NamedTuple):
    param: weakref.ref[Tensor]
    name: str
    registered: bool
    aliases: tuple[str, ...]
    root: str


class Memory:
    """What a book remembers between requests; weak references only."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.known: dict[int, _Known] = {}
        self.prefixes: dict[int, tuple[weakref.ref[Module], str]] = {}
        self.looks = 0
        self.look_seconds = 0.0
        self.scan_seconds = 0.0
        self._born = time.perf_counter()
        self._modules: dict[int, weakref.ref[Module]] = {}
        self._prune_at = 4096

    def remember(self, module: Module) -> None:
        """Remember a module that has just been given a parameter or a submodule."""
        known = self._modules.get(id(module))
        if known is None or known() is not module:
            self._modules[id(module)] = weakref.ref(module)
            if len(self._modules) > self._prune_at:
                for key, reference in list(self._modules.items()):
                    if reference() is None:
                        self._modules.pop(key, None)
                self._prune_at = max(4096, 2 * len(self._modules))

    def note(self, fault: Exception) -> None:
        """Keep the text of a fault of ours."""
        if len(self.faults) < 10:
            self.faults.append(f"{type(fault).__name__}: {fault}")

    def forget(self) -> None:
        """Drop everything that refers to the program."""
        self._modules.clear()
        self.known.clear()
        self.prefixes.clear()

    def registered(self) -> list[Module]:
        """Return the remembered modules that are alive, oldest first."""
        alive = [reference() for reference in list(self._modules.values())]
        return [module for module in alive if module is not None]

    def prefix_of(self, root: Module) -> str | None:
        """Return what stands before the names of `root`, None if it has not given any."""
        known = self.prefixes.get(id(root))
        return known[1] if known is not None and known[0]() is root else None

    def may_look(self) -> bool:
        """Whether reading variables stays within its share of the time since the start."""
        return self.looks < _FIRST_LOOKS or self.look_seconds <= _SHARE * (time.perf_counter() - self._born)

    def may_scan(self) -> bool:
        """Whether another scan of all objects stays within its share; the first is free."""
        return not self.scan_seconds or self.scan_seconds <= _SHARE * (time.perf_counter() - self._born)


def search(memory: Memory, params: Sequence[Tensor], given: Sequence[str | None] | None) -> Naming:
    """Name `params`; see `NameBook.names_for`."""
    request = _Request(memory, params)
    request.recall()
    if request.missing():
        request.find()
    if request.missing():
        request.name_bare_tensors(given)
    return request.answer()


def module_names(memory: Memory) -> dict[int, str]:
    """Name the modules below every root that gave names; see `NameBook.modules`."""
    found: dict[int, str] = {}
    for reference, prefix in list(memory.prefixes.values()):
        root = reference()
        if root is not None:
            for path, module in modules_of(root):
                found.setdefault(id(module), prefix + path if path else prefix[:-1] or class_name(root))
    return found


class _Request:
    def __init__(self, memory: Memory, params: Sequence[Tensor]) -> None:
        self._memory = memory
        self._params = params
        self._wanted = {id(param): param for param in params}
        self._names: dict[int, str] = {}
        self._aliases: dict[int, tuple[str, ...]] = {}
        self._roots: Counter[str] = Counter()
        self._registered = True
        self._surroundings: Surroundings | None = None

    def missing(self) -> list[int]:
        return [key for key in self._wanted if key not in self._names]

    def recall(self) -> None:
        for key, param in self._wanted.items():
            known = self._memory.known.get(key)
            if known is not None and known.param() is param:
                self._take(key, known)

    def find(self) -> None:
        candidates = self._memory.registered()
        self._read(candidates, registered=True)
        if self.missing():
            candidates += self._look().modules
            self._read(candidates, registered=False)
        missing = self.missing()
        # Parameters that are all variables of the program need no module to be named.
        bare = all(key in self._look().variables for key in missing) if missing else True
        if not bare and any(is_parameter(self._wanted[key]) for key in missing) and self._memory.may_scan():
            begin = time.perf_counter()
            candidates += all_modules()
            self._memory.scan_seconds += time.perf_counter() - begin
            self._read(candidates, registered=False)

    def name_bare_tensors(self, given: Sequence[str | None] | None) -> None:
        missing = self.missing()
        offered = {id(p): n for p, n in zip(self._params, given or (), strict=False) if n}
        look = self._look()
        # `for w in weights:` leaves `w` behind: a variable names a tensor only where variables name them all.
        first, second = look.variables, look.held
        if not all(key in first for key in missing):
            first, second = second, first
        taken = set(self._names.values())
        for key in missing:
            name = offered.get(key) or first.get(key) or second.get(key)
            if name and name not in taken:
                taken.add(name)
                self._take(key, _Known(weakref.ref(self._wanted[key]), name, False, (), ""))

    def answer(self) -> Naming:
        names = [self._names.get(id(param)) for param in self._params]
        how: How = "none" if not self._names else "registration" if self._registered else "scan"
        aliases = {self._names[key]: others for key, others in self._aliases.items() if others}
        return Naming(names, how, self._roots.most_common(), aliases=aliases)

    def _look(self) -> Surroundings:
        if self._surroundings is None:
            self._surroundings = Surroundings()
            if self._memory.may_look():
                begin = time.perf_counter()
                self._surroundings = look_around(sys._getframe(1))
                self._memory.looks += 1
                self._memory.look_seconds += time.perf_counter() - begin
        return self._surroundings

    def _take(self, key: int, known: _Known) -> None:
        self._names[key] = known.name
        self._aliases[key] = known.aliases
        self._registered = self._registered and known.registered
        if known.root:
            self._roots[known.root] += 1

    def _read(self, candidates: list[Module], *, registered: bool) -> None:
        """Name what is missing from the outermost of `candidates`: the best covered first, then the smallest."""
        missing = set(self.missing())
        trees: list[Tree] = []
        holding, others = outermost(list({id(module): module for module in candidates}.values()), missing)
        # The others only tell whether a name is taken: those that gave names first, and not all of a large population.
        others.sort(key=lambda root: self._memory.prefix_of(root) is None)
        for root in holding + others[:_RIVALS]:
            try:
                trees.append(tree_of(root, registered=registered))
            except Exception as fault:
                self._memory.note(fault)
        trees.sort(key=lambda tree: (-len(missing & tree.names.keys()), len(tree.names)))
        giving: list[Tree] = []
        for tree in trees:
            tree.gives = [key for key in tree.names if key in missing]
            missing.difference_update(tree.gives)
            if tree.gives:
                giving.append(tree)
        for tree, prefix in zip(giving, self._choose_prefixes(giving, trees), strict=True):
            self._accept(tree, prefix)

    def _accept(self, tree: Tree, prefix: str) -> None:
        memory, root = self._memory, class_name(tree.root)
        for param in tree.params:
            aliases = tuple(prefix + other for other in tree.aliases.get(id(param), ()))
            name = prefix + tree.names[id(param)]
            known = _Known(weakref.ref(param), name, tree.registered, aliases, root)
            memory.known[id(param)] = known
        for key in tree.gives:
            self._take(key, memory.known[key])
        memory.prefixes[id(tree.root)] = (weakref.ref(tree.root), prefix)
        for table in (memory.known, memory.prefixes):
            for key in [key for key, entry in table.items() if entry[0]() is None]:
                del table[key]

    def _choose_prefixes(self, giving: list[Tree], trees: list[Tree]) -> list[str]:
        """Say what stands before the names of each tree, so that no name means two trained parameters."""
        counts = Counter(name for tree in giving for name in {tree.names[key] for key in tree.gives})
        taken = {prefix for root, prefix in self._memory.prefixes.values() if root() is not None}
        prefixes: list[str] = []
        for tree in giving:
            prefix = self._memory.prefix_of(tree.root)
            if prefix is None:
                own = {tree.names[key] for key in tree.gives}
                rivals = [other for other in trees if _shares_a_name(other, tree, own)]
                prefix = ""
                if any(counts[name] > 1 for name in own) or (rivals and self._is_trained(rivals, tree)):
                    label = self._look().labels.get(id(tree.root)) or class_name(tree.root)
                    number, prefix = 1, f"{label}."
                    while prefix in taken:
                        number += 1
                        prefix = f"{label}#{number}."
            taken.add(prefix)
            prefixes.append(prefix)
        return prefixes

    def _is_trained(self, rivals: list[Tree], tree: Tree) -> bool:
        """Whether a rival gave names before, or an optimizer among the variables holds a parameter of it alone."""
        if any(self._memory.prefix_of(rival.root) is not None for rival in rivals):
            return True
        optimized = self._look().optimized - tree.names.keys()
        return any(not optimized.isdisjoint(rival.names) for rival in rivals)


def _shares_a_name(other: Tree, tree: Tree, own: set[str]) -> bool:
    """Whether `other` calls a parameter that `tree` does not hold by one of the names `own`."""
    return other is not tree and any(name in own and key not in tree.names for key, name in other.names.items())
