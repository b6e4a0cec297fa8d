"""Listening sockets, and uvicorn as an async context manager for the admin port."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn

from config.errors import ConfigError
from gateway.http.asgi import App

GRACE_SECONDS = 30
KEEP_ALIVE_SECONDS = 75
START_SECONDS = 10


class _Server(uvicorn.Server):
    """A uvicorn server that signals when it listens and installs no signal handlers: the process owns several."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(address: str, option: str, *, shared: bool = False) -> socket.socket:
    """Bind and listen on `host:port` at once: a port in use is reported before anything else starts.

    `option` is the configuration key for the error message; `shared` sets SO_REUSEPORT, for several workers.
    Raises ConfigError.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, int(port)))
        # With SO_REUSEADDR two sockets can bind the same port, but only one of them can listen.
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{option}: can't listen on {address}: {error.strerror}; free the port or change {option}"
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Return `host:port` of a listening socket, with the port that the kernel chose for port 0."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def listen(app: App, listening: socket.socket) -> AsyncIterator[None]:
    """Serve an ASGI app with uvicorn; on exit, running requests have GRACE_SECONDS to finish."""
    config = uvicorn.Config(
        app,
        http="httptools",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listening]), name=f"listen {address_of(listening)}")
    try:
        await asyncio.wait_for(server.listening.wait(), START_SECONDS)
        yield
    finally:
        server.should_exit = True
        await task
