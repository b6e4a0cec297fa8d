"""Tells systemd, or another service manager with the same protocol, how the service is, see sd_notify(3)."""

import logging
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The socket of a service manager; without one, nothing is sent."""

    address: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "ServiceManager":
        """Return the service manager that has started a process with this environment, if it wants to be told."""
        return cls(environment.get("NOTIFY_SOCKET", ""))

    def ready(self, status: str) -> None:
        """Say that the service listens, or that it has reloaded; `status` is for people."""
        self._notify("READY=1", f"STATUS={status}")

    def stopping(self) -> None:
        """Say that the service shuts down."""
        self._notify("STOPPING=1", "STATUS=running requests finish")

    @contextmanager
    def reloading(self, status: str) -> Iterator[None]:
        """Say that the configuration is read again while the block runs."""
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.ready(status)

    def _notify(self, *lines: str) -> None:
        if not self.address:
            return
        # A name that begins with @ is in the abstract namespace, unix(7).
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("the service manager at %s does not listen: %s", self.address, error.strerror)
