"""A vLLM server as a model to measure: log-probabilities of given tokens, and completions of given prompts.

Wire format, vLLM 0.32: `POST /v1/completions` with `{"prompt": [ids], "max_tokens": 1, "temperature": 0,
"prompt_logprobs": k}` answers `choices[0].prompt_logprobs`: null for the first token, then for each position an object
of k or k + 1 entries `{"<id>": {"logprob", "rank", "decoded_token"}}`: the k likeliest tokens by rank, and the token
that came.

* `k` is at most the server's `--max-logprobs` (default 20).
* Memory of the server: V1 runners hold logits [tokens of a step, vocabulary] for such a request, unseen by its memory
  profile. One request at a time, and prompts of bounded length, keep that within what the server is sized for.
* A request with `prompt_logprobs` never has a seed, and prompts in flight with seeds have at most IN_FLIGHT_TOKENS
  tokens: on a CPU, vLLM 0.32 dies of a seed when it reads a prompt in parts (`CPU Generator does not use offset`).
* `prompt_logprob_token_ids`, which would name given tokens, is for RL only (`/inference/v1/generate`) and not used.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import msgspec

from quantize.errors import ReplicaError
from quantize.evaluation.request_window import PromptWindow, gather_all
from quantize.evaluation.sampling import Completion, GenerationRequest, SamplingParameters, noise_seed
from quantize.evaluation.top_k_metrics import SampleScores

CONCURRENT_COMPLETIONS = 8
# Tokens of all prompts that are completed at once: what a server on a CPU reads in one step (`--max-num-batched-tokens`
# 2048 by default), with room for the tokens that others decode in that step.
IN_FLIGHT_TOKENS = 2048 - 64
_CONNECT_SECONDS = 10.0
_REQUEST_SECONDS = 600.0
_PAUSE_SECONDS = 2.0
_TRIES = 5
# Full, not broken: worth another try.
_BUSY = frozenset({429, 502, 503, 504})
# An entry has about 70 bytes; a decoded token rarely has more than 100.
_ENTRY_BYTES = 256
_ENVELOPE_BYTES = 1 << 20
_MOST_ALLOWED = re.compile(r"max allowed: (\d+)")
_Answer = TypeVar("_Answer")


class _Entry(msgspec.Struct):
    logprob: float
    rank: int


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    # Each position is decoded alone: all of them as objects take 20 times the memory of their text.
    prompt_logprobs: list[msgspec.Raw] | None = None
    token_ids: list[int] | None = None


class _CompletionAnswer(msgspec.Struct):
    choices: list[_Choice]
    system_fingerprint: str | None = None


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _ModelsAnswer(msgspec.Struct):
    data: list[_Model]


class _VersionAnswer(msgspec.Struct):
    version: str


_POSITION = msgspec.json.Decoder(dict[int, _Entry])


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of itself: the model's name, its directory there, the context it takes, the engine."""

    name: str
    root: str
    max_model_len: int | None
    engine: str
    fingerprint: str | None


class ReplicaScorer:
    """One running vLLM server. ReplicaError, which names its URL, from every method where the server can't.

    Each request ends at a deadline. `identify` comes first: it learns the model's name, which others send.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, pause_seconds: float = _PAUSE_SECONDS) -> None:
        self.url = url
        self._client = client
        self._pause_seconds = pause_seconds
        self._name = ""

    async def identify(self) -> ServedModel:
        """Ask for the model's name, directory and context, for the engine's version and fingerprint."""
        with _translated(self.url, "is no vLLM server"):
            model = (await self._get("/v1/models", _ModelsAnswer)).data[0]
            version = (await self._get("/version", _VersionAnswer)).version
            self._name = model.id
            answer = await self._complete({"prompt": [0, 0], "max_tokens": 1, "temperature": 0})
            engine = f"vllm {version}"
            return ServedModel(model.id, model.root or "", model.max_model_len, engine, answer.system_fingerprint)

    async def most_logprobs(self, wanted: int) -> int:
        """Find the largest number of log-probabilities per position, up to `wanted`, that the server gives."""
        with _translated(self.url, "gives no log-probabilities of prompts"):
            try:
                await self._complete(_scoring([0, 0], wanted))
            except httpx.HTTPStatusError as error:
                allowed = _MOST_ALLOWED.search(error.response.text)
                if error.response.status_code != httpx.codes.BAD_REQUEST or allowed is None or not int(allowed[1]):
                    raise
                return int(allowed[1])
        return wanted

    async def score(self, ids: Sequence[int], top_k: int) -> SampleScores:
        """Return the log-probabilities at all tokens but the first, `top_k` likeliest of each."""
        with _translated(self.url, f"failed to score a sample of {len(ids)} tokens"):
            answer = await self._complete(_scoring(ids, top_k), len(ids) * (top_k + 1) * _ENTRY_BYTES)
            positions = answer.choices[0].prompt_logprobs
            if positions is None or len(positions) != len(ids):
                raise ReplicaError(f"{self.url}: answers without prompt_logprobs; pass a vLLM server's own address")
            return read_scores(ids, positions, top_k)

    async def complete_all(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParameters, on_tokens: Any
    ) -> list[Completion]:
        """Complete all prompts, each with the noise of its seed; a few at a time."""
        window = PromptWindow(CONCURRENT_COMPLETIONS, IN_FLIGHT_TOKENS)

        async def complete(request: GenerationRequest) -> Completion:
            async with window.holding(len(request.ids)):
                completion = await self.complete(request, sampling)
            on_tokens(sampling.new_tokens)
            return completion

        return await gather_all([complete(request) for request in requests])

    async def complete(self, request: GenerationRequest, sampling: SamplingParameters) -> Completion:
        """Complete one prompt."""
        with _translated(self.url, f"failed to complete a prompt of {len(request.ids)} tokens"):
            choice = (await self._complete(_generation(request, sampling))).choices[0]
            if choice.token_ids is None:
                raise ReplicaError(f"{self.url}: answers without token_ids; pass a vLLM server's own address")
            return Completion(without_end(choice.token_ids, sampling.end_ids), choice.finish_reason == "stop")

    async def _complete(self, body: Mapping[str, Any], most_bytes: int = 0) -> _CompletionAnswer:
        for attempt in range(1, _TRIES + 1):
            try:
                return await self._request(
                    "POST", "/v1/completions", _CompletionAnswer, {"model": self._name, **body}, most_bytes
                )
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _BUSY or attempt == _TRIES:
                    raise
            await asyncio.sleep(attempt * self._pause_seconds)
        raise AssertionError("the last try returns or raises")

    async def _get(self, path: str, kind: type[_Answer]) -> _Answer:
        return await self._request("GET", path, kind, None, 0)

    async def _request(
        self, method: str, path: str, kind: type[_Answer], body: Mapping[str, Any] | None, most_bytes: int
    ) -> _Answer:
        async with (
            asyncio.timeout(_REQUEST_SECONDS),
            self._client.stream(method, _root(self.url) + path, json=body) as response,
        ):
            content = await _read(response, _ENVELOPE_BYTES + most_bytes)
            if response.is_error:
                raise httpx.HTTPStatusError(_said(content), request=response.request, response=_kept(response, content))
        return msgspec.json.decode(content, type=kind)


@asynccontextmanager
async def scorer(url: str, api_key: str | None, pause_seconds: float = _PAUSE_SECONDS) -> AsyncIterator[ReplicaScorer]:
    """Lend a server's client; `api_key` is that of vLLM's `--api-key`, if it has one.

    A busy server is asked again after `pause_seconds`, each time a little later.
    """
    timeout = httpx.Timeout(_REQUEST_SECONDS, connect=_CONNECT_SECONDS)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=CONCURRENT_COMPLETIONS)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers, trust_env=False) as client:
        yield ReplicaScorer(url, client, pause_seconds)


def read_scores(ids: Sequence[int], positions: Sequence[msgspec.Raw], top_k: int) -> SampleScores:
    """Read the positions of an answer; ValueError or LookupError if they are not those of `ids`.

    A token that came and is among the likeliest has one entry, with its place among them as its rank.
    """
    scores = SampleScores.empty(top_k + 1)
    for token, position in zip(ids[1:], positions[1:], strict=True):
        entries = _POSITION.decode(position)
        likeliest = sorted(entries, key=lambda one: entries[one].rank)[:top_k]
        named = [token, *likeliest]
        scores.add(named, [entries[one].logprob for one in named])
    return scores


def without_end(ids: Sequence[int], end_ids: Sequence[int]) -> tuple[int, ...]:
    """Drop the token that ended a completion, and what came after it."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return tuple(ids[:place])
    return tuple(ids)


def _scoring(ids: Sequence[int], top_k: int) -> dict[str, Any]:
    return {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}


def _generation(request: GenerationRequest, sampling: SamplingParameters) -> dict[str, Any]:
    drawn = {"seed": noise_seed(request), "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {
        "prompt": list(request.ids),
        "max_tokens": sampling.new_tokens,
        "temperature": sampling.temperature,
        **(drawn if sampling.temperature else {}),
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.end_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


async def _read(response: httpx.Response, most_bytes: int) -> bytearray:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > most_bytes:
            raise ValueError(f"an answer of more than {most_bytes} bytes")
    return content


def _kept(response: httpx.Response, content: bytearray) -> httpx.Response:
    return httpx.Response(response.status_code, content=bytes(content))


def _said(content: bytearray) -> str:
    """Return the message of vLLM's error body, or its beginning."""
    try:
        text = str(msgspec.json.decode(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = content.decode(errors="replace")
    return " ".join(text.split())[:300]


@contextmanager
def _translated(url: str, what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ReplicaError(f"{url}: {what}: {error.response.status_code} {error}") from None
    except TimeoutError:
        raise ReplicaError(f"{url}: {what}: no answer in {_REQUEST_SECONDS:g} s") from None
    except httpx.HTTPError as error:
        said = str(error) or type(error).__name__
        raise ReplicaError(f"{url}: {what}: {said}; is the replica running?") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ReplicaError(f"{url}: {what}: {type(error).__name__}: {error}") from None
