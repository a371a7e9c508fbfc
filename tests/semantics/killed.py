"""Forks trainers one after another and kills each at the time that the command line says, in seconds."""

import os
import signal
import sys
import time

from training import steps

for seconds in sys.argv[1:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        begun = time.perf_counter()
        count = 0
        while True:
            steps(1)
            count += 1
            os.write(writer, f"{count} {time.perf_counter() - begun:.4f}\n".encode())
    os.close(writer)
    with os.fdopen(reader) as lines:
        last = lines.readline()
        while float(last.split()[1]) < float(seconds):
            last = lines.readline()
        os.kill(child, signal.SIGKILL)
        # Whole lines only: the last one may have been cut by the kill.
        last = [line for line in lines.read().splitlines(keepends=True) if line.endswith("\n")][-1:] or [last]
    os.waitpid(child, 0)
    print(child, *last[0].split(), flush=True)
