"""What every test runs under: nothing leaks, nothing downloads, warnings are errors (pyproject.toml)."""

from __future__ import annotations

import gc
import os
import signal

import pytest

# Before torch is loaded. Small models gain nothing from more threads, and two workers share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that would reach for the network fails at once instead of waiting for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

# A job in the background ignores Ctrl-C, and so would every program that a test starts to see how it answers to it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import HealthCheck, settings

from leaks import no_leaks

__all__ = ["no_leaks"]

pytest_plugins = ["pytester"]

# No test may depend on how fast the machine is; CI draws the same examples each time, a person draws new ones.
settings.register_profile("gradctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("gradctl"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "gradctl")


@pytest.fixture
def no_optimizers_of_other_tests() -> None:
    """Collect what earlier tests left: traces wait for optimizers that they find alive, and recordings number them."""
    gc.collect()
