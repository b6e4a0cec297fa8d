"""A port and the server behind it, for as long as an `async with` block runs."""

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
    """Tells when it listens, and leaves signals to the process that owns several servers."""

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
    """Take a port now, so that one in use is told before anything is started; `shared` with other workers of ours."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, int(port)))
        # With SO_REUSEADDR two may bind one port; only one of them may listen.
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{option}: can't listen on {address}: {error.strerror}; stop its owner or change it"
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Tell host:port, the real one where port 0 was asked for."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def listen(app: App, listening: socket.socket) -> AsyncIterator[None]:
    """Serve an app; at the end, running requests may finish for a while."""
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
