# pip: guidellm==0.8.1
# title: guidellm
# runs: its checks before a benchmark, `/health` and `/v1/models`
"""A benchmark needs a tokenizer from the network; what it asks before does not."""

import asyncio
import os

from guidellm.backends.openai.http import OpenAIHTTPBackend, OpenAIHTTPBackendArgs


async def main() -> None:
    """Connect as `guidellm benchmark` does."""
    backend = OpenAIHTTPBackend(OpenAIHTTPBackendArgs(target=os.environ["QUANTGATE_URL"]))
    await backend.process_startup()
    await backend.validate()
    assert os.environ["QUANTGATE_MODEL"] in await backend.available_models()
    await backend.process_shutdown()


asyncio.run(main())
