"""A gateway on the loop that the gateway's own tests use."""

from tests.gateway.conftest import fake, pytest_asyncio_loop_factories

__all__ = ["fake", "pytest_asyncio_loop_factories"]
