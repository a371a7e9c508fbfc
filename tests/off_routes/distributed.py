"""RPC: its server threads are C++, and its autograd has an engine of its own."""

from __future__ import annotations

import os
from collections.abc import Generator

import torch
from torch.distributed import rpc

from off_routes._registry import Evidence, double, leaf, route


def _start() -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{os.environ['GRADCTL_TEST_RENDEZVOUS']}")
    rpc.init_rpc("self", rank=0, world_size=1, rpc_backend_options=options)


def remote() -> tuple[str, ...]:
    """Train in the server's thread; return what got through."""
    seen, w = Evidence(), leaf()
    seen.attempt(lambda: seen.train(double(w), w))
    return tuple(sorted(seen.marks))


@route(slow=True)
def rpc_self(seen: Evidence) -> Generator[None]:
    _start()
    yield
    seen.marks.update(rpc.rpc_sync("self", remote))
    rpc.shutdown(graceful=False)


@route(slow=True)
def dist_autograd(seen: Evidence) -> Generator[None]:
    import torch.distributed.autograd as dist_autograd

    _start()
    w = leaf()
    with dist_autograd.context() as context:
        y = double(w)
        yield
        dist_autograd.backward(context, [y])
        if dist_autograd.get_gradients(context)[w].any():
            seen.marks.add("B")
    rpc.shutdown(graceful=False)


assert torch
