"""The fake's routes: which path answers what, and in which order a request is checked."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fakes import answers, messages
from tests.fakes.asks import (
    ApiError,
    Kind,
    chat_prompt,
    check_model,
    check_tools,
    detokenize,
    read_ask,
    read_json,
    tokenize,
)
from tests.fakes.dialects import Dialect, dialect_of
from tests.fakes.embeddings import embedded
from tests.fakes.engine import Engine, Generation, HangUpError, Journal
from tests.fakes.http_server import Reply, Request
from tests.fakes.options import Options

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
KV_TOKENS = 65536
CACHE = f'block_size="16",cache_dtype="auto",kv_cache_size_tokens="{KV_TOKENS}",num_gpu_blocks="{KV_TOKENS // 16}"'
MESSAGES = "/v1/messages"
GENERATIONS: Mapping[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text",
    MESSAGES: "messages",
    "/v1/responses": "responses",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a route that does not generate."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"


@dataclass(slots=True)
class Page:
    """Faults of /metrics: renamed metrics, and an answer that never comes."""

    renamed: dict[str, str] = field(default_factory=dict)
    available: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.available.set()

    def change(self, asked: Mapping[str, Any]) -> None:
        """Set the faults; those that are not named end."""
        self.renamed = dict(asked.get("rename", {}))
        (self.available.clear if asked.get("stall") else self.available.set)()

    def changed(self, page: str) -> str:
        """Write a page with the names as they are now."""
        for old, new in self.renamed.items():
            page = page.replace(f"{old}{{", f"{new}{{").replace(f" {old} ", f" {new} ")
        return page


class Replica:
    """Answers each request as vLLM would, if the engine admits it."""

    def __init__(self, options: Options, engine: Engine, journal: Journal) -> None:
        self._options = options
        self._engine = engine
        self._journal = journal
        self._created = int(time.time())
        self._page = Page()
        self._routes: dict[str, dict[str, Callable[[Request], Answer]]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": lambda _: _json({"version": "0.32.0"})},
            "/load": {"GET": self._load},
            "/metrics": {"GET": self._metrics},
            "/fake/metrics": {"POST": self._change_page},
            "/v1/models": {"GET": lambda _: _json(answers.models(options, self._created))},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/v1/embeddings": {"POST": lambda request: _json(embedded(read_json(request), options))},
            f"{MESSAGES}/count_tokens": {"POST": self._count_tokens},
        }

    async def handle(self, request: Request, reply: Reply) -> None:
        """Log the request, answer it, and turn errors into vLLM's error objects."""
        self._journal.write(_noted(request))
        try:
            if request.path in GENERATIONS and request.method == "POST" and self._admits(request):
                await self._generate(GENERATIONS[request.path], request, reply)
            else:
                if request.path == "/metrics":
                    await self._page.available.wait()
                answer = self._answer(request)
                await reply.send(answer.status, answer.body, answer.content_type, self._headers(request))
        except ApiError as error:
            body = messages.error(error.body) if request.path.startswith(MESSAGES) else error.body
            await reply.send_json(error.status, body, self._headers(request))
        except HangUpError:
            reply.drop()

    def _answer(self, request: Request) -> Answer:
        if not self._admits(request):
            return _json({"error": "Unauthorized"}, 401)
        if request.path in GENERATIONS:
            return _json({"detail": "Method Not Allowed"}, 405)
        if request.path not in self._routes:
            return _json({"detail": "Not Found"}, 404)
        route = self._routes[request.path].get(request.method)
        return route(request) if route else _json({"detail": "Method Not Allowed"}, 405)

    def _admits(self, request: Request) -> bool:
        """Only the API proper is guarded: /tokenize, /health and /metrics are open, as in vLLM."""
        keys = self._options.api_keys
        if not keys or not request.path.startswith(GUARDED):
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and key in keys

    def _headers(self, request: Request) -> dict[str, str]:
        if not self._options.request_id_headers:
            return {}
        return {"x-request-id": request.headers.get("x-request-id") or uuid.uuid4().hex}

    # Generating.

    async def _generate(self, kind: Kind, request: Request, reply: Reply) -> None:
        ask = read_ask(kind, request, self._options)
        with self._engine.admit(ask) as generation:
            if self._options.faults.stall_before_first_byte:
                await self._engine.stall()
            dialect = dialect_of(ask)
            if ask.stream:
                await reply.start_stream("text/event-stream; charset=utf-8", self._headers(request))
                await self._stream(dialect, generation, reply)
            else:
                async for _ in generation.steps():
                    pass
                await reply.send_json(200, dialect.whole(), self._headers(request))

    async def _stream(self, dialect: Dialect, generation: Generation, reply: Reply) -> None:
        try:
            await _write_each(dialect.greeting(), reply)
            async for step in generation.steps():
                await _write_each(dialect.step(step), reply)
            await _write_each(dialect.ending(), reply)
        except ApiError as error:  # the status has been sent: the error is an event
            event = dialect.failed(error.body)
            if event is None:
                raise HangUpError from error
            await reply.write(event)
        await reply.end_stream()

    # Everything else.

    def _health(self, _: Request) -> Answer:
        return Answer(503 if self._engine.dead.is_set() else 200)

    def _load(self, _: Request) -> Answer:
        """Counts only if asked to on the command line, like vLLM's."""
        engine = self._engine
        return _json({"server_load": engine.running + engine.waiting if self._options.load_tracking else 0})

    def _metrics(self, _: Request) -> Answer:
        engine = self._engine
        gauges = {
            "num_requests_running": engine.running,
            "num_requests_waiting": engine.waiting,
            'num_requests_waiting_by_reason|reason="capacity"': engine.waiting,
            'num_requests_waiting_by_reason|reason="deferred"': 0,
            f"cache_config_info|{CACHE}": 1,
            "kv_cache_usage_perc": engine.running / self._options.max_num_seqs,
        }
        succeeded = {
            f'request_success|finished_reason="{reason}"': engine.succeeded[reason]
            for reason in ("stop", "length", "abort", "error", "repetition")
        }
        counters = {
            "prompt_tokens": engine.prompt_tokens,
            "generation_tokens": engine.generation_tokens,
            'admission_rejections|reason="max_num_queued_reqs"': engine.rejected,
            "prefix_cache_queries": engine.prompt_tokens,
            "prefix_cache_hits": 0,
            "num_preemptions": 0,
            **succeeded,
        }
        page = self._page.changed(answers.metrics(self._options.served[0], gauges, counters))
        return Answer(body=page.encode(), content_type="text/plain; version=1.0.0; charset=utf-8")

    def _change_page(self, request: Request) -> Answer:
        """No vLLM has this: `{"rename": {old: new}, "stall": bool}` says how /metrics misbehaves from now on."""
        self._page.change(read_json(request))
        return _json({})

    def _tokenize(self, request: Request) -> Answer:
        body = read_json(request)
        check_model(body, self._options)
        prompt = body.get("prompt")
        text = prompt if isinstance(prompt, str) else chat_prompt(body, self._options)
        tokens = tokenize(text, think_tokens=self._options.faults.think_tokens)
        strings = [detokenize([token]) for token in tokens] if body.get("return_token_strs") else None
        limit = self._options.max_model_len
        return _json({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings})

    def _count_tokens(self, request: Request) -> Answer:
        body = read_json(request)
        check_model(body, self._options)
        check_tools(body, self._options)
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        count = len(tokenize(chat_prompt({**body, "messages": [*system, *body["messages"]]}, self._options)))
        return _json({"input_tokens": count, "context_management": {"original_input_tokens": count}})

    def _detokenize(self, request: Request) -> Answer:
        body = read_json(request)
        check_model(body, self._options)
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise ApiError(400, "Bad Request", "1 validation error:\n  {'type': 'missing'}", "body.tokens")
        return _json({"prompt": detokenize(tokens)})


async def _write_each(events: bytes, reply: Reply) -> None:
    """Write each event by itself, as vLLM does."""
    for event in events.split(b"\n\n")[:-1]:
        await reply.write(event + b"\n\n")


def _json(body: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode())


def _noted(request: Request) -> dict[str, Any]:
    """A line of the request log; a body that is not JSON is noted as text, an empty one as null."""
    try:
        body = json.loads(request.body) if request.body else None
    except ValueError:
        body = request.body.decode(errors="replace")
    return {"method": request.method, "path": request.path, "headers": dict(request.headers), "body": body}
