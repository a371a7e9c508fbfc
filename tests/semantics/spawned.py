"""Children that start a Python of their own: spawn, a fork server, `subprocess`, a data loader."""

import multiprocessing
import os
import subprocess
import sys

import torch
from training import steps


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((8,), float(index))


class Kept:
    pass


def worker(count, kept):
    assert type(kept) is Kept
    steps(count)


if __name__ == "__main__":
    steps(2)
    for way, count in (("spawn", 3), ("forkserver", 4)):
        process = multiprocessing.get_context(way).Process(target=worker, args=(count, Kept()))
        process.start()
        process.join()
        print(way, process.exitcode, flush=True)
    code = "from training import steps; steps(5); print('subprocess')"
    here = os.path.dirname(__file__)
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here).stdout)
    lost = subprocess.run([sys.executable, "-I", "-c", "print('hidden')"], capture_output=True, text=True, check=True)
    print(lost.stdout)
    for batch in torch.utils.data.DataLoader(Numbers(), 2, num_workers=1, multiprocessing_context="spawn"):
        print(batch.sum().item())
