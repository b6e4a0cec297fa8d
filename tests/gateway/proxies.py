"""A real nginx in front of a gateway, as Debian installs it."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.fakes.running import HOST, eventually

# Locations as operators write them: the defaults of proxy_pass (HTTP/1.0 to the gateway, buffering), the block for
# websockets that many guides have, and one that keeps connections open.
LOCATIONS = {
    "default": "",
    "websockets": "proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header Upgrade $http_upgrade; "
    'proxy_set_header Connection "upgrade";',
    "keepalive": 'proxy_http_version 1.1; proxy_set_header Connection "";',
}
CONFIG = """
{user} worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream gateway {{ server {gateway}; keepalive 8; }}
  {servers}
}}
"""


def nginx() -> str | None:
    """The path of nginx, which Debian installs outside the PATH of users."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@asynccontextmanager
async def running_nginx(program: str, gateway: str) -> AsyncIterator[dict[str, str]]:
    """Run nginx in front of a gateway at `host:port`; gives the url of each location."""
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        ports = {location: _free_port() for location in LOCATIONS}
        servers = "\n".join(
            f"server {{ listen {HOST}:{port}; location / {{ proxy_pass http://gateway; {LOCATIONS[location]} }} }}"
            for location, port in ports.items()
        )
        user = "user root;" if os.geteuid() == 0 else ""
        text = CONFIG.format(user=user, folder=name, gateway=gateway, servers=servers)
        config = Path(name) / "nginx.conf"
        config.write_text(text)
        process = await asyncio.create_subprocess_exec(program, "-p", name, "-c", config)
        try:
            for port in ports.values():
                await eventually(lambda port=port: _listens(port))  # type: ignore[misc]
            yield {location: f"http://{HOST}:{port}" for location, port in ports.items()}
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True
