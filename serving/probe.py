"""Control requests to a replica: is it up, is it the one we think, does it generate."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from serving.errors import ProbeFailed
from serving.replica import Replica

ENGINE_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([\d.eE+]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a replica says it serves; `max_model_len_tokens` is None where it doesn't tell."""

    name: str
    root: str
    max_model_len_tokens: int | None


class Probe:
    """An HTTP client for control requests; never used for a client's request."""

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        self._client = httpx.AsyncClient(timeout=timeout_seconds, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def healthy(self, url: str) -> bool:
        """Tell whether a server listens and calls itself healthy."""
        try:
            return (await self._client.get(f"{url}/health")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def served_model(self, replica: Replica) -> ServedModel:
        """Ask for the model that a replica answers with (the first of its names)."""
        with _translated(replica, "/v1/models"):
            reply = await self._client.get(f"{replica.url}/v1/models", headers=_credential(replica))
            reply.raise_for_status()
            first = reply.json()["data"][0]
            return ServedModel(first["id"], first.get("root") or "", first.get("max_model_len"))

    async def generate_one_token(self, replica: Replica, timeout_seconds: float = 60.0) -> None:
        """Have it produce a single token, which also warms it; ProbeFailed if it can't."""
        body: dict[str, Any] = {"model": replica.served_name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        with _translated(replica, "/v1/completions"):
            reply = await self._client.post(
                f"{replica.url}/v1/completions", json=body, headers=_credential(replica), timeout=timeout_seconds
            )
            reply.raise_for_status()
            if reply.json()["usage"]["completion_tokens"] < 1:
                raise ProbeFailed(f"{replica.id}: generated no token")

    async def requests_in_engine(self, replica: Replica) -> int | None:
        """Count what a replica is answering for anybody; None if it doesn't tell."""
        try:
            load = await self._client.get(f"{replica.url}/load", headers=_credential(replica))
            gauges = await self._client.get(f"{replica.url}/metrics", headers=_credential(replica))
        except httpx.HTTPError:
            return None
        if load.is_error and gauges.is_error:
            return None
        # The gauges lag a step behind and don't know what is being tokenised; /load doesn't know every endpoint.
        return max(_server_load(load), engine_requests(gauges.text))


def engine_requests(exposition: str) -> int:
    """Add up what vLLM's /metrics says of running and waiting requests, over all engines of a server."""
    return round(sum(float(value) for value in ENGINE_REQUESTS.findall(exposition)))


def _server_load(reply: httpx.Response) -> int:
    try:
        return int(reply.json()["server_load"])
    except (ValueError, LookupError, TypeError):
        return 0


def _credential(replica: Replica) -> dict[str, str]:
    return {"authorization": f"Bearer {replica.api_key}"} if replica.api_key else {}


@contextmanager
def _translated(replica: Replica, what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ProbeFailed(f"{replica.id}: {what} answered {error.response.status_code}") from error
    except httpx.HTTPError as error:
        raise ProbeFailed(f"{replica.id}: {what}: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ProbeFailed(f"{replica.id}: {what} answered something that is not vLLM's") from error
