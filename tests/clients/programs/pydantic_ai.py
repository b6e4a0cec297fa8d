# pip: pydantic-ai-slim[openai]==2.68.0
# ci: yes
# title: pydantic-ai
# runs: a run with a tool, a stream, and a structured answer
"""An agent that has a tool, and one whose answer has a type."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Heard(BaseModel):
    """What the fake calls every tool with."""

    heard: str


def weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"sunny in {city}"


async def main() -> None:
    """Ask three times."""
    provider = OpenAIProvider(base_url=f"{os.environ['QUANTGATE_URL']}/v1", api_key="any")
    model = OpenAIChatModel(os.environ["QUANTGATE_MODEL"], provider=provider)
    agent = Agent(model, tools=[weather])
    assert "heard say hello" in (await agent.run("say hello")).output
    async with agent.run_stream("say hello") as streamed:
        assert "heard say hello" in await streamed.get_output()
    assert (await Agent(model, output_type=Heard).run("say hello")).output.heard == "say hello"


asyncio.run(main())
