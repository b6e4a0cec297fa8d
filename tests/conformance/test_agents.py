"""Bodies in the form that coding agents send, written by hand: they reach the replica whole, and streams come back."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.rows import rows
from tests.fakes.running import FakeReplica
from tests.gateway.proxy.recorded import events

pytestmark = pytest.mark.asyncio(loop_scope="session")

BODIES = Path(__file__).with_name("bodies")

# File, path, headers, and the first and the last event that the agent waits for.
AGENTS = [
    (
        "codex",
        "/v1/responses",
        {"authorization": "Bearer any", "openai-beta": "responses=experimental", "originator": "codex_cli_rs"},
        ("response.created", "response.completed"),
    ),
    (
        "claude-code",
        "/v1/messages?beta=true",
        {"authorization": "Bearer any", "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"},
        ("message_start", "message_stop"),
    ),
]


@pytest.mark.parametrize("name, path, headers, ends", AGENTS)
async def test_agents(name: str, path: str, headers: dict[str, str], ends: tuple[str, str], fake: FakeReplica) -> None:
    """The body arrives as it was but for the name, the query and the client's headers don't, all events come back."""
    body: dict[str, Any] = json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))
    async with rows({body["model"]: fake.url}) as fleet:
        answer = await fleet.ask(body, headers, path)
    assert answer.status_code == 200, answer.text
    names = [event.removeprefix(b"event: ").partition(b"\n")[0].decode() for event in events(answer.content)]
    assert (names[0], names[-1]) == ends
    asked = fake.requests(path.partition("?")[0])[-1]
    assert asked["body"] == {**body, "model": "m1"}
    assert not {"anthropic-version", "anthropic-beta", "openai-beta", "originator", "user-agent"} & set(
        asked["headers"]
    )
    told = json.loads(events(answer.content)[0].partition(b"data: ")[2])
    assert (told.get("message") or told["response"])["model"] == body["model"]


async def test_counting_for_claude_code(fake: FakeReplica) -> None:
    """It counts what it is about to send, tools and all."""
    body: dict[str, Any] = json.loads((BODIES / "claude-code.json").read_text(encoding="utf-8"))
    counted = {key: body[key] for key in ("model", "messages", "system", "tools", "thinking")}
    async with rows({body["model"]: fake.url}) as fleet:
        answer = await fleet.ask(counted, path="/v1/messages/count_tokens?beta=true")
    assert answer.status_code == 200
    assert answer.json()["input_tokens"] > 0


async def test_token_arrays_of_langchain(fake: FakeReplica) -> None:
    """OpenAIEmbeddings counts tokens itself unless told otherwise, and sends them as numbers, for base64."""
    body = {"input": [[97, 98], [99]], "model": "smol", "encoding_format": "base64"}
    async with rows({"smol": fake.url}) as fleet:
        answer = await fleet.ask(body, path="/v1/embeddings")
    assert [each["embedding"] for each in answer.json()["data"]] == [
        "AAAAQAAAQ0MAAEJBAABEQQ==",
        "AACAPwAAxkIAAEZBAABGQQ==",
    ]
    assert answer.json()["model"] == "smol"


async def test_tokens_there_and_back(fake: FakeReplica) -> None:
    """Text becomes tokens, tokens text."""
    async with rows({"smol": fake.url}) as fleet:
        tokens = (await fleet.ask({"model": "smol", "prompt": "é汉"}, path="/tokenize")).json()["tokens"]
        text = (await fleet.ask({"model": "smol", "tokens": tokens}, path="/detokenize")).json()["prompt"]
    assert text == "é汉"
