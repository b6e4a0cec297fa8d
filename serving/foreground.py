"""A verb that runs in the foreground until a signal stops it."""

import asyncio
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import uvloop

from config.errors import ConfigError
from serving.errors import LaunchRefused, LockHeld, TakeoverRefused

USAGE, LOCKED = 2, 4

log = logging.getLogger(__name__)


def run_until_signal(start: Callable[[], AbstractAsyncContextManager[object]]) -> int:
    """Run until SIGINT or SIGTERM, then shut down in order; a start that has not ended by then is cancelled.

    Exit codes: 0; 2 if the configuration is at fault, or a gateway cannot be taken over; 4 if another process holds the
    lock.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    raise_file_limit()
    try:
        uvloop.run(_run(start))
    except (ConfigError, LaunchRefused, LockHeld, TakeoverRefused) as error:
        print(f"quantgate: {error}", file=sys.stderr)  # noqa: T201
        return LOCKED if isinstance(error, LockHeld) else USAGE
    return 0


def raise_file_limit() -> None:
    """Raise the soft limit on open files to the hard one: each connection is a file, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit on open files stays %d: %s", soft, error)


async def _run(start: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    async with stop_signal() as stop:
        async with AsyncExitStack() as running:
            async with cancelled_at(stop):
                await running.enter_async_context(start())
            await stop.wait()
        log.info("stopped")


@asynccontextmanager
async def cancelled_at(stop: asyncio.Event) -> AsyncIterator[None]:
    """Cancel the block when the event is set, and go on after it.

    A process that is stopped while it starts must not finish that first: it may take over from another one.
    """
    loop = asyncio.get_running_loop()

    async def watch(limit: asyncio.Timeout) -> None:
        await stop.wait()
        limit.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(watch(limit), name="stop signal")
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if not limit.expired():
            raise


@asynccontextmanager
async def stop_signal(*others: signal.Signals) -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT, SIGTERM or one of `others` sets; SIGHUP does nothing until something else handles it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.info("%s: stopping already, after the running requests; SIGKILL does not wait", number.name)
        else:
            log.info("%s: stopping", number.name)
        stop.set()

    # The default action of SIGHUP would end a process that does not follow its configuration yet.
    loop.add_signal_handler(signal.SIGHUP, log.info, "SIGHUP: still starting, nothing to reload")
    for number in (signal.SIGINT, signal.SIGTERM, *others):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
