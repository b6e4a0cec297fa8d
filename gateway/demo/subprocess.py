"""Child processes that do the heavy steps, the way a person would call them."""

import asyncio
import os
import signal
import sys
from contextlib import suppress

from gateway.errors import GatewayError
from serving.process import kill_session

PATIENCE_SECONDS = 15.0


class SubprocessFailed(GatewayError):
    """A step ended with an error, which it has told on stderr itself."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(f"{what} failed with exit code {exit_code}")
        self.exit_code = exit_code


async def run_module(what: str, module: str, *arguments: str) -> str:
    """Run `python -m module arguments` and return its stdout; stderr goes to the terminal.

    A cancelled errand is told to stop, and ended whole if it doesn't.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C on the terminal reaches the demo alone, which then stops its errand in an orderly way.
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), PATIENCE_SECONDS)
        await kill_session(process.pid)
    if process.returncode:
        raise SubprocessFailed(what, process.returncode)
    return output.decode()
