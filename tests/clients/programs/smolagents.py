# pip: smolagents[openai]==1.26.0
# title: smolagents
# runs: a chat with a tool offered, and a stream
"""The model that agents use."""

import os

from smolagents import ChatMessage, OpenAIModel, tool


@tool
def weather(city: str) -> str:
    """Look up the weather.

    Args:
        city: Where.

    """
    return f"sunny in {city}"


model = OpenAIModel(os.environ["QUANTGATE_MODEL"], api_base=f"{os.environ['QUANTGATE_URL']}/v1", api_key="any")
messages = [ChatMessage(role="user", content=[{"type": "text", "text": "say hello"}])]
assert "heard say hello" in model.generate(messages).content
assert model.generate(messages, tools_to_call_from=[weather]).tool_calls[0].function.name == "weather"
assert "heard say hello" in "".join(delta.content or "" for delta in model.generate_stream(messages))
