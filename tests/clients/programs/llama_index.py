# pip: llama-index-llms-openai-like==0.8.1
# title: LlamaIndex
# runs: a chat, a stream, and a chat with a tool
"""OpenAILike, LlamaIndex's client for other servers."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"sunny in {city}"


place = {"model": os.environ["QUANTGATE_MODEL"], "api_base": f"{os.environ['QUANTGATE_URL']}/v1", "api_key": "any"}
model = OpenAILike(**place, is_chat_model=True, is_function_calling_model=True, max_retries=0)
messages = [ChatMessage(role="user", content="say hello")]
assert "heard say hello" in model.chat(messages).message.content
assert "heard say hello" in "".join(part.delta or "" for part in model.stream_chat(messages))
tool = FunctionTool.from_defaults(weather)
assert "heard say hello" in model.chat_with_tools([tool], user_msg="say hello").message.content
