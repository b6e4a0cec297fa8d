"""Runs the heavy steps of the demo as child processes, by the same command lines that a user would type."""

import asyncio
import os
import signal
import sys
from contextlib import suppress

from gateway.errors import GatewayError
from serving.process import kill_session

STOP_SECONDS = 15.0  # between SIGTERM and SIGKILL


class SubprocessFailed(GatewayError):
    """A child process failed; it has printed its error to stderr."""

    def __init__(self, step: str, exit_code: int) -> None:
        super().__init__(f"{step} failed with exit code {exit_code}")
        self.exit_code = exit_code


async def run_module(step: str, module: str, *arguments: str) -> str:
    """Run `python -m module arguments` and return its stdout; its stderr, with its progress, goes to the terminal.

    `step` names the process in errors. On cancellation the process gets SIGTERM, then its whole session SIGKILL.
    Raises SubprocessFailed.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C on a terminal then reaches the demo only, which stops the child in order.
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
        await kill_session(process.pid)
    if process.returncode:
        raise SubprocessFailed(step, process.returncode)
    return output.decode()
