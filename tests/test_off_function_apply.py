"""`autograd.Function.apply` while gradients are off: every alias, every thread, undone by one word."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from gradctl import SwitchFailed
from gradctl._off import _function_apply

BASE_APPLY = torch._C._FunctionBase.__dict__["apply"]


class Double(torch.autograd.Function):
    contexts: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 2:
            raise ValueError("two elements")
        ctx.save_for_backward(x)
        Double.contexts.append(weakref.ref(ctx))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


captured = Double.apply
VARIANTS = [_function_apply.choose(), _function_apply.ClassAttribute(why="asked for by the test")]


def word() -> int | None:
    """Read the function word of the method definition, by CPython's own accessor."""
    read = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyCFunction_GetFunction", ctypes.pythonapi))
    return read(torch._C._FunctionBase.apply)


def records(apply: Any) -> bool:
    return apply(torch.ones(3, requires_grad=True)).grad_fn is not None


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def shut(request: pytest.FixtureRequest) -> Iterator[_function_apply.FunctionApply]:
    before = word(), "apply" in vars(torch.autograd.function._SingleLevelFunction)
    request.param.shut()
    try:
        yield request.param
    finally:
        request.param.open()
        assert before == (word(), "apply" in vars(torch.autograd.function._SingleLevelFunction))
        assert records(captured)
        assert records(Double.apply)


def test_the_native_variant_works_on_this_machine() -> None:
    assert VARIANTS[0].name == "native", VARIANTS[0].why


def test_apply_records_nothing_whatever_the_mode_says(shut: _function_apply.FunctionApply) -> None:
    assert not records(Double.apply)
    with torch.enable_grad():
        assert not records(Double.apply)
    assert torch.is_grad_enabled()


def test_an_alias_captured_before_records_nothing_or_the_gap_says_so(shut: _function_apply.FunctionApply) -> None:
    aliases = [captured, BASE_APPLY.__get__(None, Double), super(torch.autograd.Function, Double).apply]
    leaks = [records(alias) for alias in aliases]
    assert not any(leaks) or shut.gap is not None
    assert shut.gap is None or "records" in shut.gap


def test_an_exception_of_forward_passes_and_the_mode_comes_back(shut: _function_apply.FunctionApply) -> None:
    with pytest.raises(ValueError, match="two elements"):
        Double.apply(torch.ones(2, requires_grad=True))
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with pytest.raises(ValueError, match="two elements"):
            Double.apply(torch.ones(2, requires_grad=True))
        assert not torch.is_grad_enabled()


def test_values_are_those_of_no_grad_and_the_context_is_freed(shut: _function_apply.FunctionApply) -> None:
    x = torch.randn(5, requires_grad=True)
    Double.contexts.clear()
    here = Double.apply(x)
    gc.collect()
    assert Double.contexts[0]() is None
    with torch.no_grad():
        assert torch.equal(here, Double.apply(x))


def test_another_thread_records_nothing(shut: _function_apply.FunctionApply) -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(records(Double.apply)))
    thread.start()
    thread.join()
    assert seen == [False]


def test_setup_context_and_keyword_forwards_pass(shut: _function_apply.FunctionApply) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor, by: float = 3.0) -> torch.Tensor:
            return x * by

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.by = inputs[1]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * ctx.by, None

    assert Scale.apply(torch.ones(3, requires_grad=True)).tolist() == [3.0, 3.0, 3.0]
    assert not records(Scale.apply)


def test_vmap_over_a_function_still_works(shut: _function_apply.FunctionApply) -> None:
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * 2 * ctx.saved_tensors[0]

    x = torch.arange(3.0)
    assert torch.equal(torch.func.vmap(Square.apply)(x), x * x)


def test_a_thread_inside_when_it_is_opened_comes_out_right() -> None:
    variant = _function_apply.choose()
    inside, leave = threading.Event(), threading.Event()
    modes: list[bool] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            inside.set()
            assert leave.wait(10)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    def work() -> None:
        Slow.apply(torch.ones(1, requires_grad=True))
        modes.append(torch.is_grad_enabled())

    variant.shut()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    variant.open()
    leave.set()
    thread.join()
    assert modes == [True]
    assert records(captured)


def test_a_word_that_somebody_else_changed_is_refused_and_left_alone() -> None:
    variant = _function_apply.choose()
    assert isinstance(variant, _function_apply.Native)
    theirs = variant._trampoline + 4  # behind the landing pad: works, but is not ours
    original = variant._word.value
    try:
        variant._word.value = theirs
        with pytest.raises(SwitchFailed, match="not torch's own"):
            variant.shut()
        variant.open()
        assert variant._word.value == theirs
    finally:
        variant._word.value = original
    assert records(captured)


def test_the_trampoline_can_not_be_written_once_it_can_be_executed() -> None:
    variant = _function_apply.choose()
    assert isinstance(variant, _function_apply.Native)
    assert _function_apply._permissions(variant._trampoline).startswith("r-x")


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("platform.machine", lambda: "riscv64", "no trampoline for riscv64"),
        ("sys.platform", "darwin", "this is darwin"),
        ("_permissions", lambda address: "r--p", "cannot be written"),
        ("_grad_mode_functions", lambda: (_function_apply._PROT_READ, 0), None),
    ],
)
def test_where_the_native_way_is_missing_the_fallback_says_why(
    monkeypatch: pytest.MonkeyPatch, target: str, value: Any, reason: str | None
) -> None:
    if reason is None:  # machine code that calls nonsense must never be tried: the symbols are missing instead

        def missing() -> tuple[int, int]:
            raise _function_apply._Unavailable("libc10 does not export c10::GradMode")

        value, reason = missing, "does not export"
    owner: Any = _function_apply
    *path, name = target.split(".")
    for step in path:
        owner = getattr(owner, step)
    monkeypatch.setattr(owner, name, value)
    variant = _function_apply.choose.__wrapped__()
    assert isinstance(variant, _function_apply.ClassAttribute)
    assert reason in variant.why
    assert variant.gap


def test_a_kernel_without_executable_memory_gets_the_fallback() -> None:
    script = """
import ctypes, sys
libc = ctypes.CDLL(None)
import torch
from gradctl._off import _function_apply
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
applied = libc.prctl(PR_SET_MDWE, ctypes.c_ulong(REFUSE_EXEC_GAIN), 0, 0, 0) == 0
variant = _function_apply.choose()
print(applied, variant.name, variant.why)
variant.shut()
class F(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * 2)
    backward = staticmethod(lambda ctx, g: g)
print(F.apply(torch.ones(1, requires_grad=True)).grad_fn)
variant.open()
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.splitlines()
    applied = first.startswith("True")  # Linux 6.3 and later can forbid it for one process
    assert ("class attribute" in first and "executable" in first) if applied else "native" in first
    assert second == "None"


def test_an_instruction_has_the_bytes_that_the_assembler_gives_it() -> None:
    labels = {"is_enabled": 0, "set_enabled": 8, "original": 16}
    for code in (_function_apply._X86_64, _function_apply._AARCH64):
        size = sum(len(bytes.fromhex(octets)) for _, octets in code)
        assert size % 8 == 0
        place = 0
        for text, octets in code:
            raw = bytes.fromhex(octets)
            label = next((name for name in labels if name in text), None)
            if label and code is _function_apply._X86_64:  # a displacement from the next instruction
                assert place + len(raw) + int.from_bytes(raw[2:], "little") == size + labels[label]
            elif label:  # imm19 in bits 5..23, in words from this instruction
                assert place + ((int.from_bytes(raw, "little") >> 5 & 0x7FFFF) << 2) == size + labels[label]
            place += len(raw)
    made = _function_apply.assemble(_function_apply._X86_64, 1, 2, 3)
    assert made[-24:] == b"".join(value.to_bytes(8, "little") for value in (1, 2, 3))


@pytest.mark.slow
def test_the_assembler_agrees_with_every_byte(tmp_path: Any) -> None:
    lines = [".intel_syntax noprefix", *(text for text, _ in _function_apply._X86_64)]
    lines += [f"{name}: .quad 0" for name in ("is_enabled", "set_enabled", "original")]
    (tmp_path / "t.s").write_text("\n".join(lines) + "\n")
    subprocess.run(["as", "-o", "t.o", "t.s"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "t.o", "t.bin"], cwd=tmp_path, check=True)
    assert (tmp_path / "t.bin").read_bytes() == _function_apply.assemble(_function_apply._X86_64, 0, 0, 0)


@pytest.mark.slow
def test_a_daemon_thread_inside_apply_does_not_crash_the_interpreter_that_ends() -> None:
    script = """
import threading, time, torch
from gradctl._off import _function_apply
variant = _function_apply.choose()
assert variant.name == "native"
inside = threading.Event()
class Sleepy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        inside.set()
        while True:
            time.sleep(0.001)
    backward = staticmethod(lambda ctx, g: g)
variant.shut()
threading.Thread(target=lambda: Sleepy.apply(torch.ones(1, requires_grad=True)), daemon=True).start()
inside.wait()
"""
    for _ in range(3):
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
        assert (out.returncode, out.stderr) == (0, "")


@pytest.mark.parametrize("outer", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_the_first_use_may_come_inside_of_a_transform(outer: Any) -> None:
    names: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        names.append(_function_apply.choose.__wrapped__().name)
        return x.sum()

    outer(function)(torch.ones(2, 2))
    assert names == ["native"]
