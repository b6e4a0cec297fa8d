"""What a client wishes of whoever answers: the precisions that it accepts, and a floor under the quality."""

from collections.abc import Mapping

import msgspec

from config.schema import NO_FLOOR, Floor
from gateway.errors import RequestError
from gateway.openai.fields import quoted, read, read_object
from gateway.openai.json_scan import Fields

PRECISION_HEADER = "x-quantgate-precision"
FLOOR_HEADER = "x-quantgate-floor"
# Ours, never the engine's: the key that OpenRouter's clients send to choose a precision.
PROVIDER = "provider"

LONGEST_LIST_BYTES = 4096

_TEXTS = msgspec.json.Decoder(list[str] | None)


def parse_precisions(fields: Fields, headers: Mapping[bytes, bytes]) -> frozenset[str] | None:
    """The precisions that the caller accepts; the header and the body's `provider` must both agree."""
    asked = []
    if PROVIDER in fields and (named := _quantizations(fields)):
        asked.append(frozenset(named))
    if header := headers.get(PRECISION_HEADER.encode()):
        parts = header.decode("latin-1").split(",")
        asked.append(frozenset(filter(None, (part.strip() for part in parts))))
    return frozenset.intersection(*asked) if asked else None


def _quantizations(fields: Fields) -> list[str] | None:
    param = f"{PROVIDER}.quantizations"
    provider = read_object(fields, PROVIDER) or {}
    if len(provider.get("quantizations", b"")) > LONGEST_LIST_BYTES:
        raise RequestError(f"{param!r} is longer than {LONGEST_LIST_BYTES} bytes", param=param)
    try:
        return read(provider, "quantizations", _TEXTS)
    except RequestError as error:
        raise RequestError(f"{param!r} is no list of names such as int8", param=param) from error


def parse_floor(headers: Mapping[bytes, bytes]) -> Floor:
    """The least quality that the caller accepts; one that can't be understood is refused, never taken for none."""
    given = headers.get(FLOOR_HEADER.encode())
    return _floor(given.decode("latin-1")) if given else NO_FLOOR


def _floor(header: str) -> Floor:
    limits: dict[str, float] = {}
    for part in filter(None, header.split(",")):
        measure, _, value = part.partition("=")
        if measure.strip() not in Floor.model_fields:
            known = ", ".join(Floor.model_fields)
            raise RequestError(
                f"{FLOOR_HEADER}: {quoted(measure.strip())} is no measure; known: {known}", param=FLOOR_HEADER
            )
        try:
            limits[measure.strip()] = float(value)
        except ValueError:
            raise RequestError(f"{FLOOR_HEADER}: {quoted(part.strip())} has no number", param=FLOOR_HEADER) from None
    try:
        return Floor.model_validate(limits)
    except ValueError as error:
        raise RequestError(f"{FLOOR_HEADER}: {quoted(header)} is out of range", param=FLOOR_HEADER) from error
