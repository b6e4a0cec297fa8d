"""Messages, items and their parts as a provider gets them: known kinds with known keys, and no references.

litellm asks providers with the operator's credentials. A part that names a file (`file_id`, `gs://...`, a URL as
`file_data`) would be read with them, so data of a request is in the request, or at a URL that `gateway.media_domains`
permits (gateway.openai.media has checked it).
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gateway.openai.external_shapes import known, objects, refused, require_object, require_text
from gateway.openai.fields import quoted

Fields = Mapping[str, Any]

_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,[A-Za-z0-9+/]+={0,2}", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_WEB = re.compile(r"https?://", re.IGNORECASE)
# Texts that embedding models of Google and Amazon take for files of the operator's account.
_STORED = re.compile(r"(?:gs|s3)://|^\s*files/|//generativelanguage\.googleapis\.com", re.IGNORECASE)

_MESSAGE_KEYS = ("role", "name", "tool_call_id", "refusal", "function_call")
_ITEM_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "message": ("type", "role", "id", "status"),
        "function_call": ("type", "id", "call_id", "name", "arguments", "status"),
        "function_call_output": ("type", "id", "call_id", "status"),
        "custom_tool_call": ("type", "id", "call_id", "name", "input", "status"),
        "custom_tool_call_output": ("type", "id", "call_id", "status"),
    }
)
# Where an item has text or parts.
_HOLDERS: Mapping[str, str] = MappingProxyType(
    {"message": "content", "function_call_output": "output", "custom_tool_call_output": "output"}
)


def chat_messages(messages: Any) -> list[dict[str, Any]]:
    """Check and copy the messages of a chat; RequestError for a shape or part that providers do not get."""
    return [_message(entry, f"messages[{place}]") for place, entry in enumerate(objects(messages, "messages"))]


def response_input(given: Any) -> Any:
    """Check and copy the `input` of a response: a text, or items, of which reasoning of earlier turns is left out."""
    if isinstance(given, str):
        return given
    items = enumerate(objects(given, "input"))
    return [_item(entry, f"input[{place}]") for place, entry in items if entry.get("type") != "reasoning"]


def embedding_input(given: Any) -> Any:
    """Check the `input` of embeddings: texts or token ids, none of which is a reference to a file."""
    if not given or not isinstance(given, str | list):
        raise refused("input", "it is neither a text nor a list", "send texts or token ids")
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, str) and _STORED.search(entry):
            raise refused("input", f"{quoted(entry)} names a file", "send its text")
        if isinstance(entry, dict):
            raise refused("input", "an entry is an object", "send texts or token ids")
    return given


def _message(message: Fields, where: str) -> dict[str, Any]:
    require_text(message.get("role"), f"{where}.role")
    kept = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    if "content" in message:
        kept["content"] = _content(message["content"], f"{where}.content")
    if message.get("tool_calls") is not None:
        kept["tool_calls"] = [dict(call) for call in objects(message["tool_calls"], f"{where}.tool_calls")]
    return kept


def _item(item: Fields, where: str) -> dict[str, Any]:
    kind = item.get("type") or "message"
    keys = _ITEM_KEYS.get(kind) if isinstance(kind, str) else None
    if keys is None:
        raise refused(where, f"the item has the type {quoted(str(kind))}", f"send {', '.join(_ITEM_KEYS)}")
    if kind == "message":
        require_text(item.get("role"), f"{where}.role")
    kept = {key: item[key] for key in keys if item.get(key) is not None}
    if (holder := _HOLDERS.get(kind)) is not None and holder in item:
        kept[holder] = _content(item[holder], f"{where}.{holder}")
    return kept


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    return [_part(part, f"{where}[{place}]") for place, part in enumerate(objects(content, where))]


def _part(part: Fields, where: str) -> dict[str, Any]:
    kind = part.get("type")
    copy = _PARTS.get(kind) if isinstance(kind, str) else None
    if copy is None:
        raise refused(where, f"the part has the type {quoted(str(kind))}", f"send {', '.join(_PARTS)}")
    return {"type": kind, **copy(part, where)}


def _text(part: Fields, where: str) -> dict[str, Any]:
    return {"text": require_text(part.get("text"), f"{where}.text")}


def _refusal(part: Fields, where: str) -> dict[str, Any]:
    return {"refusal": require_text(part.get("refusal"), f"{where}.refusal")}


def _image_url(part: Fields, where: str) -> dict[str, Any]:
    image = part.get("image_url")
    url, detail = (image.get("url"), image.get("detail")) if isinstance(image, dict) else (image, None)
    return {"image_url": {"url": _media_url(url, f"{where}.image_url"), **known("detail", detail)}}


def _input_image(part: Fields, where: str) -> dict[str, Any]:
    _refuse_reference(part, where)
    url = _media_url(part.get("image_url"), f"{where}.image_url")
    return {"image_url": url, **known("detail", part.get("detail"))}


def _input_audio(part: Fields, where: str) -> dict[str, Any]:
    audio = require_object(part.get("input_audio"), f"{where}.input_audio")
    data = require_text(audio.get("data"), f"{where}.input_audio.data")
    if not _BASE64.fullmatch(data):
        raise refused(f"{where}.input_audio.data", "it is not base64", "send the audio in base64")
    return {"input_audio": {"data": data, **known("format", audio.get("format"))}}


def _file(part: Fields, where: str) -> dict[str, Any]:
    return {"file": _file_data(require_object(part.get("file"), f"{where}.file"), f"{where}.file")}


def _file_data(file: Fields, where: str) -> dict[str, Any]:
    _refuse_reference(file, where)
    data = require_text(file.get("file_data"), f"{where}.file_data")
    if not _DATA_URL.fullmatch(data):
        raise refused(f"{where}.file_data", "it is not a data: URL", "send data:TYPE;base64,DATA")
    return {"file_data": data, **known("filename", file.get("filename"))}


_PARTS: Mapping[str, Callable[[Fields, str], dict[str, Any]]] = MappingProxyType(
    {
        "text": _text,
        "input_text": _text,
        "output_text": _text,
        "refusal": _refusal,
        "image_url": _image_url,
        "input_image": _input_image,
        "input_audio": _input_audio,
        "file": _file,
        "input_file": _file_data,
    }
)


def _refuse_reference(holder: Fields, where: str) -> None:
    for key in ("file_id", "file_url"):
        if holder.get(key) is not None:
            raise refused(f"{where}.{key}", "it names a file that is not in the request", "send its data")


def _media_url(url: Any, where: str) -> str:
    text = require_text(url, where)
    if not (_DATA_URL.fullmatch(text) or _WEB.match(text)):
        raise refused(where, f"{quoted(text)} is not a URL of media", "send data:TYPE;base64,DATA")
    return text
