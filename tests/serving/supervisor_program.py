"""A supervisor as a process of its own, to be killed.

`python -m tests.serving.supervisor_program FOLDER SETTINGS ARGS` runs one fake replica, writes a line to FOLDER/states
for every state that the replica takes, and on SIGTERM stops in order. If FOLDER/hold exists, a request stays in flight,
so the replica keeps draining.
"""

import asyncio
import json
import signal
import sys
from pathlib import Path

from serving.registry import Registry
from tests.serving.supervised import launch, supervised

NAME = "int4"


async def main(folder: Path, settings: str, *args: str) -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with supervised(folder, launch(folder, NAME, *args, **json.loads(settings))) as registry:
        telling = asyncio.create_task(tell(registry, folder / "states"))
        await stop.wait()
        if (folder / "hold").exists():
            registry.take(f"{NAME}-1")
    telling.cancel()


async def tell(registry: Registry, path: Path) -> None:
    """Write the replica's states down as they come."""
    while True:
        with path.open("a") as lines:
            lines.write(f"{registry.status(f'{NAME}-1').state}\n")
        await registry.changed()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
