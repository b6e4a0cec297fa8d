# pip: semantic-kernel==1.45.0
# title: Semantic Kernel (Python)
# runs: a chat, and a stream
"""The chat service of Semantic Kernel."""

import asyncio
import os

from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory


async def main() -> None:
    """Ask twice."""
    client = AsyncOpenAI(base_url=f"{os.environ['QUANTGATE_URL']}/v1", api_key="any", max_retries=0)
    service = OpenAIChatCompletion(ai_model_id=os.environ["QUANTGATE_MODEL"], async_client=client)
    history, settings = ChatHistory(), OpenAIChatPromptExecutionSettings()
    history.add_user_message("say hello")
    assert "heard say hello" in str(await service.get_chat_message_content(history, settings))
    parts = [str(part) async for part in service.get_streaming_chat_message_content(history, settings)]
    assert "heard say hello" in "".join(parts)


asyncio.run(main())
