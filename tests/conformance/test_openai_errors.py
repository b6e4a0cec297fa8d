"""Which status is which exception, with what in it, and whether the SDK tries again: of three generations of SDKs."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.keys import StoredKey, keys_in_force
from tests.conformance.clients import OPENAI, called
from tests.conformance.rows import rows
from tests.gateway.wire import Behaviour, Peer, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO = [{"role": "user", "content": "hello there"}]


def digest(key: str) -> str:
    """What the gateway keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = keys_in_force(
    {
        "all": StoredKey(sha256=(digest("qg-all"),)),
        "few": StoredKey(sha256=(digest("qg-few"),), aliases=("only-this",)),
    }
)


def always(status: str) -> Behaviour:
    """Refuse every request in vLLM's shape, with words that may or may not get out."""
    error = {"message": "the engine said so", "type": "BadRequestError", "param": None, "code": int(status[:3])}
    reply = whole(json.dumps({"error": error}).encode(), status)

    async def behaviour(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(reply)

    return behaviour


async def silent(peer: Peer) -> None:
    """Never answer."""
    await peer.left()


REPLICAS: dict[str, Behaviour | None] = {
    "only-this": always("400 Bad Request"),
    "nobody": None,
    "silent": silent,
    **{
        f"says-{status[:3]}": always(status)
        for status in (
            *("400 Bad Request", "409 Conflict", "422 Unprocessable Entity", "429 Too Many Requests", "408 Timeout"),
            *("500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"),
        )
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """A call, and what comes of it; the SDK may try once more."""

    name: str
    error: str
    status: int
    code: str | None
    retries: int = 0
    allowed: int = 1
    call: str = "chat"
    key: str = "qg-all"
    arguments: dict[str, Any] = field(default_factory=dict)
    words: str = ""

    def as_call(self, *, sync: bool) -> dict[str, Any]:
        """What the client is told to do."""
        usual = {"model": self.name, "messages": HELLO} if self.call == "chat" else {}
        arguments = {**usual, **self.arguments}
        given = {"sdk": "openai", "call": self.call, "key": self.key, "retries": self.allowed}
        return {**given, "sync": sync, "arguments": arguments}


ROWS = (
    Row("says-400", "BadRequestError", 400, "invalid_request", words="the engine said so"),
    Row("says-400", "BadRequestError", 400, "invalid_request", arguments={"n": 10**6}, words="'n' is"),
    Row("says-400", "AuthenticationError", 401, "invalid_api_key", key="sk-other", words="not known"),
    Row("says-400", "PermissionDeniedError", 403, "model_not_allowed", key="qg-few"),
    Row("gpt-4o", "NotFoundError", 404, "model_not_found", words="does not exist"),
    Row("", "NotFoundError", 404, None, call="post", arguments={"path": "/nowhere", "body": {}}),
    Row("", "APIStatusError", 405, None, call="post", arguments={"path": "/models", "body": {}}),
    Row("says-409", "ConflictError", 409, "invalid_request", retries=1),
    Row("says-400", "APIStatusError", 413, "request_too_large", arguments={"user": "x" * 34 * 2**20}),
    Row("says-422", "UnprocessableEntityError", 422, "invalid_request", words="the engine said so"),
    Row("says-429", "RateLimitError", 429, "queue_timeout", retries=1),
    Row("says-503", "RateLimitError", 429, "queue_timeout", allowed=0),
    Row("says-500", "InternalServerError", 502, "upstream_error"),
    Row("says-502", "InternalServerError", 502, "upstream_error"),
    Row("says-504", "InternalServerError", 502, "upstream_error"),
    Row("nobody", "InternalServerError", 503, "no_ready_replica", allowed=0),
    Row("silent", "InternalServerError", 504, "upstream_timeout", arguments={"stream": True}),
)


# Whether the SDK is told to try again, or not to; by its own rules otherwise.
RETRY = {429: "true", 503: "true", 502: "false", 504: "false"}


@pytest.mark.parametrize("client", OPENAI)
async def test_errors(client: str) -> None:
    """Every row, asynchronous and not, by one process."""
    calls = [(row, sync) for row in ROWS for sync in (False, True) if not (sync and row.status in {413, 429})]
    async with rows(REPLICAS, KEYS) as fleet:
        results = await called(client, fleet.url, [row.as_call(sync=sync) for row, sync in calls])
    told = [(row, result.get("error") or {}) for (row, _), result in zip(calls, results, strict=True)]
    assert [(row, error) for row, error in told if not fits(row, error)] == []


def fits(row: Row, error: dict[str, Any]) -> bool:
    """Tell whether an exception is what a row says, and may be shown and acted on."""
    if (error.get("class"), error.get("status_code")) != (row.error, row.status):
        return False
    if error["headers"].get("x-should-retry") != RETRY.get(row.status):
        return False
    if row.status in {429, 503} and not 1 <= int(error["headers"]["retry-after"]) <= 120:
        return False
    return (
        error["code"] == (error["code"] if row.code is None else row.code)
        and error["retries"] == row.retries
        and row.words in error["text"]
        and bool(error["type"])
        and error["request_id"] == error["headers"]["x-request-id"]
        and (row.status < 500 or "the engine said so" not in error["text"])
    )
