# pip: langchain-openai==1.7.4
# title: LangChain (Python)
# runs: a chat, a stream, a chat with a tool, and /v1/responses
"""ChatOpenAI, on both APIs."""

import os

from langchain_openai import ChatOpenAI


def weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"sunny in {city}"


place = {"model": os.environ["QUANTGATE_MODEL"], "base_url": f"{os.environ['QUANTGATE_URL']}/v1", "api_key": "any"}
for responses in (False, True):
    chat = ChatOpenAI(**place, max_retries=0, use_responses_api=responses)
    assert "heard say hello" in chat.invoke("say hello").text
    assert "heard say hello" in "".join(part.text for part in chat.stream("say hello"))
    assert "heard say hello" in chat.bind_tools([weather]).invoke("say hello").text
    assert chat.bind_tools([weather], tool_choice="weather").invoke("say hello").tool_calls[0]["name"] == "weather"
