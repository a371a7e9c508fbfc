"""The native engine: one word of libtorch_cpu decides for every thread whether an operation records a graph.

libtorch_cpu, and every extension that brings autograd kernels of its own, asks `c10::TensorImpl::requires_grad()`
through one import slot. While gradients are off that slot holds the address of a libc function that returns 0 and
touches nothing, so that every thread, whoever made it, is told "no". Nothing thread-local is written, hence nothing can
be restored wrongly. libtorch_python has a slot of its own, which is left alone: `p.requires_grad` tells the truth.

torch would make this unnecessary with a process-wide flag beside `GradMode::is_enabled`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch

from gradctl._off._elf import LoadedObject, Loader, Unreadable
from gradctl._off._probe import EngineFailed, Probe

REQUIRES_GRAD = "_ZNK3c1010TensorImpl13requires_gradEv"  # bool c10::TensorImpl::requires_grad() const
REPLACEMENT = "pthread_spin_destroy"  # glibc and musl: return 0
_TORCH = os.path.dirname(torch.__file__) + os.sep
_RTLD_NOW, _RTLD_NOLOAD = 2, 4


class SlotUnusable(EngineFailed):
    """Why the native engine cannot be used here."""


@dataclass(slots=True)
class _Slot:
    word: Any  # c_size_t at the slot
    address: int
    owner: LoadedObject
    protection: int | None  # of its page, when it cannot be written as it is
    before: int  # what the word held when it was shut


class Slots:
    """Every import slot of `TensorImpl::requires_grad` but libtorch_python's.

    Raises:
        SlotUnusable: there is none, or something unexpected stands in one, or there is no replacement.
    """

    name: str = "slot"
    why: str | None = None
    gaps: tuple[str, ...] = ()

    def __init__(self) -> None:
        try:
            self._loader = Loader()
            self._truth = _address_of(ctypes.PyDLL(torch._C.__file__), REQUIRES_GRAD)
            libc = ctypes.PyDLL(None, use_errno=True)
            self._answer_no = _address_of(libc, REPLACEMENT)
            self._dlopen, self._dlclose, self._mprotect = libc["dlopen"], libc["dlclose"], libc["mprotect"]
        except (Unreadable, AttributeError, OSError) as error:
            raise SlotUnusable(str(error)) from error
        self._dlopen.restype = ctypes.c_void_p
        self._dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._dlclose.argtypes = [ctypes.c_void_p]
        self._mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        _check_replacement(self._answer_no)
        self._counters = (0, 0)
        self._slots: list[_Slot] = []
        self._extensions: list[str] = []
        self._pins: list[int] = []
        self._probe = Probe()
        self._refresh()
        if not any(slot.owner.name.startswith(_TORCH) for slot in self._slots):
            raise SlotUnusable("torch's libraries do not import TensorImpl::requires_grad")

    def words(self) -> dict[int, int]:
        """Return what stands in every slot now, by address."""
        return {slot.address: slot.word.value for slot in self._slots}

    def libraries(self) -> list[str]:
        """Return the paths of the libraries whose slots these are."""
        return sorted({slot.owner.name for slot in self._slots})

    def shut(self) -> None:
        """Answer "no" through every slot, those of libraries loaded since the last call too; may be repeated.

        Raises:
            SlotUnusable: something unexpected stands in a slot; `open` puts back those that were changed.
        """
        self._refresh()
        while self._extensions and not self._pins:
            self._pins = [pin for pin in map(self._pin, self._extensions) if pin]
            self._refresh()  # one may have been unloaded before it was pinned
        for slot in self._slots:
            now = slot.word.value
            if now == self._answer_no:
                continue
            if now != self._truth and not self._is_unresolved(slot, now):
                raise SlotUnusable(f"an import slot of {slot.owner.name} holds an address that is not torch's")
            slot.before = self._truth  # what the loader itself would write into a slot it has not yet filled
            self._write(slot, self._answer_no)

    def open(self) -> None:
        """Put back what stood in every slot, where what stands there is still ours; may be repeated."""
        for slot in self._slots:
            if slot.word.value == self._answer_no:
                self._write(slot, slot.before)
        pins, self._pins = self._pins, []
        for pin in pins:
            self._dlclose(pin)

    def remove(self) -> None:
        """Do nothing: between `open` and `shut` nothing stands anywhere."""

    def records(self) -> bool:
        """Whether an operation records a graph now."""
        return self._probe.records()

    def _refresh(self) -> None:
        """Find the slots again if a library was loaded or unloaded since the last time."""
        try:
            self._look()
        except Unreadable as error:
            raise SlotUnusable(str(error)) from error

    def _look(self) -> None:
        while (counters := self._loader.counters()) != self._counters:
            loaded = self._loader.objects()
            self._loader.forget(loaded)
            known = {slot.address: slot for slot in self._slots}
            protections = _Protections()
            found: list[_Slot] = []
            for owner in loaded:
                if os.path.basename(owner.name).startswith("libtorch_python"):
                    continue
                for address in self._loader.slots(REQUIRES_GRAD, owner):
                    old = known.get(address)
                    if old is not None and old.owner == owner:
                        found.append(old)
                    elif address % 8:
                        raise SlotUnusable(f"an import slot of {owner.name} is not aligned")
                    else:
                        word = ctypes.c_size_t.from_address(address)
                        found.append(_Slot(word, address, owner, protections.if_not_writable(address), self._truth))
            self._slots = found
            # torch's own libraries are never unloaded. An extension's page must stay while its word is ours.
            self._extensions = sorted({s.owner.name for s in found if s.owner.name and _TORCH not in s.owner.name})
            pins, self._pins = self._pins, []
            if pins:
                self._pins = [pin for pin in map(self._pin, self._extensions) if pin]
                for pin in pins:
                    self._dlclose(pin)
            self._counters = counters

    def _pin(self, name: str) -> int | None:
        return self._dlopen(os.fsencode(name), _RTLD_NOW | _RTLD_NOLOAD)

    def _is_unresolved(self, slot: _Slot, value: int) -> bool:
        return self._loader.owns(slot.owner, value)  # a slot that is bound at its first call points there until then

    def _write(self, slot: _Slot, value: int) -> None:
        if slot.protection is None:
            slot.word.value = value
            return
        page = slot.address & ~(mmap.PAGESIZE - 1)
        if self._mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise SlotUnusable(f"the kernel does not let an import slot be written (errno {ctypes.get_errno()})")
        slot.word.value = value
        self._mprotect(page, mmap.PAGESIZE, slot.protection)


class _Protections:
    """What the kernel allows at an address; the map is read once."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, int]] | None = None

    def if_not_writable(self, address: int) -> int | None:
        """Return the protection of the page at `address`, or None when it can be written."""
        if self._spans is None:
            self._spans = []
            try:
                with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                    for line in maps:
                        span, flags = line.split(maxsplit=2)[:2]
                        low, high = (int(end, 16) for end in span.split("-"))
                        self._spans.append((low, high, _as_protection(flags)))
            except OSError as error:
                raise SlotUnusable(f"the kernel does not say which memory can be written: {error}") from error
        for low, high, protection in self._spans:
            if low <= address < high:
                return None if protection & mmap.PROT_WRITE else protection
        raise SlotUnusable("an import slot lies outside of the memory of this process")


def _as_protection(flags: str) -> int:
    bits = (("r", mmap.PROT_READ), ("w", mmap.PROT_WRITE), ("x", mmap.PROT_EXEC))
    return sum(bit for letter, bit in bits if letter in flags)


def _address_of(library: ctypes.PyDLL, symbol: str) -> int:
    address = ctypes.cast(library[symbol], ctypes.c_void_p).value
    assert address
    return address


def _check_replacement(address: int) -> None:
    """Call the replacement once: it must return 0 and leave what it is pointed at as it was."""
    canary = (ctypes.c_uint64 * 64)(*([0x5A5A5A5A5A5A5A5A] * 64))
    answer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(address)(ctypes.addressof(canary))
    if answer != 0 or any(word != 0x5A5A5A5A5A5A5A5A for word in canary):
        raise SlotUnusable(f"{REPLACEMENT} of this libc does more than return 0")
