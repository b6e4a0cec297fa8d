"""Detection of vLLM flags that quantgate sets itself."""

import pytest

from config.reserved_flags import reserved_flag


@pytest.mark.parametrize(
    "argument,flag",
    [
        ("--port", "--port"),
        ("--port=9", "--port"),
        ("--po", "--port"),
        ("--max_model_len", "--max-model-len"),
        ("--max-model-l", "--max-model-len"),
        ("--no-enable-prefix-caching", "--enable-prefix-caching"),
        ("--logging-config.formatter", "--logging-config"),
        ("-tp", "-tp"),
        ("-q", None),
        ("9", None),
        ("--enforce-eager", None),
        ("--served", "--served-model-name"),
        ("--max-num-batched-tokens", None),
        ("--chat-template", None),
        ("--chat-template-content-format", None),
    ],
)
def test_spellings(argument: str, flag: str | None) -> None:
    """Every spelling that vLLM accepts for a reserved flag is detected; other flags are allowed."""
    assert reserved_flag(argument) == flag
