"""Which import slots of the loaded ELF objects are bound to one C++ symbol, read from memory with ctypes.

An object that calls a function of another object does so through a word of its own, which the loader fills with the
function's address. The words are found as the loader finds them: program headers, dynamic section, relocations.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Kinds of relocation that fill a word with a function's address: GLOB_DAT and JUMP_SLOT.
_RELOCATIONS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}
_PT_DYNAMIC = 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_STRSZ, _DT_JMPREL = 2, 5, 6, 7, 8, 10, 23
_SYMBOL_BYTES = _RELA_BYTES = 24
_ADDS_OFFSET = 32  # dlpi_adds and dlpi_subs follow the four fields of _Info


class _Header(ctypes.Structure):
    """Elf64_Phdr."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("vaddr", ctypes.c_uint64),
        ("paddr", ctypes.c_uint64),
        ("filesz", ctypes.c_uint64),
        ("memsz", ctypes.c_uint64),
        ("align", ctypes.c_uint64),
    )


class _Info(ctypes.Structure):
    """The fields of dl_phdr_info that every system has."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_Header)),
        ("num_headers", ctypes.c_uint16),
    )


# Called while the loader's lock is held: the interpreter's lock must not be let go in between, for a thread that
# imports an extension holds the second and waits for the first. PyDLL and PYFUNCTYPE keep it.
_Visit = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Info), ctypes.c_size_t, ctypes.c_void_p)
_VisitAddress = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class LoadedObject:
    """An executable or shared library in memory.

    Args:
        base: what is added to the addresses in the file.
        name: its path; empty for the executable.
        dynamic: address of the dynamic section, or 0.
        span: lowest and highest address of its segments.
    """

    base: int
    name: str
    dynamic: int
    span: tuple[int, int]


class Unreadable(Exception):
    """This machine's objects cannot be read in this way."""


class Loader:
    """The dynamic loader of this process.

    Raises:
        Unreadable: another processor or another loader than the ones we know.
    """

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _RELOCATIONS or struct.calcsize("P") != 8:
            raise Unreadable(f"relocations of {machine} are not known")
        self._kinds = _RELOCATIONS[machine]
        try:
            self._iterate = ctypes.PyDLL(None)["dl_iterate_phdr"]
        except AttributeError as error:
            raise Unreadable("this system has no dl_iterate_phdr") from error
        self._counts = (0, 0)
        self._count_visit = _VisitAddress(self._count)
        self._scanned: dict[tuple[LoadedObject, str], tuple[int, ...]] = {}
        self.counters()

    def _count(self, info: int, size: int, _: int) -> int:
        # The same numbers stand in every object's record, so the first one will do.
        if size >= _ADDS_OFFSET + 16:
            self._counts = struct.unpack("<2Q", ctypes.string_at(info + _ADDS_OFFSET, 16))
        return 1

    def counters(self) -> tuple[int, int]:
        """Return how many objects were ever loaded and unloaded; it changes whenever `objects` may have changed.

        Raises:
            Unreadable: the loader does not count.
        """
        self._counts = (0, 0)
        self._iterate(self._count_visit, None)
        if not self._counts[0]:
            raise Unreadable("the loader does not say when a library was loaded")
        return self._counts

    def objects(self) -> list[LoadedObject]:
        """Return every object loaded now."""
        found: list[LoadedObject] = []

        def visit(info: ctypes._Pointer[_Info], size: int, _: int | None) -> int:  # pyright: ignore[reportUnusedParameter]
            it = info.contents
            headers = [it.headers[i] for i in range(it.num_headers)]
            dynamic = next((it.base + h.vaddr for h in headers if h.kind == _PT_DYNAMIC), 0)
            loads = [(it.base + h.vaddr, it.base + h.vaddr + h.memsz) for h in headers if h.kind == 1]
            span = (min(low for low, _ in loads), max(high for _, high in loads)) if loads else (0, 0)
            name = (it.name or b"").decode(errors="surrogateescape")
            found.append(LoadedObject(it.base, name, dynamic, span))
            return 0

        self._iterate(_Visit(visit), None)
        return found

    def slots(self, symbol: str, loaded: LoadedObject) -> tuple[int, ...]:
        """Return the addresses of the words through which `loaded` calls `symbol`."""
        key = (loaded, symbol)
        if key not in self._scanned:
            self._scanned[key] = tuple(_scan(loaded, symbol.encode(), self._kinds))
        return self._scanned[key]

    def forget(self, still_loaded: list[LoadedObject]) -> None:
        """Drop what is remembered of objects that are no longer loaded."""
        alive = set(still_loaded)
        self._scanned = {key: slots for key, slots in self._scanned.items() if key[0] in alive}


def _scan(loaded: LoadedObject, symbol: bytes, kinds: tuple[int, int]) -> Iterator[int]:
    tags = _dynamic_tags(loaded)

    def address(tag: int) -> int:
        value = tags.get(tag, 0)  # the loader has added the base already, except in read-only dynamic sections
        return value if not value or value >= loaded.base else value + loaded.base

    strings, symbols = address(_DT_STRTAB), address(_DT_SYMTAB)
    if not (strings and symbols):
        return
    text = ctypes.string_at(strings, tags.get(_DT_STRSZ, 0))
    names = set(_occurrences(text, symbol + b"\0"))  # linkers may store a name as the tail of a longer one
    if not names:
        return
    is_ours: dict[int, bool] = {}
    for table, size in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
        if not address(table):
            continue
        raw = ctypes.string_at(address(table), tags.get(size, 0) // _RELA_BYTES * _RELA_BYTES)
        words = memoryview(raw).cast("Q").tolist()
        for place, info in zip(words[::3], words[1::3], strict=True):
            if info & 0xFFFFFFFF not in kinds:
                continue
            index = info >> 32
            if index not in is_ours:
                name = ctypes.c_uint32.from_address(symbols + index * _SYMBOL_BYTES).value
                is_ours[index] = name in names
            if is_ours[index]:
                yield loaded.base + place


def _dynamic_tags(loaded: LoadedObject) -> dict[int, int]:
    tags: dict[int, int] = {}
    at = loaded.dynamic
    while at:
        tag, value = struct.unpack("<qQ", ctypes.string_at(at, 16))
        if tag == 0:
            break
        tags[tag] = value
        at += 16
    return tags


def _occurrences(text: bytes, part: bytes) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
