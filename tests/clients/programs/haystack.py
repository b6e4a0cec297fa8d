# pip: haystack-ai==3.4.1
# title: Haystack
# runs: a chat, and a stream
"""The chat generator that pipelines use."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

chunks = []
place = {"model": os.environ["QUANTGATE_MODEL"], "api_base_url": f"{os.environ['QUANTGATE_URL']}/v1"}
for callback in (None, chunks.append):
    generator = OpenAIChatGenerator(**place, api_key=Secret.from_token("any"), streaming_callback=callback)
    assert "heard say hello" in generator.run([ChatMessage.from_user("say hello")])["replies"][0].text
assert chunks
