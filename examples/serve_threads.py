"""Serve a small model from many threads, with gradients off for the whole process or, to compare, left on.

    python examples/serve_threads.py --server threads --requests 2000
    python examples/serve_threads.py --server fastapi --requests 2000 --gradients on

`torch.no_grad()` in the main thread does not reach the threads of a server: each of them starts with gradients on. Here
the handler keeps the last outputs for a `/recent` page, as real servers keep histories and caches; with gradients on
each kept output holds the whole graph of its request. One line at start, `gradctl.off().start()`, ends that.

The program brings its own client, sends the requests over the loopback, prints one JSON object and ends.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

import gradctl

CLIENTS = 4
WIDTH = 64


class Service:
    """A model behind `predict`, which worker threads call at the same time.

    Args:
        keep: how many outputs to keep for the `/recent` page.
    """

    def __init__(self, keep: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, 2048), nn.GELU(), nn.Linear(2048, 10))
        self.recent: collections.deque[torch.Tensor] = collections.deque(maxlen=keep)
        self.graphs_by_thread: collections.Counter[int] = collections.Counter()
        self.requests_by_thread: collections.Counter[int] = collections.Counter()
        self._lock = threading.Lock()

    def predict(self, features: list[float]) -> int:
        """Return the class of one example of 64 numbers."""
        scores = self.model(torch.tensor(features).reshape(1, WIDTH))
        with self._lock:
            thread = threading.get_ident()
            self.requests_by_thread[thread] += 1
            self.graphs_by_thread[thread] += scores.grad_fn is not None
            self.recent.append(scores)
        return int(scores.argmax())


@contextlib.contextmanager
def threaded_server(service: Service) -> Iterator[int]:
    """Serve with the standard library: one thread a connection. Gives the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            features = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"class": service.predict(features)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    loop.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        loop.join()
        server.server_close()


@contextlib.contextmanager
def fastapi_server(service: Service) -> Iterator[int]:
    """Serve with FastAPI under uvicorn: a plain `def` handler runs in a pool of threads. Gives the port."""
    import socket

    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    def predict(features: list[float]) -> dict[str, int]:
        return {"class": service.predict(features)}

    app.post("/predict")(predict)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    loop = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    loop.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        loop.join()
        listener.close()


SERVERS: dict[str, Callable[[Service], Any]] = {"threads": threaded_server, "fastapi": fastapi_server}


class Clients:
    """A few connections that stay open, each used by a thread of its own.

    Args:
        port: of the server, on the loopback.
    """

    def __init__(self, port: int) -> None:
        self._connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(CLIENTS)]
        self._body = json.dumps([index / WIDTH for index in range(WIDTH)])

    def send(self, requests: int) -> None:
        """Send `requests` requests in all, `CLIENTS` at a time.

        Raises:
            RuntimeError: an answer was not 200.
        """
        faults: list[str] = []

        def client(connection: http.client.HTTPConnection) -> None:
            try:
                for _ in range(requests // CLIENTS):
                    connection.request("POST", "/predict", self._body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    answer.read()
                    if answer.status != 200:
                        faults.append(f"answered {answer.status}")
                        return
            except OSError as error:
                faults.append(repr(error))

        threads = [threading.Thread(target=client, args=(connection,)) for connection in self._connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise RuntimeError(f"the server failed: {faults[0]}")

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()


def resident_bytes() -> int:
    """Return the memory that this process has in use now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(server: str, requests: int, *, gradients: str) -> dict[str, Any]:
    """Serve `requests` requests after a short warm-up; return what they left behind."""
    switch = gradctl.off().start() if gradients == "off" else None
    try:
        service = Service(keep=2 * requests)
        with SERVERS[server](service) as port, contextlib.closing(Clients(port)) as clients:
            clients.send(max(40, requests // 10))
            gc.collect()
            before = resident_bytes()
            clients.send(requests)
            gc.collect()
            grown = resident_bytes() - before
            live = sum(scores.grad_fn is not None for scores in service.recent)
        return {
            "server": server,
            "gradients": gradients,
            "requests": sum(service.requests_by_thread.values()),
            "workers": len(service.requests_by_thread),
            "workers_that_built_graphs": sum(count > 0 for count in service.graphs_by_thread.values()),
            "live_graphs": live,
            "resident_growth_mib": round(grown / 2**20, 2),
        }
    finally:
        if switch is not None:
            switch.remove()


def main() -> None:
    """Read the command line, serve, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", choices=sorted(SERVERS), default="threads")
    parser.add_argument("--gradients", choices=("off", "on"), default="off")
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    print(json.dumps(measure(options.server, options.requests, gradients=options.gradients)))


if __name__ == "__main__":
    main()
