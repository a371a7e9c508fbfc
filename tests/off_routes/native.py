"""The routes through C++, in a library that `build` compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from off_routes._registry import Evidence, double, leaf, route

SOURCE = Path(__file__).with_name("native.cpp")
LIBRARY = "routes.so"
FOLDER_VARIABLE = "GRADCTL_TEST_ROUTES"


def build(folder: Path) -> None:
    """Compile the library into `folder`; takes a C++ compiler half a minute."""
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]]
    links = [f"-L{path}" for path in cpp_extension.library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", abi]
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    links += ["-ltorch", "-ltorch_cpu", "-lc10"]
    library = str(folder / LIBRARY)
    subprocess.run([compiler, "-shared", *flags, *includes, str(SOURCE), *links, "-o", library], check=True)


def _load() -> Any:
    torch.ops.load_library(str(Path(os.environ[FOLDER_VARIABLE]) / LIBRARY))
    return torch.ops.gradctl_routes_native


@route(slow=True)
def cpp_thread(seen: Evidence) -> Generator[None]:
    w, ops = leaf(), _load()
    yield
    seen.graph(ops.thread_forward(w))


@route(slow=True)
def cpp_thread_backward(seen: Evidence) -> Generator[None]:
    w, ops = leaf(), _load()
    yield
    error = ops.thread_backward(w)
    if error:
        seen.refusals.append(error)
    else:
        seen.marks.add("B")
    seen.filled(w)


@route(slow=True)
def cpp_backward_pre(seen: Evidence) -> Generator[None]:
    w, ops = leaf(), _load()
    y = double(w)
    yield
    ops.run_backward(y)
    seen.marks.add("B")
    seen.filled(w)


@route(slow=True)
def cpp_enable_guard(seen: Evidence) -> Generator[None]:
    w, ops = leaf(), _load()
    yield
    seen.train(ops.guarded(w), w)


@route(slow=True)
def cpp_function(seen: Evidence) -> Generator[None]:
    w, ops = leaf(), _load()
    yield
    seen.train(ops.function(w), w)


@route(slow=True)
def cpp_loaded_late(seen: Evidence) -> Generator[None]:
    w = leaf()
    yield
    seen.train(_load().function(w), w)
