"""Control requests to a replica: is it up, is it the one we think, does it generate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from serving.errors import ProbeFailed
from serving.replica import Replica

PROMPT_END_TOKENS = 32


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

    async def prompt_end(self, replica: Replica, template_kwargs: dict[str, Any]) -> str:
        """Ask what the prompt of a short chat ends in; nothing is generated for it."""
        chat = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": template_kwargs}
        with _translated(replica, "/tokenize"):
            tokens = (await self._posted(replica, "/tokenize", chat))["tokens"]
        with _translated(replica, "/detokenize"):
            return str((await self._posted(replica, "/detokenize", {"tokens": tokens[-PROMPT_END_TOKENS:]}))["prompt"])

    async def token_ids(self, replica: Replica, text: str) -> tuple[int, ...]:
        """Ask which tokens a text is to its model."""
        with _translated(replica, "/tokenize"):
            told = await self._posted(replica, "/tokenize", {"prompt": text, "add_special_tokens": False})
            return tuple(int(token) for token in told["tokens"])

    async def _posted(self, replica: Replica, path: str, body: dict[str, Any]) -> Any:
        reply = await self._client.post(
            f"{replica.url}{path}", json={"model": replica.served_name, **body}, headers=_credential(replica)
        )
        reply.raise_for_status()
        return reply.json()


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
