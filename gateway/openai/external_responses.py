"""Answers of external models on `/v1/responses`: litellm makes them from a chat; ids and extra fields are put right."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

Fields = Mapping[str, Any]

# litellm's own, and what it writes into an answer that names the provider.
_EXTRA = frozenset({"provider_specific_fields", "_hidden_params"})

_ENCODER = msgspec.json.Encoder()


class ResponseForm(msgspec.Struct, frozen=True):
    """Implements AnswerForm for responses."""

    request_id: str
    end: bytes = b""  # the last event is `response.completed`

    @property
    def id(self) -> str:
        """The id of the response."""
        return f"resp_{self.request_id}"

    def whole(self, answer: Fields) -> bytes:
        """Encode a whole answer."""
        return _ENCODER.encode(self._response(answer))

    def events(self, chunk: Fields, begun: frozenset[int]) -> Iterator[bytes]:  # noqa: ARG002 - of chats
        """Encode an event."""
        fields = {name: value for name, value in chunk.items() if name not in _EXTRA}
        if isinstance(response := fields.get("response"), dict):
            fields["response"] = self._response(response)
        yield b"event: %b\ndata: %b\n\n" % (str(fields.get("type", "")).encode(), _ENCODER.encode(fields))

    def usage(self, answer: Fields) -> Fields | None:
        """The token counts of a whole answer, or of an event that has them, by the names of chats."""
        response = answer.get("response")
        usage = (response if isinstance(response, dict) else answer).get("usage")
        if not isinstance(usage, dict):
            return None
        return {
            "prompt_tokens": usage.get("input_tokens"),
            "completion_tokens": usage.get("output_tokens"),
            "prompt_tokens_details": usage.get("input_tokens_details"),
        }

    def _response(self, response: Fields) -> dict[str, Any]:
        fields = {name: value for name, value in response.items() if name not in _EXTRA}
        return {**fields, "id": self.id, "error": fields.get("error")}
