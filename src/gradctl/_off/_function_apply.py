"""How a Python `autograd.Function` stops recording while gradients are off.

libtorch_python decides by itself whether `Function.apply` records, and its import slot is left alone (every
`p.requires_grad` reads it), so `Function.apply` needs an interception of its own. Every bound alias, captured at
whatever time (`silu = Silu.apply`), shares one C method definition, whose function word `native` variants replace by a
trampoline of about 100 bytes: save this thread's grad mode, set it off, call the original, put the mode back. That
catches every alias, every `super().apply` and every thread, costs what `no_grad` costs, and is undone by one word.

A ctypes callback cannot stand there, because it swallows the exception of the user's `forward`. Where executable memory
cannot be had (a hardened kernel, another processor, another system), the class attribute is patched through the tap
instead. torch 2.11 to 2.13 look the attribute up at every call, so only a lookup that starts above the patched class is
missed; from 2.14 on `Function.apply` is C, and aliases captured earlier are missed too. `gap` says which.

torch would make this unnecessary by asking `TensorImpl::requires_grad` through libtorch_cpu in `THPFunction_apply`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch

from gradctl import _taps
from gradctl import _torch_private as private
from gradctl._errors import SwitchFailed
from gradctl._off._probe import Probe

_METH_CLASS = 0x10
_METH_METHOD = 0x200  # passes five arguments; the trampoline forwards four
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE_ANONYMOUS = 0x22

# Assembly beside its bytes; three addresses follow the code: is_enabled, set_enabled, the original.
# Four argument registers are kept, so any calling convention up to METH_CLASS | METH_FASTCALL | METH_KEYWORDS passes.
_X86_64 = (
    ("endbr64", "f3 0f 1e fa"),
    ("push rbp", "55"),
    ("mov rbp, rsp", "48 89 e5"),
    ("push rbx", "53"),
    ("push r12", "41 54"),
    ("push r13", "41 55"),
    ("push r14", "41 56"),
    ("push r15", "41 57"),
    ("sub rsp, 8", "48 83 ec 08"),
    ("mov r12, rdi", "49 89 fc"),
    ("mov r13, rsi", "49 89 f5"),
    ("mov r14, rdx", "49 89 d6"),
    ("mov r15, rcx", "49 89 cf"),
    ("call qword ptr [rip + is_enabled]", "ff 15 41 00 00 00"),
    ("movzx ebx, al", "0f b6 d8"),
    ("xor edi, edi", "31 ff"),
    ("call qword ptr [rip + set_enabled]", "ff 15 3e 00 00 00"),
    ("mov rdi, r12", "4c 89 e7"),
    ("mov rsi, r13", "4c 89 ee"),
    ("mov rdx, r14", "4c 89 f2"),
    ("mov rcx, r15", "4c 89 f9"),
    ("call qword ptr [rip + original]", "ff 15 34 00 00 00"),
    ("mov r12, rax", "49 89 c4"),
    ("mov edi, ebx", "89 df"),
    ("call qword ptr [rip + set_enabled]", "ff 15 21 00 00 00"),
    ("mov rax, r12", "4c 89 e0"),
    ("add rsp, 8", "48 83 c4 08"),
    ("pop r15", "41 5f"),
    ("pop r14", "41 5e"),
    ("pop r13", "41 5d"),
    ("pop r12", "41 5c"),
    ("pop rbx", "5b"),
    ("pop rbp", "5d"),
    ("ret", "c3"),
    (".balign 8, 0xcc", "cc cc cc cc cc cc cc"),
)
_AARCH64 = (
    ("bti c", "5f 24 03 d5"),
    ("stp x29, x30, [sp, #-64]!", "fd 7b bc a9"),
    ("mov x29, sp", "fd 03 00 91"),
    ("stp x19, x20, [sp, #16]", "f3 53 01 a9"),
    ("stp x21, x22, [sp, #32]", "f5 5b 02 a9"),
    ("str x23, [sp, #48]", "f7 1b 00 f9"),
    ("mov x19, x0", "f3 03 00 aa"),
    ("mov x20, x1", "f4 03 01 aa"),
    ("mov x21, x2", "f5 03 02 aa"),
    ("mov x22, x3", "f6 03 03 aa"),
    ("ldr x16, is_enabled", "d0 02 00 58"),
    ("blr x16", "00 02 3f d6"),
    ("and w23, w0, #0xff", "17 1c 00 12"),
    ("mov w0, #0", "00 00 80 52"),
    ("ldr x16, set_enabled", "90 02 00 58"),
    ("blr x16", "00 02 3f d6"),
    ("mov x0, x19", "e0 03 13 aa"),
    ("mov x1, x20", "e1 03 14 aa"),
    ("mov x2, x21", "e2 03 15 aa"),
    ("mov x3, x22", "e3 03 16 aa"),
    ("ldr x16, original", "10 02 00 58"),
    ("blr x16", "00 02 3f d6"),
    ("mov x19, x0", "f3 03 00 aa"),
    ("mov w0, w23", "e0 03 17 2a"),
    ("ldr x16, set_enabled", "50 01 00 58"),
    ("blr x16", "00 02 3f d6"),
    ("mov x0, x19", "e0 03 13 aa"),
    ("ldr x23, [sp, #48]", "f7 1b 40 f9"),
    ("ldp x21, x22, [sp, #32]", "f5 5b 42 a9"),
    ("ldp x19, x20, [sp, #16]", "f3 53 41 a9"),
    ("ldp x29, x30, [sp], #64", "fd 7b c4 a8"),
    ("ret", "c0 03 5f d6"),
)
_CODE = {"x86_64": _X86_64, "aarch64": _AARCH64}


class FunctionApply(Protocol):
    """One way to keep `autograd.Function.apply` from recording in every thread."""

    @property
    def name(self) -> str:
        """`native` or `class attribute`."""
        ...

    @property
    def why(self) -> str | None:
        """Why it is not `native`, or None."""
        ...

    @property
    def gap(self) -> str | None:
        """What still records while it is shut, or None."""
        ...

    def shut(self) -> None:
        """Stop recording; may be repeated."""
        ...

    def open(self) -> None:
        """Put back exactly what stood there, where what stands there is still ours; may be repeated."""
        ...


@functools.cache
def choose() -> FunctionApply:
    """Return the way that works with this torch on this machine, tested but not yet in force.

    The native way is tried first and proves itself on a method definition of its own, so that no other thread sees
    the test. Its memory stays mapped for the life of the process: a thread may still be inside when it is opened.
    """
    try:
        return Native()
    except _Unavailable as reason:
        return ClassAttribute(why=str(reason))


class _Unavailable(Exception):
    """Why the native variant cannot be used here."""


class Native:
    """Replaces the function word of the one C method definition behind every `Function.apply`.

    Raises:
        _Unavailable: it cannot be had here, or failed its self-test.
    """

    name = "native"
    why = None
    gap = None

    def __init__(self) -> None:
        base = private.find("function_base")
        if base is None or platform.python_implementation() != "CPython":
            raise _Unavailable("torch._C._FunctionBase is not there" if base is None else "this is not CPython")
        if not sys.platform.startswith("linux"):
            raise _Unavailable(f"the trampoline is for Linux, this is {sys.platform}")
        code = _CODE.get(platform.machine())
        if code is None or struct.calcsize("P") != 8:
            raise _Unavailable(f"there is no trampoline for {platform.machine()}")
        definition = _definition_of(base.apply)
        self._word = ctypes.c_void_p.from_address(ctypes.addressof(definition) + _MethodDef.ml_meth.offset)
        original = self._word.value
        assert original is not None
        self._original: int = original
        self._trampoline = _executable(assemble(code, *_grad_mode_functions(), original))
        _prove(base, definition, self._trampoline)

    def shut(self) -> None:
        """Put the trampoline in place.

        Raises:
            SwitchFailed: something else stands there than was found at first use; nothing is changed.
        """
        if self._word.value not in (self._original, self._trampoline):
            raise SwitchFailed(
                "autograd.Function.apply is not torch's own any more",
                what="its C method definition was changed by somebody else after gradctl's first use",
                why="gradctl would not know what to put back",
                fix="take the other interception back first, then switch off",
            )
        self._word.value = self._trampoline

    def open(self) -> None:
        """Put torch's own function back, unless somebody else has patched over ours."""
        if self._word.value == self._trampoline:
            self._word.value = self._original


class ClassAttribute:
    """Wraps the class attribute `apply` through the tap: the fallback where no executable memory can be had.

    Args:
        why: why the native variant is not used.
    """

    name = "class attribute"

    def __init__(self, *, why: str) -> None:
        self.why = why
        is_python = not _is_c_method(torch.autograd.Function)
        self.gap = (
            "autograd.Function: only a lookup that starts above _SingleLevelFunction records"
            if is_python
            else "autograd.Function: an alias of `apply` captured before (`f = MyFunction.apply`) still records"
        )
        self._handle: _taps.Handle | None = None

    def shut(self) -> None:
        """Subscribe to the tap."""
        if self._handle is None:
            self._handle = _taps.function_apply.subscribe(_without_grad, order="veto")

    def open(self) -> None:
        """Leave the tap."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()


def _without_grad(inner: Callable[..., Any]) -> Callable[..., Any]:
    is_enabled, set_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        before = is_enabled()
        set_enabled(False)
        try:
            return inner(cls, *args, **kwargs)
        finally:
            set_enabled(before)

    return apply


def _is_c_method(owner: type) -> bool:
    return type(vars(owner).get("apply")).__name__ == "classmethod_descriptor"


class _MethodDef(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("ml_name", ctypes.c_char_p),
        ("ml_meth", ctypes.c_void_p),
        ("ml_flags", ctypes.c_int),
        ("ml_doc", ctypes.c_char_p),
    )


def _definition_of(method: Any) -> _MethodDef:
    """Return the live PyMethodDef of a bound C method, checked against what CPython's own functions say of it."""
    pointer = ctypes.c_void_p.from_address(id(method) + object.__basicsize__).value  # m_ml follows the object header
    function = _python_api("PyCFunction_GetFunction", ctypes.c_void_p, ctypes.py_object)(method)
    flags = _python_api("PyCFunction_GetFlags", ctypes.c_int, ctypes.py_object)(method)
    if not pointer or "w" not in _permissions(pointer):
        raise _Unavailable("the method definition of autograd.Function.apply cannot be written")
    definition = _MethodDef.from_address(pointer)
    if definition.ml_meth != function or definition.ml_flags != flags or definition.ml_name != b"apply":
        raise _Unavailable("CPython keeps the method definition of autograd.Function.apply elsewhere")
    if not flags & _METH_CLASS or flags & _METH_METHOD:
        raise _Unavailable(f"autograd.Function.apply has an unknown calling convention ({flags:#x})")
    return definition


def _python_api(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


def _permissions(address: int) -> str:
    """Return what the kernel allows at `address`, such as `rw-p`, or an empty string."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                span, permissions = line.split(maxsplit=2)[:2]
                low, high = (int(end, 16) for end in span.split("-"))
                if low <= address < high:
                    return permissions
    except OSError:
        pass  # no /proc: what cannot be shown to be writable is not written
    return ""


def _grad_mode_functions() -> tuple[int, int]:
    """Return the addresses of `c10::GradMode::is_enabled` and `set_enabled` in the c10 that this torch runs on."""
    library = ctypes.CDLL(torch._C.__file__)  # looks a symbol up in everything that torch itself was linked with
    try:
        found = [library["_ZN3c108GradMode10is_enabledEv"], library["_ZN3c108GradMode11set_enabledEb"]]
    except AttributeError as error:
        raise _Unavailable(f"libc10 does not export c10::GradMode: {error}") from error
    is_enabled, set_enabled = (ctypes.cast(function, ctypes.c_void_p).value for function in found)
    assert is_enabled
    assert set_enabled
    return is_enabled, set_enabled


def assemble(code: tuple[tuple[str, str], ...], is_enabled: int, set_enabled: int, original: int) -> bytes:
    """Return the trampoline's bytes: the code, then the three addresses that it calls through."""
    return b"".join(bytes.fromhex(octets) for _, octets in code) + struct.pack("<3Q", is_enabled, set_enabled, original)


def _executable(code: bytes) -> int:
    """Return the address of a copy of `code` that may be executed and can no longer be written."""
    libc = ctypes.CDLL(None, use_errno=True)
    mmap, mprotect = libc["mmap"], libc["mprotect"]
    mmap.restype = ctypes.c_void_p
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = mmap(None, len(code), _PROT_READ | _PROT_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise _Unavailable(f"no memory for the trampoline (errno {ctypes.get_errno()})")
    ctypes.memmove(address, code, len(code))
    if mprotect(address, len(code), _PROT_READ | _PROT_EXEC):
        errno = ctypes.get_errno()
        libc["munmap"](ctypes.c_void_p(address), ctypes.c_size_t(len(code)))
        raise _Unavailable(f"this kernel does not let a process make memory executable (errno {errno})")
    if platform.machine() == "aarch64":
        # The kernel cleans a page when it first becomes executable; say it to the processor once more where we can.
        try:
            clear = ctypes.CDLL("libgcc_s.so.1")["__clear_cache"]
        except (OSError, AttributeError):
            return int(address)
        clear(ctypes.c_void_p(address), ctypes.c_void_p(address + len(code)))
    return int(address)


_PROBES: list[Any] = []  # the method definitions of the self-test: CPython keeps pointers into them


def _prove(base: Any, definition: _MethodDef, trampoline: int) -> None:
    """Run the trampoline behind a method definition of our own, in this thread but unseen by its modes."""
    trial = _MethodDef(b"apply", trampoline, definition.ml_flags, None)
    _PROBES.append(trial)
    make = _python_api("PyDescr_NewClassMethod", ctypes.py_object, ctypes.py_object, ctypes.POINTER(_MethodDef))
    descriptor: Any = make(base, ctypes.byref(trial))
    apply = descriptor.__get__(None, _trial_function())
    is_enabled, set_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
    faults: list[str] = []
    before = is_enabled()
    allow = private.find("allow_single_level_function") or contextlib.nullcontext  # inside of a torch.func transform
    with Probe().plain() as leaf, allow():
        try:
            for mode in (True, False):
                set_enabled(mode)
                if apply(leaf, False).grad_fn is not None:
                    faults.append("a graph was recorded")
                try:
                    apply(leaf, True)
                except ZeroDivisionError:
                    pass
                else:
                    faults.append("an exception of forward was lost")
                if is_enabled() is not mode:
                    faults.append("the grad mode was not put back")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
        finally:
            set_enabled(before)
    if faults:
        raise _Unavailable("the trampoline failed its self-test: " + "; ".join(faults))


def _trial_function() -> type:
    class Trial(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(leaf: Any, fail: bool) -> Any:
            return leaf * (1 // (0 if fail else 1))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            return None

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0], None

    return Trial
