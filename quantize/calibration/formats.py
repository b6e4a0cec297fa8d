"""The formats of rows that fine-tuning tools write: one table, a row in, its native form out. Pure.

The native form is `{"messages": [...]}`, `{"prompt": ..., "completion": text}` or `{"text": ...}`; `tools` beside it
stay. Messages in it are still in their tool's spelling, which `quantize.calibration.messages` reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.calibration.messages import REASONING_KEYS, as_list, has_media, is_text, pairs_of

Fields = Mapping[str, Any]
ONLY_TEXT = "only text can calibrate a model; remove the rows with images, videos or audio"
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
KNOWN = 'a line is {"messages": [{"role": ..., "content": ...}]}, {"prompt": ..., "completion": ...} or {"text": ...}'
# Formats that were always read, and read as they always were.
NATIVE = frozenset({"chat", "prompt and completion", "text"})


@dataclass(frozen=True, slots=True)
class Format:
    """A format of rows, recognized by its keys; `convert` returns the native form, or the problem."""

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Fields], dict[str, Any] | str]
    example: str


def format_of(row: Fields) -> Format | None:
    """Find the first format all of whose keys a row has; keys that are null count only if nothing else fits."""
    given = [one for one in FORMATS if all(row.get(key) is not None for key in one.keys)]
    named = [one for one in FORMATS if all(key in row for key in one.keys)]
    return next(iter([*given, *named]), None)


def native_form(row: Any) -> tuple[str, dict[str, Any] | str]:
    """Convert a row; returns the name of its format, and its native form or the problem."""
    if isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        return "", f"is no object; {KNOWN}"
    media = next((key for key in _MEDIA_KEYS if row.get(key)), None)
    if media:
        return "", f'has "{media}": {ONLY_TEXT}'
    found = format_of(row)
    if found is None:
        keys = ", ".join(map(str, list(row)[:8])) or "none"
        return "", f"has a format that is not known (its keys: {keys}); {KNOWN}, or see `Data` in quantize/README.md"
    native = found.convert(row)
    if isinstance(native, str):
        return found.name, native
    if any(map(has_media, _messages_in(native))):
        return found.name, f"holds an image, video or audio: {ONLY_TEXT}"
    tools = row.get("tools") or row.get("functions")
    return found.name, {**native, "tools": tools} if tools else native


def _messages_in(native: Fields) -> list[Any]:
    return [item for key in ("messages", "prompt") if isinstance(native.get(key), list) for item in native[key]]


def _chat(key: str) -> Callable[[Fields], dict[str, Any] | str]:
    """Messages under `key`, with a system prompt that may stand beside them."""

    def convert(row: Fields) -> dict[str, Any]:
        turns = as_list(row[key])
        system = row.get("system") if key != "messages" else None
        return {"messages": [*_system(system), *turns] if isinstance(turns, list) else turns}

    return convert


def _pair(question: str, answer: str, *, context: tuple[str, ...] = ()) -> Callable[[Fields], dict[str, Any] | str]:
    """One question with its answer, with a system prompt, a history and more of the question in other columns."""

    def convert(row: Fields) -> dict[str, Any] | str:
        history = pairs_of(as_list(row.get("history")))
        if history is None:
            return '"history" is no list of [question, answer]'
        for key in (question, answer):
            if not is_text(row[key]):
                return f'"{key}" is empty or no text'
        asked = "\n".join([row[question], *(row[key] for key in context if is_text(row.get(key)))])
        turns = [*history, (asked, row[answer])]
        reasoning = {key: row[key] for key in REASONING_KEYS if is_text(row.get(key))}
        messages = [turn for pair in turns for turn in _exchange(*pair)]
        messages[-1] |= reasoning
        return {"messages": [*_system(row.get("system") or row.get("system_prompt")), *messages]}

    return convert


def _completion(row: Fields) -> dict[str, Any] | str:
    """A prompt with its raw completion; a completion of messages continues the prompt's."""
    prompt, completion = as_list(row.get("prompt")), as_list(row["completion"])
    if isinstance(completion, dict):
        completion = [completion]
    if not isinstance(completion, list):
        mark = {"self_generated": row["self_generated"]} if "self_generated" in row else {}
        return {"prompt": row.get("prompt"), "completion": completion, **mark}
    if not completion:
        return '"completion" is empty or no text'
    before = _asked(prompt)
    return '"prompt" is empty or no list' if before is None else {"messages": [*before, *completion]}


def _preferred(row: Fields) -> dict[str, Any] | str:
    """The chosen answer of a preference pair (DPO); the rejected one is what the model should not say."""
    names = ("prompt", "conversations", "conversation", "query", "question", "instruction")
    prompt = as_list(next((row[name] for name in names if row.get(name)), None))
    if isinstance(prompt, str) and is_text(row.get("input")):
        prompt = f"{prompt}\n{row['input']}"
    chosen = as_list(row["chosen"])
    chosen = [chosen] if isinstance(chosen, dict) else chosen
    if isinstance(chosen, str) and is_text(chosen):
        before = _asked(prompt)
        if before is None:
            return '"chosen" has no "prompt" beside it'
        chosen = [{"role": "assistant", "content": chosen}]
    elif not isinstance(chosen, list) or not chosen:
        return '"chosen" is empty or no text'
    else:
        # With the question already in it, the chosen conversation is complete.
        complete = isinstance(chosen[0], dict) and chosen[0].get("role", chosen[0].get("from")) not in _ANSWERS
        before = [] if complete else (_asked(prompt) or [])
    return {"messages": [*_system(row.get("system")), *before, *chosen]}


def _text(row: Fields) -> dict[str, Any]:
    return {"text": row["text"]}


_ANSWERS = ("assistant", "gpt", "model", "function_call", "tool_call")


def _asked(prompt: Any) -> list[Any] | None:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    return prompt if isinstance(prompt, list) and prompt else None


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(prompt: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": prompt}] if is_text(prompt) else []


# The first that fits counts: a chat before what is derived from it (`text` of Alpaca is another model's template).
FORMATS = (
    Format(
        "chat",
        ("messages",),
        _chat("messages"),
        '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>1, 2</think>2"}]}',
    ),
    Format(
        "preference (DPO)",
        ("chosen",),
        _preferred,
        '{"prompt": "1+1?", "chosen": "2", "rejected": "3"}',
    ),
    Format(
        "ShareGPT",
        ("conversations",),
        _chat("conversations"),
        '{"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}',
    ),
    Format(
        "conversation",
        ("conversation",),
        _chat("conversation"),
        '{"conversation": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}',
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        _pair("instruction", "output", context=("input",)),
        '{"instruction": "Add.", "input": "1 and 1", "output": "2"}',
    ),
    Format(
        "instruction and response",
        ("instruction", "response"),
        _pair("instruction", "response", context=("context", "input")),
        '{"instruction": "1+1?", "response": "2"}',
    ),
    Format(
        "query and response",
        ("query", "response"),
        _pair("query", "response"),
        '{"system": "Be brief.", "query": "1+1?", "response": "2", "history": [["0+0?", "0"]]}',
    ),
    Format(
        "prompt and completion",
        ("completion",),
        _completion,
        '{"prompt": "1+1?", "completion": "2"}',
    ),
    Format(
        "prompt and response",
        ("prompt", "response"),
        _pair("prompt", "response"),
        '{"prompt": "1+1?", "response": "2"}',
    ),
    Format(
        "question and answer",
        ("question", "answer"),
        _pair("question", "answer"),
        '{"question": "1+1?", "answer": "2"}',
    ),
    Format(
        "question and response",
        ("question", "response"),
        _pair("question", "response"),
        '{"system_prompt": "Be brief.", "question": "1+1?", "response": "2"}',
    ),
    Format(
        "problem and solution",
        ("problem", "solution"),
        _pair("problem", "solution"),
        '{"problem": "1+1?", "solution": "2"}',
    ),
    Format(
        "input and output",
        ("input", "output"),
        _pair("input", "output"),
        '{"input": "1+1?", "output": "2"}',
    ),
    Format(
        "text",
        ("text",),
        _text,
        '{"text": "Once upon a time."}',
    ),
)
