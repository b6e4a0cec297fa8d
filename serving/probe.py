"""Control requests to a replica: is it up, is it the one we think, does it generate."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

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
    """What a replica says it serves; `max_model_len_tokens` is None where it doesn't tell."""

    name: str
    root: str
    max_model_len_tokens: int | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What `/metrics` tells of an engine's work: requests that it has, and tokens that it has read or made."""

    requests: float
    tokens: float


_BURDEN = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_WORK = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


def read_activity(page: str) -> Activity:
    """Add up a page of metrics over its engines; ValueError if one of the four is not there."""
    sums = dict.fromkeys((*_BURDEN, *_WORK), 0.0)
    missing = set(sums)
    for line in page.splitlines():
        name = line.partition("{")[0]
        if name in sums:
            sums[name] += float(line.rpartition(" ")[2])
            missing.discard(name)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} in its metrics")
    return Activity(sum(sums[name] for name in _BURDEN), sum(sums[name] for name in _WORK))


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
        """Tell whether a server listens and calls itself healthy."""
        try:
            reply = await self._clients.reaching(url, tls).get(f"{root_of(url)}/health")
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    async def served_model(self, replica: Replica) -> ServedModel:
        """Ask for the model that a replica answers with (the first of its names)."""
        with _translated(replica, "/v1/models"):
            reply = await self._got(replica, "/v1/models")
            reply.raise_for_status()
            first = reply.json()["data"][0]
            return ServedModel(first["id"], first.get("root") or "", first.get("max_model_len"))

    async def generate_one_token(self, replica: Replica, timeout_seconds: float = 60.0) -> str | None:
        """Have it produce a single token, which also warms it, and give its fingerprint; ProbeFailed if it can't."""
        with _translated(replica, "/v1/completions"):
            told = await self._completed(replica, timeout_seconds, prompt="Hello")
            if told["usage"]["completion_tokens"] < 1:
                raise ProbeFailed(f"{replica.id}: generated no token")
            fingerprint: str | None = told.get("system_fingerprint")
            return fingerprint

    async def prompt_logprobs(
        self, replica: Replica, ids: Sequence[int], timeout_seconds: float = 120.0
    ) -> list[float]:
        """Ask how likely each token of a prompt is after those before it: log-probabilities of all but the first."""
        with _translated(replica, "/v1/completions"):
            told = await self._completed(replica, timeout_seconds, prompt=list(ids), prompt_logprobs=0)
            places = told["choices"][0]["prompt_logprobs"][1:]
            return [float(place[str(token)]["logprob"]) for token, place in zip(ids[1:], places, strict=True)]

    async def activity(self, replica: Replica) -> Activity:
        """Read how much a replica has to do, and how much it has done so far."""
        with _translated(replica, "/metrics"):
            reply = await self._got(replica, "/metrics")
            reply.raise_for_status()
            return read_activity(reply.text)

    async def _completed(self, replica: Replica, timeout_seconds: float, **asked: Any) -> dict[str, Any]:
        body = {"model": replica.served_name, "max_tokens": 1, "temperature": 0, **asked}
        reply = await self._asked(replica, "/v1/completions", body, timeout_seconds)
        reply.raise_for_status()
        told: dict[str, Any] = reply.json()
        return told

    async def _asked(self, replica: Replica, path: str, body: dict[str, Any], timeout_seconds: float) -> httpx.Response:
        url, headers = f"{root_of(replica.url)}{path}", _credential(replica)
        client = self._clients.reaching(replica.url, replica.tls)
        return await client.post(url, json=body, headers=headers, timeout=timeout_seconds)

    async def requests_in_engine(self, replica: Replica) -> int | None:
        """Count what a replica is answering for anybody; None if it doesn't tell."""
        try:
            load = await self._got(replica, "/load")
            gauges = await self._got(replica, "/metrics")
        except httpx.HTTPError:
            return None
        if load.is_error and gauges.is_error:
            return None
        # The gauges lag a step behind and don't know what is being tokenised; /load doesn't know every endpoint.
        return max(_server_load(load), engine_requests(gauges.text))

    async def takes_tools(self, replica: Replica, timeout_seconds: float = 10.0) -> bool | None:
        """Ask whether it takes requests with tools; None if neither yes nor no comes of it.

        vLLM refuses them, even where it only counts tokens, unless it was started with a parser for calls. An engine
        that can't count for Anthropic's clients is asked for one token of a chat.
        """
        asked = {"model": replica.served_name, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
        function = TOOL["function"]
        counted = {"name": function["name"], "input_schema": function["parameters"]}
        try:
            reply = await self._asked(
                replica, "/v1/messages/count_tokens", asked | {"tools": [counted]}, timeout_seconds
            )
            if reply.status_code in UNKNOWN_PATH:
                reply = await self._asked(replica, "/v1/chat/completions", asked | {"tools": [TOOL]}, timeout_seconds)
        except httpx.HTTPError:
            return None
        return True if reply.is_success else (False if "tool" in reply.text else None)

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
        client = self._clients.reaching(replica.url, replica.tls)
        asked = {"model": replica.served_name, **body}
        reply = await client.post(f"{root_of(replica.url)}{path}", json=asked, headers=_credential(replica))
        reply.raise_for_status()
        return reply.json()

    async def _got(self, replica: Replica, path: str) -> httpx.Response:
        client = self._clients.reaching(replica.url, replica.tls)
        return await client.get(f"{root_of(replica.url)}{path}", headers=_credential(replica))


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
