"""Routing constraints that a client sets per request: accepted precisions, and a quality floor."""

from collections.abc import Mapping

import msgspec

from config.schema import NO_FLOOR, Floor
from config.variant import AT_LEAST
from gateway.errors import RequestError
from gateway.openai.fields import quoted, read, read_object
from gateway.openai.json_scan import Fields

PRECISION_HEADER = "x-quantgate-precision"
FLOOR_HEADER = "x-quantgate-floor"
# OpenRouter's field for provider selection. The gateway evaluates it and never forwards it.
PROVIDER = "provider"

MAX_QUANTIZATIONS_BYTES = 4096
# OpenRouter's names, and fp32 and external of ours. Not every one is a precision that a variant can have.
PRECISIONS = ("int4", "int8", "fp4", "fp6", "fp8", "fp16", "bf16", "fp32", "unknown", "external")

_PRECISION_KEY, _FLOOR_KEY = PRECISION_HEADER.encode(), FLOOR_HEADER.encode()
_STRINGS = msgspec.json.Decoder(list[str] | None)


def parse_precisions(fields: Fields, headers: Mapping[bytes, bytes]) -> frozenset[str] | None:
    """Return the accepted precisions, None for any; RequestError for an unknown one, or for a header without any.

    Precisions must be in each of the headers (a repeated one is stricter), and in the body's `provider.quantizations`.
    """
    header = headers.get(_PRECISION_KEY)
    if header is None and PROVIDER not in fields:
        return None
    accepted = []
    if PROVIDER in fields and (quantizations := _quantizations(fields)):
        accepted.append(_known(quantizations, f"{PROVIDER}.quantizations"))
    if header is not None:
        accepted += [_known(_entries(value, PRECISION_HEADER), PRECISION_HEADER) for value in _values(header)]
    return frozenset.intersection(*accepted) if accepted else None


def _known(names: list[str], param: str) -> frozenset[str]:
    for name in names:
        if name not in PRECISIONS:
            raise RequestError(
                f"{param}: unknown precision {quoted(name)}; known: {', '.join(PRECISIONS)}", param=param
            )
    return frozenset(names)


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
    """Read the quality floor from its header, NO_FLOOR without one; RequestError if it is invalid or names no measure.

    Of several limits on a measure, in one header or in several, the strictest counts.
    """
    header = headers.get(_FLOOR_KEY)
    if header is None:
        return NO_FLOOR
    limits: dict[str, float] = {}
    for entry in [entry for value in _values(header) for entry in _entries(value, FLOOR_HEADER)]:
        measure, limit = _limit(entry)
        strictest = max if measure in AT_LEAST else min
        limits[measure] = strictest(limit, limits.get(measure, limit))
    return Floor.model_validate(limits)


def _limit(entry: str) -> tuple[str, float]:
    """Parse `MEASURE=NUMBER`, and check the number, which another entry could hide."""
    measure, _, value = (part.strip() for part in entry.partition("="))
    if measure not in Floor.model_fields:
        known = ", ".join(Floor.model_fields)
        raise RequestError(f"{FLOOR_HEADER}: unknown measure {quoted(measure)}; known: {known}", param=FLOOR_HEADER)
    try:
        limit = float(value)
    except ValueError:
        raise RequestError(f"{FLOOR_HEADER}: {quoted(entry)} is not MEASURE=NUMBER", param=FLOOR_HEADER) from None
    try:
        Floor.model_validate({measure: limit})
    except ValueError as error:
        raise RequestError(f"{FLOOR_HEADER}: {quoted(entry)} is out of range", param=FLOOR_HEADER) from error
    return measure, limit


def _values(header: bytes) -> list[str]:
    """Split a header that was sent several times: see `gateway.http.limits.SEPARATE_HEADERS`."""
    return header.decode("latin-1").split("\n")


def _entries(value: str, param: str) -> list[str]:
    """Split a list; RequestError if it is empty: a restriction that was meant must not turn into none."""
    entries = [entry for part in value.split(",") if (entry := part.strip())]
    if not entries:
        raise RequestError(f"{param}: {quoted(value)} is empty; omit the header to restrict nothing", param=param)
    return entries
