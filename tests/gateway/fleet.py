"""A gateway on the test's own loop, in front of replicas that a test puts into its registry."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from config.schema import Settings
from config.variant import read_variants
from gateway.app import Addresses, Gateway, gateway, listen_sockets
from gateway.deployment import Deployment
from gateway.keys import Keys
from serving.kubernetes.discovery import Discovery
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS, ROOT

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "hello there"}]}
STREAM: dict[str, Any] = {**HELLO, "stream": True}

CONFIG: dict[str, Any] = {
    "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"},
    "variants": {
        "hi": {"precision": "bf16", "quality": {"kl_mean": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0}},
        "mid": {"precision": "int8", "quality": {"kl_mean": 0.01, "top1_agreement": 0.97, "perplexity_ratio": 1.01}},
        "lo": {"precision": "int4", "quality": {"kl_mean": 0.05, "top1_agreement": 0.92, "perplexity_ratio": 1.05}},
        "odd": {"precision": "fp8"},
    },
    "aliases": {
        "smol": {"ladder": ["hi", "mid", "lo"], "trust_declared": True},
        "strict": {"ladder": ["hi", "mid", "lo"], "floor": {"top1_agreement": 0.95}, "trust_declared": True},
        "team/small": {"ladder": ["lo"]},
        "hopeless": {"ladder": ["lo", "odd"], "floor": {"top1_agreement": 0.99}, "trust_declared": True},
    },
}


def deployment(changes: dict[str, Any] | None = None, keys: Keys | None = None) -> Deployment:
    """The configuration above, with some top-level tables replaced."""
    settings = Settings.model_validate({**CONFIG, **(changes or {})})
    return Deployment(settings, read_variants(settings.variants, ROOT), keys or Keys())


@dataclass(frozen=True, slots=True)
class Fleet:
    """A gateway, its registry, and a client for each of its ports."""

    served: Gateway
    registry: Registry
    client: httpx.AsyncClient
    admin: httpx.AsyncClient

    @property
    def url(self) -> str:
        """The url for clients."""
        return f"http://{self.served.addresses.client}"

    def reserved_bytes(self) -> int:
        """The memory that the bodies of requests take now."""
        return self.served.server.reserved_bytes

    @contextmanager
    def replicas(self, *served: tuple[str, str], state: State = State.READY) -> Iterator[None]:
        """Keep replicas, given as variant and url, in the registry while the block runs."""
        ids = []
        for number, (variant, url) in enumerate(served):
            precision = CONFIG["variants"][variant]["precision"]
            ids.append(f"{variant}-{number}")
            self.registry.put(Replica(ids[-1], variant, precision, url, "m1"), state)
        try:
            yield
        finally:
            for replica_id in ids:
                self.registry.remove(replica_id)

    async def ask(
        self, body: dict[str, Any] | bytes = HELLO, headers: dict[str, str] | None = None, path: str = CHAT
    ) -> httpx.Response:
        """Post a body, and read the whole response."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers={**JSON, **(headers or {})})

    async def metrics(self, prefix: str = "quantgate_") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample of /metrics whose name starts with the prefix."""
        page = (await self.admin.get("/metrics")).text
        # Only these are parsed, because parsing is the expensive part.
        lines = [line for line in page.splitlines() if line.startswith(prefix)]
        families = text_string_to_metric_families("\n".join([*lines, ""]))
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    async def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = set(labels.items())
        return sum(
            value for (each, having), value in (await self.metrics(name)).items() if each == name and wanted <= having
        )

    async def at_rest(self) -> None:
        """Wait until no request is in flight; TimeoutError if that takes too long."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            # Waits for the gateway's tasks.
            while await self.total("quantgate_requests_in_flight") or self._leased():  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)

    def _leased(self) -> int:
        return sum(status.in_flight for status in self.registry.snapshot())


@asynccontextmanager
async def running_gateway(
    deployed: Deployment, registry: Registry | None = None, discovery: Discovery | None = None
) -> AsyncIterator[Fleet]:
    """Run a gateway on free ports; a `discovery` is one that runs."""
    registry = registry or Registry()
    with listen_sockets(deployed.settings.gateway) as taken:
        gateway_context = gateway(deployed, registry, taken, discovery=discovery)
        async with gateway_context as served, clients(served.addresses) as (client, admin):
            yield Fleet(served, registry, client, admin)


@asynccontextmanager
async def clients(addresses: Addresses) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """A client for the client port, and one for the admin port."""
    async with _client(addresses.client) as client, _client(addresses.admin) as admin:
        yield client, admin


def _client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", timeout=DEADLINE_SECONDS, trust_env=False)


def events_in(body: bytes) -> list[Any]:
    """The payloads of a stream: JSON objects, and "[DONE]"."""
    events = body.decode().split("\n\n")
    assert events.pop() == "", "a stream ends after an event"
    return [json.loads(text) if (text := event.removeprefix("data: ")) != "[DONE]" else text for event in events]


def text_of(events: list[Any]) -> str:
    """The text of a chat stream."""
    choices = [choice for event in events if event != "[DONE]" for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of a response, checked for OpenAI's shape and for a request id."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return error
