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
_LOOKS = 3


class SlotUnusable(EngineFailed):
    """Why the native engine cannot be used here."""


@dataclass(slots=True)
class _Slot:
    word: Any  # c_size_t at the slot
    address: int
    owner: LoadedObject
    protection: int | None  # of its page, when it cannot be written as it is
    before: int  # what the word held when it was turned


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
            self._mprotect = libc["mprotect"]
        except (Unreadable, AttributeError, OSError) as error:
            raise SlotUnusable(str(error)) from error
        self._mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        _check_replacement(self._answer_no)
        self._torch = os.path.realpath(os.path.dirname(torch.__file__)) + os.sep
        self._counters = (0, 0)
        self._slots: list[_Slot] = []
        self._pins: dict[LoadedObject, int] = {}
        self._probe = Probe()
        self._refresh()
        if not any(self._is_permanent(slot.owner) for slot in self._slots):
            raise SlotUnusable("torch's libraries do not import TensorImpl::requires_grad")

    def words(self) -> dict[int, int]:
        """Return what stands in the slots that may be read now, by address."""
        return {slot.address: slot.word.value for slot in self._slots if self._is_safe(slot.owner)}

    def libraries(self) -> list[str]:
        """Return the paths of the libraries whose slots these are."""
        return sorted({slot.owner.name for slot in self._slots})

    def shut(self) -> None:
        """Answer "no" through every slot, those of libraries loaded since the last call too; may be repeated.

        Raises:
            SlotUnusable: something unexpected stands in a slot; `open` puts back those that were changed.
        """
        self._refresh()
        for slot in self._slots:
            if not (self._is_safe(slot.owner) or self._pin(slot.owner)):
                continue  # unloaded since
            now = slot.word.value
            if now == self._answer_no:
                continue
            if now != self._truth and not self._loader.owns(slot.owner, now):
                raise SlotUnusable(f"an import slot of {slot.owner.name} holds an address that is not torch's")
            # A slot that is bound at its first call points into its own library until then. What is put back is what
            # the loader would write into it.
            slot.before = self._truth
            self._write(slot, self._answer_no)

    def open(self) -> None:
        """Put back what stood in every slot, where what stands there is still ours; may be repeated."""
        for slot in self._slots:
            if self._is_safe(slot.owner) and slot.word.value == self._answer_no:
                self._write(slot, slot.before)
        while self._pins:
            self._loader.unpin(self._pins.popitem()[1])

    def remove(self) -> None:
        """Do nothing: between `open` and `shut` nothing stands anywhere."""

    def records(self) -> bool:
        """Whether an operation records a graph now."""
        return self._probe.records()

    def _is_permanent(self, owner: LoadedObject) -> bool:
        return owner.name.startswith(self._torch)  # torch's own libraries are never unloaded

    def _is_safe(self, owner: LoadedObject) -> bool:
        """Whether the owner's memory may be touched: an extension's page must stay while its word is ours."""
        return owner in self._pins or self._is_permanent(owner)

    def _pin(self, owner: LoadedObject) -> bool:
        pinned = self._loader.pin(owner.name)
        if pinned is None:
            return False
        if pinned[0] != owner:
            self._loader.unpin(pinned[1])
            return False
        self._pins[owner] = pinned[1]
        return True

    def _refresh(self) -> None:
        """Find the slots again if a library was loaded or unloaded since the last time."""
        try:
            for _ in range(_LOOKS):
                counters = self._loader.counters()
                if counters == self._counters:
                    return
                self._look()
                self._counters = counters
        except (Unreadable, OSError) as error:
            raise SlotUnusable(str(error)) from error

    def _look(self) -> None:
        memory = _Memory()
        known = {slot.address: slot for slot in self._slots}
        found = {slot.address: slot for slot in self._slots if self._is_safe(slot.owner)}
        alive: set[LoadedObject] = set()
        for name in memory.files():
            if os.path.basename(name).startswith("libtorch_python"):
                continue
            pinned = self._loader.pin(name)
            if pinned is None:
                continue
            owner, handle = pinned
            try:
                alive.add(owner)
                for address in self._loader.slots(REQUIRES_GRAD, owner):
                    if address % 8:
                        raise SlotUnusable(f"an import slot of {owner.name} is not aligned")
                    old = known.get(address)
                    if old is None or old.owner != owner:
                        word = ctypes.c_size_t.from_address(address)
                        old = _Slot(word, address, owner, memory.protection_if_not_writable(address), self._truth)
                    found[address] = old
            finally:
                self._loader.unpin(handle)
        self._loader.forget(alive)
        self._slots = list(found.values())

    def _write(self, slot: _Slot, value: int) -> None:
        if slot.protection is None:
            slot.word.value = value
            return
        page = slot.address & ~(mmap.PAGESIZE - 1)
        if self._mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise SlotUnusable(f"the kernel does not let an import slot be written (errno {ctypes.get_errno()})")
        slot.word.value = value
        self._mprotect(page, mmap.PAGESIZE, slot.protection)


class _Memory:
    """What the kernel says is mapped where."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, int]] = []
        self._files: dict[str, None] = {"": None}  # the executable, by the loader's name for it
        self._read()

    def _read(self) -> None:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                low, high = (int(end, 16) for end in fields[0].split("-"))
                self._spans.append((low, high, _as_protection(fields[1])))
                if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
                    self._files[fields[5].removesuffix(" (deleted)")] = None

    def files(self) -> list[str]:
        """Return every file that is mapped to be executed, libraries among them."""
        return list(self._files)

    def protection_if_not_writable(self, address: int) -> int | None:
        """Return the protection of the page at `address`, or None when it can be written; its library is pinned.

        The map is read anew: what was read before the library was pinned may tell of another one that lay there, and a
        page that is closed by mistake afterwards takes the process down when its library is unloaded.
        """
        self._spans.clear()
        self._read()
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
