"""Which import slots of the loaded ELF objects are bound to one C++ symbol, read from memory with ctypes.

An object that calls a function of another object does so through a word of its own, which the loader fills with the
function's address. The words are found as the loader finds them: dynamic section, symbols, relocations. Another
thread may unload an object at any time: none is read that is not pinned.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Kinds of relocation that fill a word with a function's address: GLOB_DAT and JUMP_SLOT.
_RELOCATIONS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_STRSZ, _DT_JMPREL = 2, 5, 6, 7, 8, 10, 23
_SYMBOL_BYTES = _RELA_BYTES = 24
_RTLD_DI_LINKMAP, _RTLD_LAZY, _RTLD_NOLOAD = 2, 1, 4


class _Info(ctypes.Structure):
    """dl_phdr_info."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("num_headers", ctypes.c_uint16),
        ("adds", ctypes.c_uint64),
        ("subs", ctypes.c_uint64),
        ("later_fields", ctypes.c_char * 464),
    )


class _LinkMap(ctypes.Structure):
    """The public part of link_map."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("dynamic", ctypes.c_uint64),
        ("following", ctypes.c_uint64),
    )


class _Place(ctypes.Structure):
    """Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_uint64),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_uint64),
    )


_Visit = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class LoadedObject:
    """An executable or shared library in memory.

    Args:
        base: what is added to the addresses in the file.
        name: its path; empty for the executable.
        dynamic: address of the dynamic section.
    """

    base: int
    name: str
    dynamic: int


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
        libc, libc_unlocked = ctypes.PyDLL(None), ctypes.CDLL(None)
        try:
            self._iterate, copy = libc["dl_iterate_phdr"], libc["memmove"]
            self._dlinfo, self._dladdr = libc["dlinfo"], libc["dladdr"]
            # These wait for a library that another thread is loading, whose initialisation may want the interpreter.
            self._dlopen, self._dlclose = libc_unlocked["dlopen"], libc_unlocked["dlclose"]
        except AttributeError as error:
            raise Unreadable(f"this system's loader cannot be asked: {error}") from error
        self._dlopen.restype = ctypes.c_void_p
        self._dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._dlclose.argtypes = [ctypes.c_void_p]
        self._dlinfo.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        self._dladdr.argtypes = [ctypes.c_size_t, ctypes.c_void_p]
        # The visit runs while the loader's lock is held. Neither may the interpreter's lock be let go in between (a
        # thread that imports an extension holds that one and waits for the other: hence PyDLL and PYFUNCTYPE) nor may
        # a signal handler run. So no line of Python is in it: memmove(info, record, size), which also returns non-zero,
        # and that ends the iteration: the counters are the same in every object's record.
        self._info = _Info()
        copy.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        copy.restype = ctypes.c_int
        self._visit = _Visit(functools.partial(copy, ctypes.addressof(self._info)))
        self._scanned: dict[tuple[LoadedObject, str], tuple[int, ...]] = {}
        self.counters()

    def counters(self) -> tuple[int, int]:
        """Return how many objects were ever loaded and unloaded; it changes whenever `objects` may have changed.

        Raises:
            Unreadable: the loader does not count.
        """
        self._iterate(self._visit, None)
        if not self._info.adds:
            raise Unreadable("the loader does not say when a library was loaded")
        return self._info.adds, self._info.subs

    def pin(self, name: str) -> tuple[LoadedObject, int] | None:
        """Keep a loaded object in memory.

        Args:
            name: its path; empty for the executable.

        Returns:
            The object and a handle for `unpin`, or None if no such object is loaded.
        """
        handle = self._dlopen(os.fsencode(name) or None, _RTLD_LAZY | _RTLD_NOLOAD)
        if not handle:
            return None
        at = ctypes.c_uint64()
        if self._dlinfo(handle, _RTLD_DI_LINKMAP, ctypes.byref(at)) or not at.value:
            self.unpin(handle)
            return None
        it = _LinkMap.from_address(at.value)
        return LoadedObject(it.base, name, it.dynamic), handle

    def unpin(self, handle: int) -> None:
        """Let the object go; it is unloaded here if its program has let it go too."""
        self._dlclose(handle)

    def owns(self, loaded: LoadedObject, address: int) -> bool:
        """Whether an address lies inside of an object."""
        place = _Place()
        return bool(self._dladdr(address, ctypes.byref(place))) and place.base == loaded.base

    def slots(self, symbol: str, loaded: LoadedObject) -> tuple[int, ...]:
        """Return the addresses of the words through which `loaded`, which must be pinned, calls `symbol`."""
        key = (loaded, symbol)
        if key not in self._scanned:
            self._scanned[key] = tuple(_scan(loaded, symbol.encode(), self._kinds))
        return self._scanned[key]

    def forget(self, alive: set[LoadedObject]) -> None:
        """Drop what is remembered of objects that are no longer loaded."""
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
