"""Models of other providers, through litellm's SDK: the only module that imports it, and only where one is configured.

litellm prepares a request in the default executor of the event loop, as it does for all of its callers; everything that
waits is asyncio, and ends with the task that waits. Its retries, fallbacks, callbacks and look-ups in the network are
off: see `load_litellm`. A request goes to the address that the configuration names, and nowhere else.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType, TracebackType
from typing import Any, Self

from config.errors import ConfigError
from config.external import ExternalModel
from config.load import default_environment
from gateway.errors import GatewayError, RequestError, UpstreamDisconnected, UpstreamTimeout
from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, RESPONSES, Endpoint
from gateway.openai.external_answer import AnswerForm, ChoicesForm, choice_indices, finishes
from gateway.openai.external_request import external_fields, with_length_parameter
from gateway.openai.external_responses import ResponseForm
from gateway.proxy.upstream.external_cost import Charge, PriceTable, Spending
from gateway.proxy.upstream.external_parameters import ParameterTable
from gateway.proxy.upstream.protocol import UpstreamRequest
from gateway.proxy.upstream.provider_errors import error_of_provider, words_of
from gateway.routing.target import Timeouts
from serving.replica import Replica

log = logging.getLogger(__name__)

# A provider is farther away than a replica.
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 5.0
# Read while litellm is imported: no table of prices from the network, and no `.env` of the working directory.
ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")
# litellm's own behaviour: nothing is tried again, logged, sent or printed.
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"num_retries": 0, "max_retries": 0, "drop_params": True, "no-log": True, "caching": False}
)
# Functions of litellm, by endpoint.
CALLS = {
    CHAT.name: "acompletion",
    COMPLETIONS.name: "atext_completion",
    EMBEDDINGS.name: "aembedding",
    RESPONSES.name: "aresponses",
}

Call = Callable[..., Awaitable[Any]]


def load_litellm() -> Any:
    """Import litellm with all that it does of its own accord switched off; ConfigError if it is not installed."""
    default_environment(ENVIRONMENT)
    try:
        import litellm  # noqa: PLC0415 - 3000 modules and 200 MB: only where a model needs them
    except ImportError as error:
        what = f"external models need litellm, which cannot be imported: {error}"
        raise ConfigError(f"{what}; install quantgate[external]") from error
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()  # they write to stdout
        logger.setLevel(logging.CRITICAL)  # errors are raised, too; their texts may contain secrets
    litellm.telemetry = False
    litellm.suppress_debug_info = True  # else it prints to stdout at each error
    litellm.turn_off_message_logging = True
    litellm.disable_streaming_logging = True
    litellm.disable_hf_tokenizer_download = True
    litellm.disable_aiohttp_transport = True  # httpx closes a connection in the step in which its reader is cancelled
    return litellm


@dataclass(slots=True)
class ExternalUpstream:
    """Implements Upstream; an async context manager, which closes litellm's connections at its end.

    `spending` gets what each answer costs, also of those that were not read to their end.
    """

    litellm: Any
    spending: Spending
    parameters: ParameterTable
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self.litellm.close_litellm_async_clients()
        # It keeps those that are closed.
        self.litellm.in_memory_llm_clients_cache.flush_cache()

    async def open(self, request: UpstreamRequest, replica: Replica, timeouts: Timeouts) -> "ExternalReply":
        """Send a request; the reply of a stream has begun, that of any other request is complete."""
        model, inference = replica.external, request.inference
        assert model is not None
        name = CALLS.get(inference.endpoint.name)
        if name is None:
            paths = ", ".join([endpoint.path for endpoint in ENDPOINTS.values() if endpoint.external])
            what = f"the model does not support this endpoint: {replica.variant} is external, and answers {paths} only"
            raise RequestError(what, code="endpoint_not_supported")
        call: Call = getattr(self.litellm, name)
        fields = with_length_parameter(external_fields(inference), self.parameters.of(model))
        charge = Charge(PriceTable(self.litellm), self.spending, request, replica, fields)
        arguments = {**fields, **self._arguments(model, timeouts), "logger_fn": _on_sent(charge)}
        if inference.stream:
            arguments["stream"] = True
        if inference.endpoint is RESPONSES:
            arguments["use_chat_completions_api"] = True  # else it answers whole where a provider has no such API
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + min(timeouts.total_seconds, timeouts.first_byte_seconds)
        try:
            with translated_errors(replica, timeouts.first_byte_seconds, charge.was_sent):
                async with asyncio.timeout_at(ends_at if isfinite(ends_at) else None):
                    answer = await call(**arguments)
        except (asyncio.CancelledError, UpstreamTimeout):
            charge.end(None)  # the provider may have answered it
            raise
        except BaseException:
            charge.cancel()
            raise
        charge.sent = True
        return ExternalReply(self, request, replica, answer, timeouts, charge)

    def close_later(self, stream: Any) -> None:
        """Close a stream that was not read to its end: a lease ends in one step, and closing takes some."""
        task = asyncio.create_task(_close(stream), name="close external stream")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _arguments(self, model: ExternalModel, timeouts: Timeouts) -> dict[str, Any]:
        """How a model is asked: what no field of a request can change."""
        seconds = timeouts.total_seconds if isfinite(timeouts.total_seconds) else None
        connect = max(timeouts.connect_seconds, CONNECT_SECONDS)
        given = {"api_key": model.api_key, "api_base": model.base_url, **dict(model.credentials)}
        return {
            **OPTIONS,
            **{name: value for name, value in given.items() if value is not None},
            "model": model.name,
            "timeout": self.litellm.main.httpx.Timeout(seconds, connect=connect),
        }


class ExternalReply:
    """Implements UpstreamReply; the end of its `with` block ends the request at the provider, and books its cost."""

    status = 200
    headers: Mapping[bytes, bytes] = MappingProxyType({})

    def __init__(
        self,
        upstream: ExternalUpstream,
        request: UpstreamRequest,
        replica: Replica,
        answer: Any,
        timeouts: Timeouts,
        charge: Charge,
    ) -> None:
        self.streams = request.inference.stream
        self._upstream = upstream
        self._charge = charge
        self._replica = replica
        self._answer = answer
        self._timeouts = timeouts
        self._form = answer_form(request.inference.endpoint, request.request_id)
        self._events = self._read_events() if self.streams else None
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + timeouts.total_seconds
        self._usage: Mapping[str, Any] | None = None
        self._parts = 0
        self._ended = not self.streams

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._upstream.close_later(self._answer)
        self._charge.end(self._usage, self._parts)

    async def read(self, limit_bytes: int) -> bytes:
        """Encode the whole answer; UpstreamDisconnected if it is longer than the limit."""
        fields = self._answer.model_dump(mode="json", exclude_none=True)
        self._usage = self._form.usage(fields)
        body = self._form.whole(fields)
        if len(body) > limit_bytes:
            raise UpstreamDisconnected(f"a provider's reply is longer than {limit_bytes} bytes")
        return body

    async def flow(self, feed: Callable[[bytes], bool]) -> bool:
        """Give each event to `feed`; True at the end, False when `feed` returned False."""
        assert self._events is not None
        while True:
            limit_seconds = self._timeouts.idle_seconds if self._parts else self._timeouts.first_byte_seconds
            until = min(self._loop.time() + limit_seconds, self._ends_at)
            with translated_errors(self._replica, limit_seconds, self._charge.was_sent):
                async with asyncio.timeout_at(until if isfinite(until) else None):
                    event = await anext(self._events, b"")
            if not event:
                self._ended = True
                return True
            if not feed(event):
                return False

    async def _read_events(self) -> AsyncIterator[bytes]:
        begun = frozenset[int]()
        async for part in self._answer:
            chunk = part.model_dump(mode="json", exclude_none=True)
            if finishes(chunk) and not _was_finished(self._answer):
                raise UpstreamDisconnected("a provider ended its stream before the answer was complete")
            self._usage = self._form.usage(chunk) or self._usage
            self._parts += 1
            for event in self._form.events(chunk, begun):
                yield event
            begun |= choice_indices(chunk)
        if self._form.end:
            yield self._form.end


def _on_sent(charge: Charge) -> Callable[[Mapping[str, Any]], None]:
    """What litellm calls before it sends a request; no method, since litellm copies its arguments deeply."""

    def on_sent(_: Mapping[str, Any]) -> None:
        charge.sent = True

    return on_sent


def answer_form(endpoint: Endpoint, request_id: str) -> AnswerForm:
    """How an endpoint's answers are encoded."""
    return ResponseForm(request_id) if endpoint is RESPONSES else ChoicesForm(endpoint, request_id)


@contextlib.contextmanager
def translated_errors(replica: Replica, limit_seconds: float, sent: Callable[[], bool]) -> Iterator[None]:
    """Translate what litellm raises; what the provider said is logged, without any secret.

    litellm's own exceptions are not kept as the cause: their text has its tracebacks, and links to report them.
    """
    try:
        yield
    except GatewayError:
        raise
    except TimeoutError:
        raise UpstreamTimeout(f"a provider sent nothing for {limit_seconds:g} s") from None
    except Exception as error:  # noqa: BLE001 - litellm raises any exception of its providers' clients
        assert replica.external is not None
        words = words_of(replica.external.masked(str(error)))  # a text that is cut might end in half a secret
        log.warning("replica=%s the provider said: %s", replica.id, words)
        raise error_of_provider(error, words, sent=sent()) from None


def _was_finished(stream: Any) -> bool:
    """Whether the provider said why an answer ended: litellm says `stop` where a stream just ends."""
    names = ("received_finish_reason", "intermittent_finish_reason", "received_any_finish_reason")
    known = [name for name in names if hasattr(stream, name)]
    return not known or any(getattr(stream, name) for name in known)


async def _close(stream: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await stream.aclose()
    except Exception as error:  # noqa: BLE001 - whatever a provider's client raises, the stream is gone
        log.debug("an external stream did not close: %r", error)
