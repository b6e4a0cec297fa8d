"""What systemd does for a service with Type=notify and a socket unit: it opens the sockets and hears of its state."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.running import HOST, PATIENCE_SECONDS, ROOT, eventually

# Arguments: the file descriptors, their names, and the command's own. Descriptors begin at 3 (SD_LISTEN_FDS_START).
LAUNCH = """
import fcntl, os, sys
numbers = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in sys.argv[1].split(",")]
for target, number in enumerate(numbers, start=3):
    os.dup2(number, target)
    os.close(number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


@dataclass(slots=True)
class FakeServiceManager:
    """Starts a service with sockets, by name, that it keeps, and notes what the service tells."""

    sockets: Mapping[str, socket.socket]
    notifications: socket.socket
    stderr: Path
    told: list[str] = field(default_factory=list)

    async def start(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
        """Start `python ARGUMENTS`, and wait until it is ready."""
        before = self.messages().count("READY=1")
        numbers = [each.fileno() for each in self.sockets.values()]
        address = "@" + self.notifications.getsockname().removeprefix(b"\0").decode()
        with self.stderr.open("ab") as written:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", LAUNCH, ",".join(map(str, numbers)), ":".join(self.sockets), *arguments),
                cwd=ROOT,
                env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": address},
                pass_fds=numbers,
                stderr=written,
            )
        await eventually(lambda: process.returncode is not None or self.messages().count("READY=1") > before)
        return process

    def messages(self) -> list[str]:
        """Every assignment so far, oldest first, such as `READY=1`."""
        while True:
            try:
                self.told += self.notifications.recv(65536).decode().split("\n")
            except BlockingIOError:
                return self.told


@asynccontextmanager
async def service_manager(folder: Path, *names: str) -> AsyncIterator[FakeServiceManager]:
    """A service manager with a socket on a free port for each name."""
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.create_server((HOST, 0), backlog=4096)) for name in names}
        notifications = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notifications.bind("")  # the kernel chooses a name in the abstract namespace
        notifications.setblocking(False)
        yield FakeServiceManager(sockets, notifications, folder / "service.stderr")


async def stopped(process: Process) -> int:
    """Stop a process as systemd does; returns its exit code."""
    process.terminate()
    async with asyncio.timeout(2 * PATIENCE_SECONDS):
        return await process.wait()
