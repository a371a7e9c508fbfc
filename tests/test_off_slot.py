"""The native engine: the import slot, read-only pages, libraries that come and go, slots the loader has not filled."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradctl
from gradctl import _off, _taps
from gradctl._off import _probe, _slot, _switch
from recording import leaf, records

LIBC10 = next(Path(torch.__file__).parent.glob("lib/libc10.so*"))
SOURCE = """
extern _Bool _ZNK3c1010TensorImpl13requires_gradEv(void *tensor);
int requires_grad(void *tensor) { return _ZNK3c1010TensorImpl13requires_gradEv(tensor); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds a fresh library with an import slot of its own."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "ask.c").write_text(SOURCE)

    def build(*flags: str, name: str = "ask") -> Path:
        path = folder / f"{name}{len(list(folder.iterdir()))}.so"
        command = ["cc", "-shared", "-fPIC", *flags, "-o", str(path), str(folder / "ask.c"), str(LIBC10)]
        subprocess.run(command, check=True, timeout=60)
        return path

    return build


@pytest.fixture
def slots() -> _slot.Slots:
    return _slot.Slots()


def _dlopen(path: Path, flags: int) -> int:
    """Open a library as C would, unseen by anything that follows `ctypes`."""
    libc = ctypes.PyDLL(None)
    libc.dlopen.restype = ctypes.c_void_p
    handle = libc.dlopen(os.fsencode(path), flags)
    assert handle
    return handle


def _asks(handle: int) -> Callable[[torch.Tensor], int]:
    libc = ctypes.PyDLL(None)
    libc.dlsym.restype = ctypes.c_void_p
    libc.dlsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(libc.dlsym(handle, b"requires_grad"))
    return lambda tensor: function(tensor._cdata)


def _dlclose(handle: int) -> None:
    libc = ctypes.PyDLL(None)
    libc.dlclose.argtypes = [ctypes.c_void_p]
    assert libc.dlclose(handle) == 0


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_libtorch_cpu_has_a_slot_and_libtorch_python_is_left_alone(slots: _slot.Slots) -> None:
    names = [os.path.basename(name) for name in slots.libraries()]
    assert any(name.startswith("libtorch_cpu") for name in names)
    assert not any("python" in name for name in names)
    x = leaf()
    with gradctl.off():
        assert x.requires_grad


def test_every_slot_is_restored_to_what_it_held(slots: _slot.Slots) -> None:
    before = slots.words()
    with gradctl.off():
        inside = slots.words()
        assert inside.keys() == before.keys()
        assert not set(inside.values()) & set(before.values())
    assert slots.words() == before


def test_a_second_engine_agrees_with_readelf_on_where_the_slots_are(slots: _slot.Slots) -> None:
    """The oracle is binutils, on the file."""
    readelf = shutil.which("readelf")
    assert readelf
    for slot in slots._slots:
        listed = subprocess.run(
            [readelf, "-rW", slot.owner.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        offsets = re.findall(rf"^([0-9a-f]+) .* {_slot.REQUIRES_GRAD}", listed, re.MULTILINE)
        assert f"{slot.address - slot.owner.base:016x}" in offsets


def test_a_slot_on_a_read_only_page_is_turned_and_its_page_stays_read_only(slots: _slot.Slots) -> None:
    address = next(iter(slots.words()))
    page = address & ~(mmap.PAGESIZE - 1)
    libc = ctypes.PyDLL(None)
    libc.mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]

    def permissions() -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= address < high:
                return line.split()[1]
        raise AssertionError

    before = permissions()
    assert libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ) == 0
    try:
        for _ in range(2):
            with gradctl.off():
                assert not records()
                assert permissions() == "r--p"
            assert records()
            assert permissions() == "r--p"
    finally:
        assert libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert permissions() == before


def test_a_library_loaded_while_on_is_turned_with_the_next_turn(library: Callable[..., Path]) -> None:
    with gradctl.off():
        pass
    handle = _dlopen(library(), os.RTLD_NOW)
    ask, x = _asks(handle), leaf()
    assert ask(x) == 1
    for _ in range(2):
        with gradctl.off():
            assert ask(x) == 0
        assert ask(x) == 1
    _dlclose(handle)


@pytest.mark.parametrize("way", ["ctypes", "torch.ops"])
def test_a_library_loaded_while_off_is_turned_at_once(library: Callable[..., Path], way: str) -> None:
    path, x = library(), leaf()
    with gradctl.off():
        if way == "ctypes":
            ctypes.CDLL(str(path))
        else:
            torch.ops.load_library(str(path))
        ask = _asks(_dlopen(path, os.RTLD_NOW))
        assert ask(x) == 0
    assert ask(x) == 1
    torch.ops.loaded_libraries.discard(str(path))


def test_an_extension_module_imported_while_off_is_turned_at_once(library: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "asking.so"
    shutil.copy(library(), path)
    spec = importlib.util.spec_from_file_location("asking", path)
    assert spec
    x = leaf()
    with gradctl.off():
        # It is no real module, but it is loaded before that is found out.
        with pytest.raises(ImportError, match="PyInit_asking"):
            importlib.util.module_from_spec(spec)
        ask = _asks(_dlopen(path, os.RTLD_NOW))
        assert ask(x) == 0
    assert ask(x) == 1


def test_a_slot_that_the_loader_has_not_filled_yet_is_turned_and_then_filled(library: Callable[..., Path]) -> None:
    handle = _dlopen(library("-Wl,-z,lazy", "-Wl,-z,norelro"), os.RTLD_LAZY)
    ask, x = _asks(handle), leaf()
    with gradctl.off():
        assert ask(x) == 0
    assert ask(x) == 1
    with gradctl.off():
        assert ask(x) == 0
    assert ask(x) == 1
    _dlclose(handle)


def test_a_slot_in_a_page_that_the_loader_protects_is_turned(library: Callable[..., Path]) -> None:
    handle = _dlopen(library("-Wl,-z,relro", "-Wl,-z,now"), os.RTLD_NOW)
    ask, x = _asks(handle), leaf()
    with gradctl.off():
        assert ask(x) == 0
    assert ask(x) == 1
    _dlclose(handle)


def test_a_library_is_kept_in_memory_while_its_slot_is_turned_and_no_longer(library: Callable[..., Path]) -> None:
    path = library()
    handle = _dlopen(path, os.RTLD_NOW)
    with gradctl.off():
        _dlclose(handle)
        assert _is_mapped(path)
    assert not _is_mapped(path)
    with gradctl.off():
        assert not records()


def test_libraries_that_are_unloaded_are_forgotten(library: Callable[..., Path]) -> None:
    paths = [library() for _ in range(3)]
    for _ in range(3):
        for path in paths:
            handle = _dlopen(path, os.RTLD_NOW)
            with gradctl.off():
                assert _asks(handle)(leaf()) == 0
            _dlclose(handle)
    with gradctl.off():
        engine = _switch.engine()
        assert isinstance(engine, _slot.Slots)
        assert not any(str(path) in engine.libraries() for path in paths)


def test_a_slot_that_somebody_else_has_changed_is_not_turned_back(library: Callable[..., Path]) -> None:
    path = library("-Wl,-z,norelro")
    handle = _dlopen(path, os.RTLD_NOW)
    with gradctl.off():
        engine = _switch.engine()
        assert isinstance(engine, _slot.Slots)
        [slot] = [s for s in engine._slots if s.owner.name == str(path)]
        theirs = engine._answer_no + 1  # an address of nobody's, never called
        slot.word.value = theirs
    assert slot.word.value == theirs
    slot.word.value = engine._truth
    assert _asks(handle)(leaf()) == 1
    _dlclose(handle)


def test_slots_are_looked_for_again_only_when_a_library_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with gradctl.off():
        pass
    engine = _switch.engine()
    assert isinstance(engine, _slot.Slots)

    def look() -> Any:
        raise AssertionError("looked for slots again")

    monkeypatch.setattr(engine, "_look", look)
    for _ in range(20):
        with gradctl.off():
            assert not records()


def test_the_replacement_is_called_and_must_touch_nothing() -> None:
    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def answers_one(_: int) -> int:
        return 1

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def writes(address: int) -> int:
        ctypes.c_uint64.from_address(address).value = 0
        return 0

    for function in (answers_one, writes):
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address
        with pytest.raises(_slot.SlotUnusable, match="does more than return 0"):
            _slot._check_replacement(address)


def test_the_self_test_sees_a_graph_under_every_mode_of_its_caller() -> None:
    probe = _probe.Probe()
    with torch.no_grad():
        assert probe.records()
    with torch.inference_mode():
        assert probe.records()
        made_inside = _probe.Probe()
    assert made_inside.records()
    assert torch.func.vmap(lambda x: x * probe.records())(torch.ones(2)).sum() == 2
    with gradctl.off(), torch.inference_mode():
        assert not probe.records()


@pytest.mark.parametrize("turns", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_threads_that_import_and_load_beside_turns_do_not_lock_up(library: Callable[..., Path], turns: int) -> None:
    paths = [library() for _ in range(3)]
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            for path in paths:
                _dlclose(_dlopen(path, os.RTLD_NOW))

    def load_without_the_interpreters_lock() -> None:
        libc = ctypes.CDLL(None)
        libc.dlopen.restype = ctypes.c_void_p
        libc.dlclose.argtypes = [ctypes.c_void_p]
        while not stop.is_set():
            libc.dlclose(libc.dlopen(os.fsencode(paths[0]), os.RTLD_NOW))

    threads = [threading.Thread(target=work) for work in (load, load_without_the_interpreters_lock)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(turns):
            with gradctl.off():
                assert not records()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert records()


def test_the_report_says_which_engine_and_which_libraries() -> None:
    report = _off.engine_report()
    assert _taps.installed() == []
    assert (report.engine, report.why) == ("slot", None)
    assert any(name.startswith("libtorch_cpu") for name in report.libraries)
    assert report.to_json()["function_apply"] == "native"


@pytest.fixture(autouse=True)
def nothing_pinned() -> Iterator[None]:
    yield
    gc.collect()
    engine = _switch.engine()
    assert not isinstance(engine, _slot.Slots) or not engine._pins


def test_what_lay_at_an_address_before_does_not_tell_how_its_page_is_protected_now() -> None:
    """A page that is closed by mistake takes the process down when its library is unloaded."""
    word = ctypes.c_size_t()
    memory = _slot._Memory()
    memory._spans[:] = [(0, 1 << 64, mmap.PROT_READ)]
    assert memory.protection_if_not_writable(ctypes.addressof(word)) is None
