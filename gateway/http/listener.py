"""Uvicorn as an async context manager for the admin port."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.http.asgi import App
from gateway.http.interfaces import ClientTimeouts
from gateway.http.sockets import address_of

# Short: the process may be killed KILL_AFTER_SECONDS after the clients' port has drained (gateway/workers.py).
GRACE_SECONDS = 3
# After that connections are aborted; a handler that does not notice is cancelled this much later.
CANCEL_SECONDS = 1
KEEP_ALIVE_SECONDS = 75
START_SECONDS = 10


class _Config(uvicorn.Config):
    """Settings of uvicorn, and for how long a connection waits for its reader."""

    def __init__(self, app: App, slow_reader_seconds: float) -> None:
        self.slow_reader_seconds = slow_reader_seconds
        super().__init__(
            app,
            http=_Connection,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS + CANCEL_SECONDS,
        )


class _Connection(HttpToolsProtocol):
    """A connection that is aborted if its reader does not read on in time; uvicorn would wait for ever."""

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._slow_reader_seconds = config.slow_reader_seconds
        self._abort_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The write buffer is full: the reader has `slow_reader_seconds` from now on."""
        super().pause_writing()
        self._abort_timer = self.loop.call_later(self._slow_reader_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader reads on."""
        self._cancel_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is written any more."""
        self._cancel_timer()
        super().connection_lost(exc)

    def _cancel_timer(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None


class AdminServer(uvicorn.Server):
    """A uvicorn server that signals when it listens and installs no signal handlers: the process owns several."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    def stop_accepting(self) -> None:
        """Accept no more connections, close the idle ones, and the others after their responses."""
        self.should_exit = True

    def abort_connections(self) -> None:
        """Close what is open without sending the rest; handlers learn that their client has left."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listen(
    app: App, listening: socket.socket, timeouts: ClientTimeouts | None = None
) -> AsyncIterator[AdminServer]:
    """Serve an ASGI app with uvicorn; on exit, running requests have GRACE_SECONDS to finish.

    Of the timeouts, `slow_reader_seconds` is used.
    """
    server = AdminServer(_Config(app, (timeouts or ClientTimeouts()).slow_reader_seconds))
    task = asyncio.create_task(server.serve([listening]), name=f"listen {address_of(listening)}")
    try:
        await asyncio.wait_for(server.listening.wait(), START_SECONDS)
        yield server
    finally:
        server.stop_accepting()
        await asyncio.wait({task}, timeout=GRACE_SECONDS)
        server.abort_connections()
        await task
