"""Control requests to a replica: health, served model, generation, metrics."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from serving.clients import Clients, root_of
from serving.errors import ProbeFailed
from serving.replica import Replica
from serving.templates.tool_calling import TOOL
from serving.tls import Tls

ENGINE_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([\d.eE+]+)", re.MULTILINE)
PROMPT_END_TOKENS = 32
UNKNOWN_PATH = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that a replica reports; `max_model_len_tokens` is None if it does not report it.

    `adapters` are the directories of its LoRA adapters, by name.
    """

    name: str
    root: str
    max_model_len_tokens: int | None
    adapters: Mapping[str, str] = field(default_factory=dict)


class _Card(msgspec.Struct, frozen=True):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Card, ...]


@dataclass(frozen=True, slots=True)
class Activity:
    """An engine's requests (running and waiting) and tokens (prompt and generated, in total), from `/metrics`."""

    requests: float
    tokens: float


_REQUEST_METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_TOKEN_METRICS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


def read_activity(page: str) -> Activity:
    """Sum the metrics of all engines of a server; ValueError if a metric is missing."""
    sums = dict.fromkeys((*_REQUEST_METRICS, *_TOKEN_METRICS), 0.0)
    missing = set(sums)
    for line in page.splitlines():
        name = line.partition("{")[0]
        if name in sums:
            sums[name] += float(line.rpartition(" ")[2])
            missing.discard(name)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} in its metrics")
    return Activity(sum(sums[name] for name in _REQUEST_METRICS), sum(sums[name] for name in _TOKEN_METRICS))


class Probe:
    """An HTTP client for control requests; never used for a client's request."""

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        self._clients = Clients(httpx.Timeout(timeout_seconds))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._clients.aclose()

    async def healthy(self, url: str, tls: Tls | None = None) -> bool:
        """Whether `/health` answers 200."""
        try:
            reply = await self._clients.reaching(url, tls).get(f"{root_of(url)}/health")
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    async def served_model(self, replica: Replica) -> ServedModel:
        """Return the first model of `/v1/models`, and the adapters of it; ProbeFailed if that fails."""
        with _translated(replica, "/v1/models"):
            reply = await self._get(replica, "/v1/models")
            reply.raise_for_status()
            first, *others = msgspec.json.decode(reply.content, type=_Models).data
            # Cards of further names of the base model have no parent.
            adapters = {other.id: other.root or "" for other in others if other.parent}
            return ServedModel(first.id, first.root or "", first.max_model_len, adapters)

    async def generate_one_token(self, replica: Replica, timeout_seconds: float = 60.0) -> str | None:
        """Generate one token (which warms the engine up) and return the system fingerprint; ProbeFailed if it fails."""
        with _translated(replica, "/v1/completions"):
            completion = await self._complete(replica, timeout_seconds, prompt="Hello")
            if completion["usage"]["completion_tokens"] < 1:
                raise ProbeFailed(f"{replica.id}: generated no token")
            fingerprint: str | None = completion.get("system_fingerprint")
            return fingerprint

    async def prompt_logprobs(
        self, replica: Replica, ids: Sequence[int], timeout_seconds: float = 120.0
    ) -> list[float]:
        """Return the log-probability of each prompt token but the first, given those before it."""
        with _translated(replica, "/v1/completions"):
            completion = await self._complete(replica, timeout_seconds, prompt=list(ids), prompt_logprobs=0)
            positions = completion["choices"][0]["prompt_logprobs"][1:]
            return [float(position[str(token)]["logprob"]) for token, position in zip(ids[1:], positions, strict=True)]

    async def scored_tokens(
        self, replica: Replica, ids: Sequence[int], timeout_seconds: float = 120.0
    ) -> list[tuple[float, int]]:
        """Return log-probability and rank (1: most likely) of each prompt token but the first, given those before."""
        with _translated(replica, "/v1/completions"):
            completion = await self._complete(replica, timeout_seconds, prompt=list(ids), prompt_logprobs=0)
            positions = completion["choices"][0]["prompt_logprobs"][1:]
            found = [position[str(token)] for token, position in zip(ids[1:], positions, strict=True)]
            return [(float(each["logprob"]), int(each["rank"])) for each in found]

    async def chat_tokens(self, replica: Replica, messages: Any) -> list[int]:
        """Return the tokens of a chat's prompt."""
        with _translated(replica, "/tokenize"):
            return [int(token) for token in (await self._post(replica, "/tokenize", {"messages": messages}))["tokens"]]

    async def activity(self, replica: Replica) -> Activity:
        """Return the requests and tokens of a replica; ProbeFailed if its metrics cannot be read."""
        with _translated(replica, "/metrics"):
            reply = await self._get(replica, "/metrics")
            reply.raise_for_status()
            return read_activity(reply.text)

    async def _complete(self, replica: Replica, timeout_seconds: float, **fields: Any) -> dict[str, Any]:
        body = {"model": replica.served_name, "max_tokens": 1, "temperature": 0, **fields}
        reply = await self._post_within(replica, "/v1/completions", body, timeout_seconds)
        reply.raise_for_status()
        completion: dict[str, Any] = reply.json()
        return completion

    async def _post_within(
        self, replica: Replica, path: str, body: dict[str, Any], timeout_seconds: float
    ) -> httpx.Response:
        url, headers = f"{root_of(replica.url)}{path}", _credential(replica)
        client = self._clients.reaching(replica.url, replica.tls)
        return await client.post(url, json=body, headers=headers, timeout=timeout_seconds)

    async def requests_in_engine(self, replica: Replica) -> int | None:
        """Return the number of requests of a replica, from all senders; None if it cannot be read."""
        try:
            load = await self._get(replica, "/load")
            gauges = await self._get(replica, "/metrics")
        except httpx.HTTPError:
            return None
        if load.is_error and gauges.is_error:
            return None
        # The gauges lag by a step and don't count requests that are being tokenized; /load doesn't count all endpoints.
        return max(_server_load(load), engine_requests(gauges.text))

    async def takes_tools(self, replica: Replica, timeout_seconds: float = 10.0) -> bool | None:
        """Whether a replica accepts requests with tools; None if that is unknown.

        vLLM rejects them, even for token counting, unless it was started with a tool call parser. An engine without
        Anthropic's endpoint for counting gets a chat request for one token instead.
        """
        body = {"model": replica.served_name, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
        function = TOOL["function"]
        counted = {"name": function["name"], "input_schema": function["parameters"]}
        try:
            reply = await self._post_within(
                replica, "/v1/messages/count_tokens", body | {"tools": [counted]}, timeout_seconds
            )
            if reply.status_code in UNKNOWN_PATH:
                reply = await self._post_within(
                    replica, "/v1/chat/completions", body | {"tools": [TOOL]}, timeout_seconds
                )
        except httpx.HTTPError:
            return None
        return True if reply.is_success else (False if "tool" in reply.text else None)

    async def prompt_end(self, replica: Replica, template_kwargs: dict[str, Any]) -> str:
        """Return the end of the rendered prompt of a short chat, without generating."""
        chat = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": template_kwargs}
        with _translated(replica, "/tokenize"):
            tokens = (await self._post(replica, "/tokenize", chat))["tokens"]
        with _translated(replica, "/detokenize"):
            return str((await self._post(replica, "/detokenize", {"tokens": tokens[-PROMPT_END_TOKENS:]}))["prompt"])

    async def token_ids(self, replica: Replica, text: str) -> tuple[int, ...]:
        """Tokenize a text with the model of a replica."""
        with _translated(replica, "/tokenize"):
            reply = await self._post(replica, "/tokenize", {"prompt": text, "add_special_tokens": False})
            return tuple(int(token) for token in reply["tokens"])

    async def _post(self, replica: Replica, path: str, body: dict[str, Any]) -> Any:
        client = self._clients.reaching(replica.url, replica.tls)
        body = {"model": replica.served_name, **body}
        reply = await client.post(f"{root_of(replica.url)}{path}", json=body, headers=_credential(replica))
        reply.raise_for_status()
        return reply.json()

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        client = self._clients.reaching(replica.url, replica.tls)
        return await client.get(f"{root_of(replica.url)}{path}", headers=_credential(replica))


def engine_requests(exposition: str) -> int:
    """Sum the running and waiting requests of all engines in vLLM's /metrics."""
    return round(sum(float(value) for value in ENGINE_REQUESTS.findall(exposition)))


def _server_load(reply: httpx.Response) -> int:
    try:
        return int(reply.json()["server_load"])
    except (ValueError, LookupError, TypeError, RecursionError):
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
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ProbeFailed(f"{replica.id}: {what} answered something that is not vLLM's") from error
