"""Why answers ended, as the access log says it: the same words for every endpoint, whole and streamed."""

import re
from itertools import product
from typing import Any

import pytest

from tests.fakes.running import FakeReplica
from tests.gateway.fleet import CHAT, TEXT, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TURN = [{"role": "user", "content": "a"}]
PARAMETERS = {"type": "object", "properties": {}}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
TOOLS: dict[str, dict[str, Any]] = {
    CHAT: {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
    RESPONSES: {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
    MESSAGES: {"tools": [{"name": "f", "input_schema": PARAMETERS}], "tool_choice": {"type": "any"}},
}
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURN},
    TEXT: {"prompt": "a"},
    RESPONSES: {"input": "a"},
    MESSAGES: {"messages": TURN},
}
LENGTHS = {CHAT: "max_tokens", TEXT: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "path, finish",
    [*product((CHAT, TEXT, RESPONSES, MESSAGES), ("stop", "length")), *product(TOOLS, ("tool_calls",))],
)
async def test_the_finish_reason_in_the_log(
    fake: FakeReplica, path: str, finish: str, stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is the engine's, whatever the API calls it."""
    body = {"model": "smol", "stream": stream, LENGTHS[path]: 3 if finish == "length" else 64, **PROMPTS[path]}
    if finish == "tool_calls":
        body |= TOOLS[path]
    async with running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", fake.url)):
            assert (await fleet.ask(body, path=path)).status_code == 200
    assert re.findall(r"finish=(\w+)", capfd.readouterr().err) == [finish]
