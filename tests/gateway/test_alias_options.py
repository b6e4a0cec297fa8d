"""Options of an alias take effect on every endpoint whose prompt a chat template renders."""

from typing import Any

import pytest

from serving.replica import Replica, State
from tests.fakes.running import running_fake
from tests.gateway.fleet import deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

TURNS = [{"role": "user", "content": "hello there"}]
# By path: a body, and where its answer says how many tokens the prompt has.
COUNTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": ({"messages": TURNS}, ("usage", "prompt_tokens")),
    "/v1/responses": ({"input": "hello there"}, ("usage", "input_tokens")),
    "/v1/messages": ({"messages": TURNS, "max_tokens": 3}, ("usage", "input_tokens")),
    "/v1/messages/count_tokens": ({"messages": TURNS}, ("input_tokens",)),
    "/tokenize": ({"messages": TURNS}, ("count",)),
}
OFF = "\n</think>\n\n"  # what the fake's template adds where thinking is off


async def test_think_none_on_every_endpoint() -> None:
    """Every endpoint turns thinking off, so all of them count the same prompt; a text prompt stays as it is."""
    aliases = {name: {"ladder": ["hi"], "think": think} for name, think in (("on", "auto"), ("off", "none"))}
    counts: dict[str, set[int]] = {"on": set(), "off": set()}
    async with running_fake("--fake-think-prefix") as fake, running_gateway(deployment({"aliases": aliases})) as fleet:
        fleet.registry.put(Replica("hi-1", "hi", "bf16", fake.url, "m1", think="injected"), State.READY)
        for alias, found in counts.items():
            for path, (body, place) in COUNTED.items():
                answer = await fleet.ask({"model": alias, **body}, path=path)
                assert answer.status_code == 200, answer.text
                count: Any = answer.json()
                for key in place:
                    count = count[key]
                found.add(count)
        text = await fleet.ask({"model": "off", "prompt": "hello"}, path="/tokenize")
        assert "chat_template_kwargs" not in fake.requests("/tokenize")[-1]["body"]
    ((on,), (off,)) = counts.values()
    assert off == on + len(OFF)
    assert text.json()["count"] == len("hello")
