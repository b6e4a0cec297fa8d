"""A fake of other providers: a real process that speaks OpenAI's, Anthropic's and Bedrock's protocols.

`python -m tests.fakes.provider --port-file FILE --log FILE`. What it does is in the last words of the user, so that one
process serves all tests:

=================  ==========================================================================
`fail STATUS`      an error with that status, in the protocol's form; 429 with `retry-after: 7`
`stall`            nothing, until the client leaves
`begin and stall`  some of an answer, then nothing
`begin and die`    some of an answer, then the connection closes
`begin and end`    some of an answer, then the stream ends as if it were complete
`think`            a thought before the answer
any other          an answer: a call of the first tool if there is one, else words about what was asked
=================  ==========================================================================
"""

import argparse
import asyncio
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes.http_server import Reply, Request, Server
from tests.fakes.protocols import PROTOCOLS, Answer, Protocol
from tests.fakes.running import HOST

WEATHER = ('{"city": ', '"Paris"}')


class Provider:
    """Answers requests, and notes each of them and how it ended."""

    def __init__(self, log: Path) -> None:
        self._log = log

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        body = json.loads(request.body or b"{}")
        self._note({"path": request.path, "headers": dict(request.headers), "body": body})
        protocol = next((each for each in PROTOCOLS if each.serves(request.path)), None)
        if protocol is None:
            await reply.send_json(404, {"error": {"message": f"no such path {request.path}", "type": "not_found"}})
            return
        try:
            await self._answer(protocol, protocol.said(body), request, body, reply)
        except asyncio.CancelledError:
            self._note({"event": "aborted"})
            raise
        self._note({"event": "finished"})

    async def _answer(self, protocol: Protocol, said: str, request: Request, body: Any, reply: Reply) -> None:
        if said.startswith("fail "):
            status = int(said.split()[1])
            headers = {"retry-after": "7"} if status == 429 else {}
            await reply.send_json(status, protocol.error(status, f"it said {said}"), headers)
            return
        if said == "stall":
            await asyncio.Event().wait()
        answer = answer_to(said, protocol.tools(body))
        if not protocol.streams(request.path, body):
            await reply.send_json(200, protocol.whole(answer, body))
            return
        await reply.start_stream(protocol.stream_type, {})
        events = list(protocol.events(answer, body))
        for place, event in enumerate(events):
            if said.startswith("begin") and place == len(events) // 2:
                await _break_off(said, reply)
                return
            await reply.write(event)
        await reply.end_stream()

    def _note(self, line: Any) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def answer_to(said: str, tools: Sequence[str]) -> Answer:
    """What the model says."""
    thought = ("I ", "wonder") if said == "think" else ()
    if tools:
        return Answer(thought, (), tools[0], WEATHER)
    return Answer(thought, ("you ", "said ", *[f"{word} " for word in said.split()], "é汉"))


async def _break_off(said: str, reply: Reply) -> None:
    if said == "begin and stall":
        await asyncio.Event().wait()
    if said == "begin and end":
        await reply.end_stream()
    else:
        reply.drop()


async def serve(port_file: Path, log: Path) -> None:
    """Serve until the process is killed."""
    server = Server(Provider(log).handle, keep_alive_seconds=30.0, piece_bytes=None)
    with socket.create_server((HOST, 0)) as bound:
        await server.listen(bound)
        written = port_file.with_suffix(".new")
        written.write_text(str(bound.getsockname()[1]))
        written.rename(port_file)
        await asyncio.Event().wait()


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args(arguments)
    asyncio.run(serve(options.port_file, options.log))


if __name__ == "__main__":
    main(sys.argv[1:])
