"""Children: forked, spawned, served, loaders' workers, another interpreter, and one that was there before."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from off_routes._registry import Evidence, double, leaf, route


def child_marks(_: object = None) -> list[str]:
    """Train in this process's calling thread; return what got through."""
    seen, w = Evidence(), leaf()
    seen.attempt(lambda: seen.train(double(w), w))
    return sorted(seen.marks)


def _send(pipe: Any) -> None:
    pipe.send(child_marks())
    pipe.close()


class Examples(Dataset[str]):
    """One example: the marks of the process that makes it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return "+".join(child_marks())


def _forked(work: Any) -> list[str]:
    """Run `work` in a child by os.fork and return its marks."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write, "+".join(work()).encode() or b"-")
        finally:
            os._exit(0)
    os.close(write)
    marks = os.read(read, 100).decode()
    os.close(read)
    os.waitpid(pid, 0)
    assert marks
    return [] if marks == "-" else marks.split("+")


@route(past_no_grad=False)
def os_fork(seen: Evidence) -> Generator[None]:
    yield
    seen.marks.update(_forked(child_marks))


@route()
def os_fork_thread(seen: Evidence) -> Generator[None]:
    def work() -> list[str]:
        marks: list[str] = []
        thread = threading.Thread(target=lambda: marks.extend(child_marks()))
        thread.start()
        thread.join()
        return marks

    yield
    seen.marks.update(_forked(work))


def _process(seen: Evidence, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send,))
    process.start()
    send.close()
    seen.marks.update(receive.recv())
    process.join()
    receive.close()
    process.close()


@route(past_no_grad=False)
def mp_fork(seen: Evidence) -> Generator[None]:
    yield
    _process(seen, "fork")


@route(slow=True)
def mp_spawn(seen: Evidence) -> Generator[None]:
    yield
    _process(seen, "spawn")


@route(slow=True)
def mp_forkserver(seen: Evidence) -> Generator[None]:
    yield
    _process(seen, "forkserver")


def _loader(seen: Evidence, **how: Any) -> None:
    for batch in DataLoader(Examples(), batch_size=None, **how):
        seen.marks.update(mark for mark in batch.split("+") if mark)


@route(past_no_grad=False)
def dl_fork(seen: Evidence) -> Generator[None]:
    yield
    _loader(seen, num_workers=1, multiprocessing_context="fork")


@route(slow=True)
def dl_spawn(seen: Evidence) -> Generator[None]:
    yield
    _loader(seen, num_workers=1, multiprocessing_context="spawn")


@route(past_no_grad=False)
def dl_pin_thread(seen: Evidence) -> Generator[None]:
    yield
    _loader(seen, num_workers=0)


@route(slow=True, name="subprocess")
def subprocess_python(seen: Evidence) -> Generator[None]:
    yield
    code = "from off_routes.processes import child_marks; print('+'.join(child_marks()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seen.marks.update(mark for mark in done.stdout.strip().split("+") if mark)


@route()
def ppool_before(seen: Evidence) -> Generator[None]:
    """A worker process that was already running: it cannot be reached without its cooperation."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result()
        yield
        seen.marks.update(pool.submit(child_marks, None).result())


assert torch  # the children of fork find it imported
