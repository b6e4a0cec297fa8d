"""A fake vLLM 0.32 replica: a real process with a real socket, vLLM's words on the wire, and misbehaviour by flag.

Run it as `python -m tests.fakes.vllm --model DIR --served-model-name m1 --port 8000 --fake-tokens 50`.
`--fake-crash-after-requests N` lets N generations through; the next one takes the engine down half-way.
SIGUSR1 lets everything go on that `--fake-stall-...` holds: a test decides how long a stream lasts, no clock does.
`POST /fake/metrics {"rename": {"vllm:num_requests_running": "vllm:other"}, "stall": true}` spoils the page of metrics.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fakes.engine import Engine, Journal
from tests.fakes.http_server import Server
from tests.fakes.options import Options, parse
from tests.fakes.replica import Replica

DYING_SECONDS = 1.0
# The orphan that a SIGKILL leaves behind goes away by itself in the end, should a test forget it.
CHILD_PROGRAM = "import time; time.sleep(600)"


def main(argv: Sequence[str]) -> int:
    """Start like vLLM, serve until SIGTERM or the engine's death, and give the exit code."""
    options = parse(argv, os.environ)
    life = options.life
    if life.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Bound long before it listens: a taken port fails early, and clients are refused until all is ready.
    with _bind(options.host, options.port) as bound, _engine_core(options):
        _log("INFO", f"vLLM API server version 0.32.0, model {options.model}")
        if life.port_file is not None:
            _announce(bound.getsockname()[1], life.port_file)
        time.sleep(life.start_delay)
        if life.exit_while_starting is not None:
            _log("ERROR", "EngineCore failed to start.")
            print(life.last_words, file=sys.stderr, flush=True)
            return life.exit_while_starting
        return asyncio.run(_serve(options, bound))


async def _serve(options: Options, bound: socket.socket) -> int:
    journal = Journal(options.life.log_requests)
    engine = Engine(options, journal)
    server = Server(
        Replica(options, engine, journal).handle,
        keep_alive_seconds=options.keep_alive_seconds,
        piece_bytes=options.life.split_bytes,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, engine.resume)
    stopping = _stop_signal(ignore_sigterm=options.life.ignore_sigterm)
    await server.listen(bound)
    _log("INFO", f"Started server process [{os.getpid()}]")
    _log("INFO", "Application startup complete.")
    await _first(engine.dead.wait(), stopping.wait())
    if engine.dead.is_set():
        _log("ERROR", "EngineCore encountered a fatal error.")
        patience, code = DYING_SECONDS, options.life.exit_code
    else:
        _log("INFO", "[shutdown] API server: shutdown triggered")
        # /health stays 200, and what comes now is refused with a 500 (vLLM says no more than that).
        engine.draining = True
        patience, code = options.shutdown_timeout_seconds, 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            await server.quiet()
    await server.stop()
    return code


def _stop_signal(*, ignore_sigterm: bool) -> asyncio.Event:
    """Set by SIGTERM or SIGINT. Before there is a loop to set it, SIGTERM kills (-15), as it does with vLLM."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stopping.set)
    if not ignore_sigterm:
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
    return stopping


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.create_task(each) for each in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # uvloop, which vLLM runs on, sets it for every connection; without it the kernel holds chunks back for 40 ms.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.bind((host, port))
    return bound


def _announce(port: int, path: Path) -> None:
    """Readers see the whole number or no file."""
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(f"{port}\n", encoding="ascii")
    written.replace(path)


@contextlib.contextmanager
def _engine_core(options: Options) -> Iterator[None]:
    """A child in our session that ends with us, unless we are killed: then it stays, like vLLM's EngineCore."""
    if not options.life.spawn_child:
        yield
        return
    with subprocess.Popen([sys.executable, "-S", "-E", "-c", CHILD_PROGRAM, "VLLM::EngineCore"]) as child:
        _log("INFO", f"Started EngineCore process [{child.pid}]")
        try:
            yield
        finally:
            child.kill()


def _log(level: str, message: str) -> None:
    when = time.strftime("%m-%d %H:%M:%S")
    print(f"(APIServer pid={os.getpid()}) {level} {when} [fake] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
