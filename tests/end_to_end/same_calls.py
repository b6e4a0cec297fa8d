"""Calls that are made twice, to vLLM itself and through the gateway: a path and a body without the model's name."""

from collections.abc import Mapping
from typing import Any

Call = tuple[str, dict[str, Any]]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"

STREAM: dict[str, Any] = {"stream": True}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
RUNNING_USAGE: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
QUESTION = [{"role": "user", "content": "Name three colours."}]
ODD = [{"role": "user", "content": 'Repeat: Grüße 汉字 👩‍👩‍👧 \x00\u2028 "model":"m1" \\n ½'}]
LONG = "word " * 5000
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
# With `strict`, vLLM samples arguments that fit the schema, so that any model calls the tool.
STRICT = {"type": "function", "function": {**WEATHER, "strict": True}}
NAMED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 24}
JSON = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
# Greedy sampling refuses n > 1. At higher temperatures the numerics of the batch would change what is sampled.
TWO: dict[str, Any] = {"n": 2, "temperature": 0.02}


def chat(**changes: Any) -> Call:
    """Ask as chat clients do."""
    return CHAT, {"messages": QUESTION, "max_tokens": 6, "temperature": 0, "seed": 7, **changes}


def text(**changes: Any) -> Call:
    """Ask as older clients do."""
    return TEXT, {"prompt": "One, two, three,", "max_tokens": 6, "temperature": 0, "seed": 7, **changes}


def response(**changes: Any) -> Call:
    """Ask as Codex does."""
    return RESPONSES, {"input": "Name three colours.", "max_output_tokens": 6, "temperature": 0, **changes}


def message(**changes: Any) -> Call:
    """Ask as Claude Code does."""
    return MESSAGES, {"messages": QUESTION, "max_tokens": 6, "temperature": 0, **changes}


ANSWERED: Mapping[str, Call] = {
    "chat": chat(),
    "chat, stream": chat(**STREAM),
    "chat, no options": chat(**STREAM, stream_options=None),
    "chat, usage": chat(**USAGE),
    "chat, running usage": chat(**RUNNING_USAGE),
    "chat, running usage without usage": chat(**STREAM, stream_options={"continuous_usage_stats": True}),
    "chat, two choices": chat(**TWO),
    "chat, two choices, stream": chat(**TWO, **STREAM),
    "chat, two choices, usage": chat(**TWO, **USAGE),
    "chat, logprobs": chat(logprobs=True, top_logprobs=3),
    "chat, logprobs, stream": chat(logprobs=True, top_logprobs=3, **STREAM),
    "chat, prompt logprobs": chat(prompt_logprobs=2),
    "chat, stop": chat(stop=["Blue", "."], max_tokens=20),
    "chat, stop, stream": chat(stop=".", max_tokens=20, **STREAM),
    "chat, newer length": (CHAT, {"messages": QUESTION, "max_completion_tokens": 3, "temperature": 0}),
    "chat, one token, stream": chat(**STREAM, max_tokens=1),
    "chat, named tool": chat(**NAMED),
    "chat, named tool, stream": chat(**NAMED, **STREAM),
    "chat, required tool, usage": chat(**NAMED | {"tool_choice": "required"}, **USAGE),
    "chat, tools": chat(tools=[TOOL]),
    "chat, tools, stream": chat(tools=[TOOL], **STREAM),
    "chat, schema": chat(response_format=JSON, max_tokens=24),
    "chat, schema, stream": chat(response_format=JSON, max_tokens=24, **STREAM),
    "chat, odd characters": chat(messages=ODD, max_tokens=24),
    "chat, odd characters, stream": chat(messages=ODD, max_tokens=24, **STREAM),
    "chat, echo, stream": chat(echo=True, **STREAM),
    "chat, token ids, stream": chat(return_token_ids=True, **STREAM),
    "chat, unknown field": chat(nonsense=1),
    "text": text(),
    "text, stream": text(**STREAM),
    "text, usage": text(**USAGE),
    "text, running usage": text(**RUNNING_USAGE),
    "text, echo": text(echo=True, logprobs=2),
    "text, echo, stream": text(echo=True, **STREAM),
    "text, logprobs, stream": text(logprobs=2, **STREAM),
    "text, prompts": text(prompt=["One, two,", "Red, green,"]),
    "text, prompts, stream": text(prompt=["One, two,", "Red, green,"], **STREAM),
    "text, prompts, choices, usage": text(prompt=["One, two,", "Red, green,"], **TWO, **USAGE),
    "text, token ids": text(prompt=[504, 28, 718]),
    "text, lists of token ids": text(prompt=[[504, 28], [718]]),
    "responses": response(),
    "responses, stream": response(**STREAM),
    "responses, instructions": response(instructions="Be brief.", metadata={"model": "mine"}),
    "responses, items, stream": response(input=QUESTION, instructions="Be brief.", max_output_tokens=20, **STREAM),
    "responses, tool, stream": response(
        tools=[{"type": "function", "name": "weather", "parameters": CITY, "strict": True}],
        **{"tool_choice": "required", "max_output_tokens": 24, **STREAM},
    ),
    "messages": message(),
    "messages, stream": message(**STREAM),
    "messages, system": message(system="Be brief."),
    "messages, system, stream": message(system=[{"type": "text", "text": "Be brief."}], **STREAM),
    "messages, stop, stream": message(stop_sequences=["."], max_tokens=20, **STREAM),
    "messages, tool, stream": message(
        tools=[{"name": "weather", "input_schema": CITY}], tool_choice={"type": "any"}, **STREAM | {"max_tokens": 24}
    ),
    "count tokens": (f"{MESSAGES}/count_tokens", {"messages": QUESTION, "system": "Be brief."}),
    "tokenize": ("/tokenize", {"prompt": "Grüße 汉字"}),
    "tokenize a chat": ("/tokenize", {"messages": QUESTION, "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [504, 28, 718]}),
}

REFUSED: Mapping[str, Call] = {
    "chat, too long": chat(messages=[{"role": "user", "content": LONG}]),
    "chat, too long, stream": chat(messages=[{"role": "user", "content": LONG}], **STREAM),
    "chat, longer than the context": chat(max_tokens=5000),
    "chat, wrong type": chat(temperature="hot"),
    "chat, out of range": chat(top_p=3),
    "chat, no messages": (CHAT, {"max_tokens": 3}),
    "chat, messages of nothing": chat(messages=[{"role": "user", "content": None}]),
    "chat, options without a stream": chat(stream_options={"include_usage": True}),
    "chat, bad schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/a"}}}
    ),
    "chat, tool that isn't there": chat(**NAMED | {"tools": []}),
    "text, too long": text(prompt=LONG),
    "text, no such token": text(prompt=[10**9]),
    "responses, too long": response(input=LONG, **STREAM),
    "responses, wrong type": response(temperature="hot"),
    "messages, too long": message(messages=[{"role": "user", "content": LONG}], **STREAM),
    "messages, wrong type": message(temperature="hot"),
    "messages, no length": (MESSAGES, {"messages": QUESTION}),
    "count tokens of nothing": (f"{MESSAGES}/count_tokens", {"messages": []}),
    "tokenize nothing": ("/tokenize", {"x": 1}),
    "detokenize text": ("/detokenize", {"tokens": ["x"]}),
}

# The model has to call the tool.
TOOL_CALLS: Mapping[str, Call] = {
    "chat": chat(tools=[STRICT], tool_choice="required", max_tokens=96),
    "responses": response(
        tools=[{"type": "function", "strict": True, **WEATHER}], tool_choice="required", max_output_tokens=96
    ),
    "messages": message(
        tools=[{"name": "weather", "input_schema": CITY, "strict": True}], tool_choice={"type": "any"}, max_tokens=96
    ),
}
