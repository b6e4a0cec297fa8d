"""A verb that runs until somebody stops it."""

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import uvloop

from config.errors import ConfigError
from serving.errors import LaunchRefused, LockHeld

USAGE, LOCKED = 2, 4


def run_until_signal(start: Callable[[], AbstractAsyncContextManager[object]]) -> int:
    """Run until SIGINT or SIGTERM, then shut down in order.

    Exit codes: 0; 2 if the configuration is at fault; 4 if another process holds the lock.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        uvloop.run(_run(start))
    except (ConfigError, LaunchRefused, LockHeld) as error:
        print(f"quantgate: {error}", file=sys.stderr)  # noqa: T201
        return LOCKED if isinstance(error, LockHeld) else USAGE
    return 0


async def _run(start: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    async with stop_signal() as stop, start():
        await stop.wait()


@asynccontextmanager
async def stop_signal() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT or SIGTERM sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
