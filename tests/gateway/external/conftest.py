"""A gateway with external models of three providers, which all are one fake; one for all tests of this folder."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.running import FakeReplica, running_provider
from tests.gateway.fleet import CONFIG, Fleet, deployment, running_gateway

PRICE = {"prompt_usd": 2.0, "completion_usd": 8.0}
ANSWER_USD = (1000 * 2.0 + 200 * 8.0) / 1e6
AWS = {"aws_access_key_id": "id", "aws_secret_access_key": "secret-of-aws", "aws_region_name": "us-east-1"}

# Of litellm's and its libraries' own code: nothing that we could mend.
WARNINGS = (
    "ignore:Item .* on TypedDict class:UserWarning",
    "ignore:Pydantic serializer warnings:UserWarning",
    "ignore:Accessing the 'model_:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let litellm warn: in tests every warning is an error, and it takes an error for the provider's."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for warning in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def tables(url: str) -> dict[str, Any]:
    """Aliases that end in, or consist of, an external model."""
    key = {"api_key": "sk-secret", "price": PRICE}
    variants = {
        **CONFIG["variants"],
        "gpt": {"external": "openai/gpt-4.1", "base_url": f"{url}/v1", **key, "quality": {"top1_agreement": 0.9}},
        "claude": {"external": "anthropic/claude-sonnet-4-5", "base_url": url, **key},
        "nova": {"external": "bedrock/amazon.nova-pro-v1:0", "base_url": url, "credentials": AWS, "price": PRICE},
        "listed": {"external": "openai/gpt-4.1-mini", "base_url": f"{url}/v1", "api_key": "sk-secret"},
        "limited": {"external": "openai/limited", "base_url": f"{url}/v1", **key},
        "gone": {"external": "openai/gone", "base_url": "http://127.0.0.1:9/v1", **key},
    }
    ends = {"trust_declared": True}
    aliases = {
        "smol": {"ladder": ["hi", "lo", "gpt"], **ends},
        "strict": {"ladder": ["hi", "gpt"], "floor": {"top1_agreement": 0.95}, **ends},
        "strict-trusting": {"ladder": ["gpt"], "floor": {"top1_agreement": 0.9}, **ends},
        "strict-cautious": {"ladder": ["hi", "gpt"], "floor": {"top1_agreement": 0.9}},
        "measured": {"ladder": ["hi", "claude"], "floor": {"top1_agreement": 0.1}, **ends},
        "quick": {"ladder": ["claude"], "timeouts": {"first_byte_seconds": 0.3, "idle_seconds": 0.3}},
        "hurried": {"ladder": ["gpt"], "timeouts": {"first_byte_seconds": 0.3, "total_seconds": 0.3}},
    }
    retries = {"share": 1, "burst": 1000}
    return {"gateway": {**CONFIG["gateway"], "retries": retries}, "variants": variants, "aliases": aliases}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def provider() -> AsyncIterator[FakeReplica]:
    """The fake of all providers."""
    async with running_provider() as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def external_gateway(provider: FakeReplica) -> AsyncIterator[Fleet]:
    """The gateway itself; tests take `fleet`."""
    async with running_gateway(deployment(tables(provider.url))) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(external_gateway: Fleet) -> AsyncIterator[Fleet]:
    """A gateway whose replicas are external models; after the test nothing may be in flight."""
    yield external_gateway
    await external_gateway.at_rest()
