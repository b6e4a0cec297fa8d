"""An access record that tests share."""

from gateway.observability.access_log import AccessRecord

RECORD = AccessRecord(
    request_id="r-1",
    key="team-a",
    endpoint="chat.completions",
    alias="smol",
    variant="hi",
    precision="bf16",
    replica="hi-1",
    reason="preferred",
    code="200",
    attempts=1,
    queued_seconds=2.0,
    first_token_seconds=8.25,
    seconds=10.25,
    prompt_tokens=10,
    completion_tokens=3,
    estimated=False,
    finish="stop",
    stream=True,
    reasoning_tokens=1,
    external_cost_usd=0.0,
)
