"""Vectors as vLLM writes them: floats, or base64 of little-endian float32."""

import base64
import struct
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tests.fakes.asks import ApiError, check_model, embedded_inputs
from tests.fakes.options import Options

DIMENSIONS = 4


def embedded(body: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """One vector for each input, made of its tokens: equal inputs are equal, whichever way they were written."""
    check_model(body, options)
    inputs = embedded_inputs(body)
    kind = body.get("encoding_format") or "float"
    if kind not in ("float", "base64"):
        message = f"1 validation error:\n  {{'type': 'literal_error', 'msg': 'not {kind!r}'}}"
        raise ApiError(400, "Bad Request", message, "body.encoding_format")
    tokens = sum(map(len, inputs))
    return {
        "id": f"embd-{uuid.uuid4().hex[:16]}",
        "object": "list",
        "created": int(time.time()),
        "model": options.served[0],
        "data": [
            {"index": index, "object": "embedding", "embedding": _written(vector(each), kind)}
            for index, each in enumerate(inputs)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }


def vector(tokens: list[int]) -> tuple[float, ...]:
    """Give what a fake thinks of some tokens, in numbers that float32 holds exactly."""
    return (float(len(tokens)), float(sum(tokens) % 1024), tokens[0] / 8, tokens[-1] / 8)


def _written(numbers: tuple[float, ...], kind: str) -> list[float] | str:
    if kind == "float":
        return list(numbers)
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *numbers)).decode()
