"""What is asked of every contender, and whom it is asked of."""

import json
from dataclasses import dataclass

PATH = "/v1/chat/completions"
CONNECTIONS = 32
_QUESTION = "Tell me how the tide knows when to turn, and who told it. " * 5


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request: whole answers, or streams of so many chunks, so far apart."""

    name: str
    chunks: int = 0
    gap_ms: int = 0

    def body(self, model: str) -> bytes:
        """Write the request."""
        asked = {
            "model": model,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": _QUESTION}],
            "max_tokens": self.chunks or 64,
            "seed": self.gap_ms,
            "temperature": 0.7,
        }
        # Without blanks, as SDKs write it.
        return json.dumps({**asked, "stream": True} if self.chunks else asked, separators=(",", ":")).encode()


PLAIN = Load("plain request")
BURST = Load("stream of 64 chunks at once", 64)
SPACED = Load("stream of 100 chunks, 4 ms apart", 100, 4)
LOADS = (PLAIN, BURST, SPACED)


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that answers; `pid` is None for the upstream itself, whose CPU is nobody's overhead."""

    name: str
    host: str
    port: int
    model: str
    key: str
    pid: int | None = None

    def request(self, load: Load) -> bytes:
        """Write a whole HTTP request."""
        return self.with_body(load.body(self.model))

    def with_body(self, body: bytes) -> bytes:
        """Write a whole HTTP request for a body."""
        return (
            f"POST {PATH} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
