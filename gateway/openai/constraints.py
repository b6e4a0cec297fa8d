"""Routing constraints that a client sets per request: accepted precisions, and a quality floor."""

from collections.abc import Mapping

import msgspec

from config.schema import NO_FLOOR, Floor
from gateway.errors import RequestError
from gateway.openai.fields import quoted, read, read_object
from gateway.openai.json_scan import Fields

PRECISION_HEADER = "x-quantgate-precision"
FLOOR_HEADER = "x-quantgate-floor"
# OpenRouter's field for provider selection. The gateway evaluates it and never forwards it.
PROVIDER = "provider"

MAX_QUANTIZATIONS_BYTES = 4096

_STRINGS = msgspec.json.Decoder(list[str] | None)


def parse_precisions(fields: Fields, headers: Mapping[bytes, bytes]) -> frozenset[str] | None:
    """Return the accepted precisions, None for any.

    If both the header and the body's `provider.quantizations` are given, only precisions in both are accepted.
    """
    accepted = []
    if PROVIDER in fields and (quantizations := _quantizations(fields)):
        accepted.append(frozenset(quantizations))
    if header := headers.get(PRECISION_HEADER.encode()):
        names = header.decode("latin-1").split(",")
        accepted.append(frozenset(filter(None, (name.strip() for name in names))))
    return frozenset.intersection(*accepted) if accepted else None


def _quantizations(fields: Fields) -> list[str] | None:
    param = f"{PROVIDER}.quantizations"
    provider = read_object(fields, PROVIDER) or {}
    if len(provider.get("quantizations", b"")) > MAX_QUANTIZATIONS_BYTES:
        raise RequestError(f"{param!r} is longer than {MAX_QUANTIZATIONS_BYTES} bytes", param=param)
    try:
        return read(provider, "quantizations", _STRINGS)
    except RequestError as error:
        raise RequestError(f"{param!r} must be a list of names such as int8", param=param) from error


def parse_floor(headers: Mapping[bytes, bytes]) -> Floor:
    """Read the quality floor from its header, NO_FLOOR without one; RequestError if it is invalid."""
    header = headers.get(FLOOR_HEADER.encode())
    return _floor(header.decode("latin-1")) if header else NO_FLOOR


def _floor(header: str) -> Floor:
    limits: dict[str, float] = {}
    for part in filter(None, header.split(",")):
        measure, _, value = part.partition("=")
        if measure.strip() not in Floor.model_fields:
            known = ", ".join(Floor.model_fields)
            raise RequestError(
                f"{FLOOR_HEADER}: unknown measure {quoted(measure.strip())}; known: {known}", param=FLOOR_HEADER
            )
        try:
            limits[measure.strip()] = float(value)
        except ValueError:
            raise RequestError(
                f"{FLOOR_HEADER}: {quoted(part.strip())} is not MEASURE=NUMBER", param=FLOOR_HEADER
            ) from None
    try:
        return Floor.model_validate(limits)
    except ValueError as error:
        raise RequestError(f"{FLOOR_HEADER}: {quoted(header)} is out of range", param=FLOOR_HEADER) from error
