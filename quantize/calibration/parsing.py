"""One JSON value of a calibration file -> a checked row, or the problem that it has. Pure."""

import json
from typing import Any

from quantize.calibration.formats import native_form
from quantize.calibration.messages import is_text, tools_of, turns_of
from quantize.calibration.records import Message, Record, content_sha256


def parse_line(line: str, where: str) -> Record | str:
    """Parse a line of JSON; a string is the problem, with its place."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"{where}: not JSON: {error}"
    return parse_value(value, where)


def parse_value(value: Any, where: str) -> Record | str:
    """Check one row in any known format; a string is the problem, with its place."""
    record = _row(value, where)
    if isinstance(record, Record):
        return (
            record if _is_unicode(record) else f"{where}: holds half of a surrogate pair, which no tokenizer can read"
        )
    return f"{where}: {record}"


def _row(value: Any, where: str) -> Record | str:
    name, native = native_form(value)
    if isinstance(native, str):
        return native
    tools = tools_of(native.get("tools"))
    if tools is None:
        return '"tools" is no list of functions'
    if "messages" in native:
        turns = turns_of(native["messages"], '"messages"')
        if isinstance(turns, str):
            return turns
        return Record(turns, where, content_sha256(turns, tools), tools=tools, format=name)
    if "completion" in native:
        return _completion_row(native, where, tools, name)
    if not is_text(native["text"]):
        return '"text" is empty or no text'
    return Record((), where, content_sha256([Message("text", native["text"])]), text=native["text"], format=name)


def _completion_row(value: dict[str, Any], where: str, tools: str, name: str) -> Record | str:
    prompt, completion = value.get("prompt"), value["completion"]
    turns = turns_of([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, '"prompt"')
    if isinstance(turns, str):
        return turns
    if not is_text(completion):
        return '"completion" is empty or no text'
    mark = value.get("self_generated", {"from": "", "finished": True})
    if not _is_mark(mark):
        return '"self_generated" is not {"from": sha256 of a row, "finished": true or false}'
    sha256 = content_sha256([*turns, Message("assistant", completion)], tools)
    return Record(
        turns,
        where,
        sha256,
        completion=completion,
        finished=mark["finished"],
        origin=mark["from"],
        tools=tools,
        format=name,
    )


def _is_mark(mark: Any) -> bool:
    return isinstance(mark, dict) and isinstance(mark.get("from"), str) and isinstance(mark.get("finished"), bool)


def _is_unicode(record: Record) -> bool:
    try:
        f"{record.words}{record.tools}".encode()
    except UnicodeEncodeError:
        return False
    return True
