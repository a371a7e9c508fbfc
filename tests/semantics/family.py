"""A training script and its relations: forked workers that step, data loaders that do not, a fork that is replaced."""

import multiprocessing
import os
import sys

import torch
from training import steps


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((8,), float(index))


def worker(count):
    steps(count)


def leave_by_sys_exit():
    steps(4)
    sys.exit(5)


if __name__ == "__main__":
    steps(10)
    for batch in torch.utils.data.DataLoader(Numbers(), 4, num_workers=2, multiprocessing_context="fork"):
        assert batch.shape == (4, 8)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker, args=(count,)) for count in (5, 7)]
    workers += [
        context.Process(target=leave_by_sys_exit),
        context.Process(target=print, args=("no step",), daemon=True),
    ]
    for process in workers:
        process.start()
        process.join()
    print("workers", [process.exitcode for process in workers], flush=True)

    child = os.fork()
    if child == 0:
        steps(6)
        sys.exit(3)
    print("forked", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    child = os.fork()
    if child == 0:
        steps(1)
        os.execv(sys.executable, [sys.executable, "-c", "print('replaced', flush=True)"])
    print("executed", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    steps(10)
    print("done")
