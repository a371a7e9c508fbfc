"""What torch and the standard library do once, for good, when they are first used: done before any test looks."""

from __future__ import annotations

import multiprocessing.forkserver
import multiprocessing.resource_tracker

import torch._dynamo.eval_frame
import torch._dynamo.mutation_guard
import torch.utils.data._utils.signal_handling as signals


def compiling() -> None:
    """Patch torch as its first compilation does."""
    torch._dynamo.eval_frame.TorchPatcher.patch()
    torch._dynamo.mutation_guard.install_generation_tagging_init()


def processes() -> None:
    """Begin what the first child process and the first data loader begin."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()
    signals._set_SIGCHLD_handler()
