# pip: litellm==1.110.2
# title: LiteLLM as a client
# runs: a chat, a stream, embeddings and /v1/responses, as `openai/MODEL`
"""Calls of LiteLLM's SDK."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

place = {"model": f"openai/{os.environ['QUANTGATE_MODEL']}", "api_base": f"{os.environ['QUANTGATE_URL']}/v1"}
messages = [{"role": "user", "content": "say hello"}]
answer = litellm.completion(**place, api_key="any", messages=messages)
assert "heard say hello" in answer.choices[0].message.content
assert answer.usage.completion_tokens
parts = litellm.completion(**place, api_key="any", messages=messages, stream=True)
assert "heard say hello" in "".join(part.choices[0].delta.content or "" for part in parts)
assert litellm.embedding(**place, api_key="any", input=["hello"], encoding_format="float").data[0]["embedding"]
assert "heard say hello" in litellm.responses(**place, api_key="any", input="say hello").output[0].content[0].text
