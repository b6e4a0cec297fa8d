"""How many choices a stream has to end."""

import msgspec
import pytest

from gateway.openai.endpoints import CHAT, COMPLETIONS, RESPONSES, Endpoint
from gateway.openai.request import InferenceRequest
from gateway.openai.stream import expected_choices


@pytest.mark.parametrize(
    "endpoint, fields, count",
    [
        (CHAT, b'{"messages":[]}', 1),
        (CHAT, b'{"n":null}', 1),
        (CHAT, b'{"n":3}', 3),
        (COMPLETIONS, b'{"prompt":"[1]"}', 1),
        (COMPLETIONS, b'{"prompt":["a","b"],"n":2}', 4),
        (COMPLETIONS, b'{"prompt":[ 1, 2, 3 ],"n":2}', 2),
        (COMPLETIONS, b'{"prompt":[[1, 2], [3]]}', 2),
        (COMPLETIONS, b'{"prompt":[]}', 1),
        (RESPONSES, b'{"input":["a","b"]}', 1),
    ],
)
def test_how_many_choices_are_asked_for(endpoint: Endpoint, fields: bytes, count: int) -> None:
    """`n` for each prompt; token ids are one prompt."""
    decoded = msgspec.json.decode(fields, type=dict[str, msgspec.Raw])
    request = InferenceRequest(endpoint=endpoint, model="smol", stream=True, wants_usage=False, fields=decoded)
    assert expected_choices(request) == count
