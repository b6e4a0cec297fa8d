"""Functions and their calls are rendered by the base's template, and go along where the base answers itself."""

import json
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from quantize.calibration.generation_child import _prompt_ids
from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Record
from quantize.calibration.rendering import render
from quantize.calibration.replica_client import Answer, Question, Sampling, request_body
from quantize.calibration.self_generation import line_of, prompts_of
from quantize.calibration.tokenizing import load_tokenizer, tokenize_split
from quantize.running.worker import WorkerChannel
from tests.quantize.calibration.test_rendering import Templated
from tests.quantize.calibration.test_tokenizing import write_base
from tests.quantize.models import CHATML

# What Qwen's do: functions first, calls as JSON, results as turns of the user.
TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}({{ t.function.parameters.properties | join(',') }})"
    "{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.city }}</tool_call>"
    "{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
CHAT = [
    {"role": "user", "content": "Bonn?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "17"},
    {"role": "assistant", "content": "<think>\nwarm\n</think>\n\n17 degrees"},
]


def row_of(**line: Any) -> Record:
    """The row of a line."""
    row = parse_line(json.dumps(line), "f:1")
    assert isinstance(row, Record)
    return row


def test_functions_and_calls_are_in_the_text() -> None:
    """With arguments as objects, as vLLM and transformers pass them; reasoning is found after them."""
    rendered = render(row_of(tools=[TOOL], messages=CHAT), Templated(TOOLS))
    assert rendered.text == (
        "<tools>weather(city)</tools><|user|>Bonn?<|end|><|assistant|><tool_call>weather:Bonn</tool_call><|end|>"
        "<|tool|>17<|end|><|assistant|><think>\nwarm\n</think>\n\n17 degrees<|end|>"
    )
    assert [rendered.text[slice(*span)] for span in rendered.reasoning] == ["<think>\nwarm\n</think>"]


def test_reasoning_that_the_template_deletes_is_restored_beside_tools() -> None:
    """The prompt that it continues has the functions, too."""
    template = TOOLS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    rendered = render(row_of(tools=[TOOL], messages=CHAT), Templated(template))
    assert rendered.text.startswith("<tools>weather(city)</tools>")
    assert rendered.text.endswith("<|assistant|><think>\nwarm\n</think>\n\n17 degrees<|end|>")


def test_a_chat_may_end_with_a_call() -> None:
    """It is never replaced by its content alone."""
    rendered = render(row_of(tools=[TOOL], messages=CHAT[:2]), Templated(TOOLS))
    assert rendered.text.endswith("<|assistant|><tool_call>weather:Bonn</tool_call><|end|>")


def test_functions_go_along_where_the_base_answers_itself(tmp_path: Path) -> None:
    """In the prompt of the child, in the request to a replica, and in the line that is written."""
    row = row_of(tools=[TOOL], messages=CHAT)
    (prompt,) = prompts_of([row])
    question = Question(prompt.messages, 7, prompt.tools)
    body = request_body("m", question, Sampling(8))
    assert (body["tools"], body["tool_choice"]) == ([TOOL], "none")
    tokenizer = load_tokenizer(write_base(tmp_path / "base", TOOLS, adds_bos=False))
    ids = _prompt_ids(json.loads(json.dumps(asdict(question))), tokenizer)
    text = "<tools>weather(city)</tools><|user|>Bonn?<|end|><|assistant|>"
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    answered = row_of(**json.loads(line_of(prompt, Answer("17", finished=True))))
    assert (answered.tools, answered.messages) == (row.tools, row.messages[:1])


def test_a_template_without_tools_is_told(tmp_path: Path) -> None:
    """What it leaves out is not calibrated on."""
    base = write_base(tmp_path / "base", CHATML, adds_bos=False)
    rows = [asdict(row_of(tools=[TOOL], messages=CHAT)), asdict(row_of(text="plain"))]
    told = tokenize_split(
        {"base": str(base), "max_tokens": 999, "rows": {"a": rows}}, WorkerChannel(TextIOWrapper(BytesIO()))
    )
    assert told["notes"] == ["warning: 1 of 2 rows have tools, and the base's chat template renders none of them"]
