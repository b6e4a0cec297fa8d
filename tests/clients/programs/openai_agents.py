# pip: openai-agents==0.24.0
# ci: yes
# title: OpenAI Agents SDK
# runs: a run with a tool through /v1/responses, whole and streamed, and through /v1/chat/completions
"""An agent that has a tool."""

import asyncio
import os

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"sunny in {city}"


async def main() -> None:
    """Run it on both APIs."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{os.environ['QUANTGATE_URL']}/v1", api_key="any", max_retries=0)
    for model in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(name="a", tools=[weather], model=model(model=os.environ["QUANTGATE_MODEL"], openai_client=client))
        assert "heard say hello" in (await Runner.run(agent, "say hello")).final_output
        streamed = Runner.run_streamed(agent, "say hello")
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds
        assert "heard say hello" in streamed.final_output


asyncio.run(main())
