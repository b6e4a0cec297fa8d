"""Rows in the formats of fine-tuning tools become the same chats; the README lists what is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.calibration.formats import FORMATS, NATIVE, format_of
from quantize.calibration.parsing import parse_line, parse_value
from quantize.calibration.records import Message, Record, ToolCall, prompt_of

README = Path(__file__).parents[3] / "quantize" / "README.md"
ASKED = [("user", "1+1?"), ("assistant", "2")]
SYSTEM = [("system", "Be brief."), *ASKED]
CHATS = {
    "chat": [("user", "1+1?"), ("assistant", "<think>1, 2</think>2")],
    "Alpaca": [("user", "Add.\n1 and 1"), ("assistant", "2")],
    "query and response": [("system", "Be brief."), ("user", "0+0?"), ("assistant", "0"), *ASKED],
    "question and response": SYSTEM,
    "prompt and completion": ASKED[:1],
    "text": [],
}
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
BONN = ToolCall("weather", '{"city": "Bonn"}', "c1")


def row_of(value: Any) -> Record:
    """The row of a valid value."""
    row = parse_value(value, "f:1")
    assert isinstance(row, Record), row
    return row


def turns_of(value: Any) -> list[tuple[str, str]]:
    """Roles and contents of a value's chat."""
    return [(turn.role, turn.content) for turn in row_of(value).messages]


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_every_format_is_read(one: Any) -> None:
    """The example of each is recognized and becomes a chat, a completion or a text."""
    row = row_of(json.loads(one.example))
    assert row.format == one.name
    assert [(turn.role, turn.content) for turn in row.messages] == CHATS.get(one.name, ASKED)
    assert (row.completion, row.text) == {
        "prompt and completion": ("2", ""),
        "text": ("", "Once upon a time."),
    }.get(one.name, ("", ""))


def test_the_readme_lists_every_format() -> None:
    """With its keys and an example, in the order in which they are tried."""
    rows = [f"| {one.name} | {', '.join(f'`{key}`' for key in one.keys)} | `{one.example}` |" for one in FORMATS]
    assert "\n".join(rows) in README.read_text(encoding="utf-8")


def test_native_formats_are_in_the_table() -> None:
    """Recipes of these keep their names."""
    assert {one.name for one in FORMATS} >= NATIVE


@pytest.mark.parametrize(
    "value,turns",
    [
        ({"instruction": "1+1?", "input": "", "output": "2"}, ASKED),
        ({"instruction": "1+1?", "input": None, "output": "2", "text": "### Instruction: 1+1?"}, ASKED),
        ({"instruction": "1+1?", "context": "In words.", "response": "2"}, [("user", "1+1?\nIn words."), ASKED[1]]),
        ({"system": "Be brief.", "conversations": [{"from": "human", "value": "1+1?"}, ASKED_GPT]}, SYSTEM)
        if (ASKED_GPT := {"from": "gpt", "value": "2"})
        else None,
        ({"conversations": [{"role": "user", "content": "1+1?"}, {"role": "model", "content": "2"}]}, ASKED),
        ({"messages": [{"role": "human", "content": "1+1?"}, {"role": "gpt", "content": "2"}]}, ASKED),
        ({"messages": json.dumps([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])}, ASKED),
        ([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], ASKED),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}, ASKED_GPT]}, ASKED),
        (
            {"messages": [{"role": "user", "content": ["1+", {"text": "1?"}]}, ASKED_GPT]},
            [("user", "1+\n1?"), ASKED[1]],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "1+1?"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": [{"type": "text", "text": "one, two"}]},
                            {"type": "text", "text": "2"},
                        ],
                    },
                ]
            },
            [("user", "1+1?"), ("assistant", "<think>\none, two\n</think>\n\n2")],
        ),
        (
            {"query": "1+1?", "reasoning_content": "one, two", "response": "2"},
            [("user", "1+1?"), ("assistant", "<think>\none, two\n</think>\n\n2")],
        ),
        (
            {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]},
            ASKED,
        ),
        ({"prompt": "1+1?", "completion": [{"role": "assistant", "content": "2"}]}, ASKED),
        ({"prompt": "1+1?", "chosen": [{"role": "assistant", "content": "2"}], "rejected": []}, ASKED),
        ({"chosen": [{"role": "user", "content": "1+1?"}, ASKED_GPT], "rejected": []}, ASKED),
        ({"prompt": "1+1?", "chosen": [{"role": "user", "content": "1+1?"}, ASKED_GPT]}, ASKED),
        ({"conversations": [{"from": "human", "value": "1+1?"}], "chosen": ASKED_GPT, "rejected": ASKED_GPT}, ASKED),
        ({"instruction": "1+1?", "input": "", "chosen": "2", "rejected": "3"}, ASKED),
        ({"messages": [{"role": "user", "content": "1+1?"}, ASKED_GPT], "rejected_response": "3"}, ASKED),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}]},
            [("system", ""), ASKED[0]],
        ),
        ({"messages": None, "prompt": "1+1?", "response": "2"}, ASKED),
    ],
)
def test_spellings_of_the_same_chat(value: Any, turns: list[tuple[str, str]]) -> None:
    """Other keys, roles and containers say the same."""
    assert turns_of(value) == turns


def test_the_same_chat_has_one_digest_in_every_format() -> None:
    """So a chat that two files hold is one row."""
    values: list[Any] = [
        {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"instruction": "1+1?", "output": "2"},
        {"prompt": "1+1?", "completion": "2"},
    ]
    assert len({row_of(value).sha256 for value in values}) == 1


def test_a_chat_wins_over_what_is_derived_from_it() -> None:
    """A text column beside it is another model's template."""
    found = format_of({"text": "### Human: 1+1?", "messages": [], "instruction": "a", "output": "b"})
    assert found is not None
    assert found.name == "chat"


@pytest.mark.parametrize(
    "value,problem",
    [
        ({"images": ["a.png"], "messages": []}, 'has "images": only text can calibrate a model'),
        (
            {"messages": [{"role": "user", "content": "<image>What is it?"}]},
            "holds an image, video or audio: only text",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
            "holds an image, video or audio: only text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "holds an image, video or audio: only text",
        ),
        ({"chosen": "2"}, '"chosen" has no "prompt" beside it'),
        ({"prompt": "1+1?", "chosen": ""}, '"chosen" is empty or no text'),
        ({"query": "a", "response": "b", "history": [["a"]]}, '"history" is no list of [question, answer]'),
        ({"instruction": "a", "output": ""}, '"output" is empty or no text'),
        ({"tools": "{", "messages": []}, '"tools" is no list of functions'),
        ({"a": 1, "b": 2}, "has a format that is not known (its keys: a, b)"),
        ({"messages": [{"role": "assistant", "content": None}]}, 'message 1: "content" is empty or no text'),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "message 1: tool call 1 names no function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            'message 1: tool call 1: "arguments" is no JSON object',
        ),
    ],
)
def test_what_can_not_be_read_is_told(value: Any, problem: str) -> None:
    """In a line, with its place."""
    told = parse_value(value, "f:1")
    assert isinstance(told, str)
    assert told.startswith(f"f:1: {problem}")


def test_an_image_that_is_not_there_is_none() -> None:
    """Empty columns of images come with parquet files of chats; an answer may speak of the placeholder."""
    answer = {"role": "assistant", "content": "Write <image> there."}
    assert turns_of({"images": [], "messages": [{"role": "user", "content": "How?"}, answer]})[-1] == (
        "assistant",
        "Write <image> there.",
    )


@pytest.mark.parametrize("content", [None, "", "I look it up."])
def test_tool_calls_are_kept(content: str | None) -> None:
    """With any content, also none; their arguments are objects for a template and text for a server."""
    row = row_of(
        {
            "tools": [TOOL],
            "messages": [
                {"role": "user", "content": "Bonn?"},
                {"role": "assistant", "content": content, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "17 degrees"},
                {"role": "assistant", "content": "17 degrees."},
            ],
        }
    )
    called, answered = row.messages[1:3]
    assert (called.content, called.tool_calls) == (content or "", (BONN,))
    assert (answered.role, answered.tool_call_id, answered.name) == ("tool", "c1", "weather")
    assert json.loads(row.tools) == [TOOL]
    assert called.to_template()["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn"}
    assert called.to_request()["tool_calls"] == [CALL]
    assert row.uses_tools
    assert [turn.role for turn in prompt_of(row)] == ["user"]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Bonn"}'}}],
        [{"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'}],
        [{"role": "tool_call", "content": '[{"name": "weather", "arguments": {"city": "Bonn"}}]'}],
        [{"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Bonn"}}]}],
    ],
)
def test_calls_in_other_spellings(turns: list[dict[str, Any]]) -> None:
    """The first function calls of OpenAI, LLaMA-Factory's and ms-swift's roles."""
    row = row_of({"messages": [{"role": "user", "content": "Bonn?"}, *turns, {"role": "function", "content": "17"}]})
    assert row.messages[1:] == (
        Message("assistant", "", (ToolCall("weather", '{"city": "Bonn"}'),)),
        Message("tool", "17"),
    )


def test_parallel_calls_are_one_turn() -> None:
    """After a text, too: that is how templates and servers have them."""
    call = '{"name": "weather", "arguments": {"city": "%s"}}'
    turns = [{"role": "tool_call", "content": call % city} for city in ("Bonn", "Ulm")]
    row = row_of({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Wait."}, *turns]})
    assert [(turn.content, len(turn.tool_calls)) for turn in row.messages] == [("?", 0), ("Wait.", 2)]


@pytest.mark.parametrize("tools", [[TOOL], [WEATHER], json.dumps([TOOL]), json.dumps([WEATHER])])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_in_other_spellings(key: str, tools: Any) -> None:
    """As a list or as its JSON, wrapped or not, they are the functions that templates expect."""
    row = row_of({key: tools, "conversations": [{"from": "human", "value": "Bonn?"}]})
    assert json.loads(row.tools) == [TOOL]


@pytest.mark.parametrize("tools", [[], "", None, "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    """A row without functions is the same with an empty column."""
    plain = {"messages": [{"role": "user", "content": "a"}]}
    assert row_of({**plain, "tools": tools}) == row_of(plain)


def test_tools_are_part_of_what_a_row_says() -> None:
    """Another function, call or result is another row; a row without them has the digest that it always had."""
    plain = [{"role": "user", "content": "Bonn?"}, {"role": "assistant", "content": "17"}]
    digests = [
        row_of({"messages": plain}).sha256,
        row_of({"messages": plain, "tools": [TOOL]}).sha256,
        row_of({"messages": [plain[0], {**plain[1], "tool_calls": [CALL]}]}).sha256,
    ]
    assert len(set(digests)) == 3
    assert digests[0] == "a91166d2bf6a47dd621da9f14c155652bf6e7e77f35efa9498c54f832ef35dab"


def test_a_row_survives_its_way_to_the_child() -> None:
    """As dictionaries, in JSON."""
    from dataclasses import asdict  # noqa: PLC0415

    value = {"tools": [TOOL], "messages": [{"role": "assistant", "content": "a", "tool_calls": [CALL]}]}
    row = row_of(value)
    assert Record.from_dict(json.loads(json.dumps(asdict(row)))) == row


def test_json_of_any_depth_is_a_problem_of_its_row() -> None:
    """And never an exception."""
    assert isinstance(parse_line("[" * 200_000, "f:1"), str)
