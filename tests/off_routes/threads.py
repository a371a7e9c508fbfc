"""Other threads: their grad mode is their own, whatever the main thread says."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import ctypes
import queue
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from unittest import mock

import torch

from off_routes._registry import Evidence, double, leaf, route


def _worker(seen: Evidence) -> object:
    w = leaf()
    return seen.attempt(lambda: seen.train(double(w), w))


@route()
def thread_new(seen: Evidence) -> Generator[None]:
    yield
    seen.in_thread(lambda: _worker(seen))


@route()
def thread_running(seen: Evidence) -> Generator[None]:
    jobs: queue.Queue[object] = queue.Queue()
    thread = threading.Thread(target=lambda: jobs.get() and _worker(seen))
    thread.start()
    yield
    jobs.put(True)
    thread.join()


@route()
def thread_running_busy(seen: Evidence) -> Generator[None]:
    stop, look, warm = threading.Event(), threading.Event(), threading.Event()
    w = leaf()

    def spin() -> None:
        while not stop.is_set():
            with torch.enable_grad():
                y = double(w)
            if look.is_set():
                seen.graph(y)
            warm.set()

    thread = threading.Thread(target=spin)
    thread.start()
    warm.wait()
    yield
    warm.clear()
    warm.wait()  # the product that was under way at the switch is done
    look.set()
    for _ in range(5):
        warm.clear()
        warm.wait()
    look.clear()
    stop.set()
    thread.join()


@route()
def thread_raw(seen: Evidence) -> Generator[None]:
    yield
    done = threading.Event()
    _thread.start_new_thread(lambda: (_worker(seen), done.set()), ())
    done.wait()


@route()
def thread_pthread(seen: Evidence) -> Generator[None]:
    yield
    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    entry = kind(lambda _: _worker(seen))
    handle = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(handle), None, entry, None) == 0
    assert libc.pthread_join(handle, None) == 0


@route()
def pool_before(seen: Evidence) -> Generator[None]:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: None).result()
        yield
        pool.submit(_worker, seen).result()


@route()
def pool_after(seen: Evidence) -> Generator[None]:
    yield
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_worker, seen).result()


@route()
def asyncio_to_thread(seen: Evidence) -> Generator[None]:
    yield
    asyncio.run(asyncio.to_thread(_worker, seen))


@route()
def timer(seen: Evidence) -> Generator[None]:
    yield
    thread = threading.Timer(0.0, lambda: _worker(seen))
    thread.start()
    thread.join()


@route()
def mp_threadpool(seen: Evidence) -> Generator[None]:
    with ThreadPool(1) as pool:
        yield
        pool.apply(_worker, (seen,))


@route(past_no_grad=False, slow=True)
def jit_fork(seen: Evidence) -> Generator[None]:
    @torch.jit.script
    def inner(w: torch.Tensor) -> torch.Tensor:
        return (w * 2).sum()

    @torch.jit.script
    def forked(w: torch.Tensor) -> torch.Tensor:
        future = torch.jit.fork(inner, w)
        return torch.jit.wait(future)

    w = leaf()
    forked(w)
    yield
    seen.train(forked(w), w)


@route()
def futures_then(seen: Evidence) -> Generator[None]:
    first: torch.futures.Future[int] = torch.futures.Future()
    yield
    second = first.then(lambda _: _worker(seen))
    seen.in_thread(lambda: first.set_result(1))
    second.wait()


@route(past_no_grad=False)
def parallel_apply(seen: Evidence) -> Generator[None]:
    """The threads of DataParallel; only what asks for a GPU is replaced."""
    from torch.nn.parallel import parallel_apply as module

    replicas = [torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]
    inputs = [torch.ones(1, 3), torch.ones(1, 3)]
    here = contextlib.nullcontext()
    with (
        mock.patch.object(sys.modules[module.__module__], "_get_device_index", return_value=0),
        mock.patch.multiple(
            torch.accelerator,
            current_stream=lambda *a: here,
            device_index=lambda *a: here,
            is_available=lambda: True,
            current_accelerator=lambda: torch.device("cpu"),
        ),
    ):
        yield
        for replica, output in zip(replicas, module(replicas, inputs), strict=True):
            seen.train(output.sum(), *replica.parameters())
