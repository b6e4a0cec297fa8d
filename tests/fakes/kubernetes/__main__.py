"""A fake Kubernetes API server: a real process, steered by `POST /fake/...` (see `FakeCluster`, which a test uses).

`python -m tests.fakes.kubernetes --port 0 --port-file FILE --log FILE [--state FILE] [--certificate FILE --key FILE]`.
With a state file, a process that is started again knows what the last one knew.

| path              | body                                                                                      |
| ----------------- | ----------------------------------------------------------------------------------------- |
| `/fake/workloads` | a `workloads.Workload`, and `replicas`                                                    |
| `/fake/reshuffle` | `kind`, `namespace`, `name`, `endpoints_per_slice`, `delete_first`, `duplicated`          |
| `/fake/faults`    | `tokens`, `refusals`, `silent`, ...; see `faults.Faults`                                  |
| `/fake/streams`   | `action`: what every open watch does now; see `watches`                                   |
| `/fake/compact`   | nothing: the history is forgotten                                                         |
"""

import argparse
import asyncio
import json
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes.http_server import Reply, Request, Server
from tests.fakes.kubernetes.api import Api
from tests.fakes.kubernetes.failures import ApiFailure
from tests.fakes.kubernetes.faults import Faults
from tests.fakes.kubernetes.store import Key, Store, StreamFault, load
from tests.fakes.kubernetes.workloads import WORKLOADS, Controllers
from tests.fakes.running import HOST

STEERING = "/fake/"


class ApiServer:
    """Answers requests, those that steer it included, and notes all others."""

    def __init__(self, store: Store, log: Path) -> None:
        self._store = store
        self._log = log
        self._faults = Faults()
        self._controllers = Controllers(store)
        self._api = Api(store, self._controllers, self._faults)

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        if request.path.startswith(STEERING):
            self._steer(request.path.removeprefix(STEERING), json.loads(request.body or b"{}"))
            await reply.send_json(200, {})
            return
        self._note(request)
        await self._faults.silence()
        try:
            await self._api.answer(request, reply)
        except ApiFailure as failure:
            await reply.send_json(failure.code, failure.status(), failure.headers)

    def _steer(self, what: str, asked: dict[str, Any]) -> None:
        match what:
            case "workloads":
                self._controllers.add(
                    {name: each for name, each in asked.items() if name != "replicas"}, asked["replicas"]
                )
            case "reshuffle":
                key = Key(WORKLOADS[asked.pop("kind")], asked.pop("namespace"), asked.pop("name"))
                self._controllers.reshuffle(key, **asked)
            case "faults":
                self._faults.change(asked)
            case "streams":
                self._store.publish(StreamFault(asked["action"]))
            case "compact":
                self._store.compact()
            case _:
                raise ValueError(f"nothing is steered by {what!r}")

    def _note(self, request: Request) -> None:
        body = json.loads(request.body) if request.body else None
        line = {"method": request.method, "path": request.path, "query": request.query, "body": body}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({**line, "headers": dict(request.headers)}) + "\n")


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is killed."""
    api_server = ApiServer(load(options.state), options.log)
    server = Server(api_server.handle, keep_alive_seconds=30.0, piece_bytes=None)
    tls = None
    if options.certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(options.certificate, options.key)
    with socket.create_server((HOST, options.port)) as bound:
        await server.listen(bound, tls)
        written = options.port_file.with_suffix(".new")
        written.write_text(str(bound.getsockname()[1]))
        written.rename(options.port_file)
        await asyncio.Event().wait()


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser("fake kubernetes", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    asyncio.run(serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
