"""A real Chromium, driven by playwright, and pages whose faults are noted."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.test_browser import PROGRAMS

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """A browser of this machine; the test is skipped if there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium; `apt-get install chromium-headless-shell` brings one")
    # It refuses to run as root with its sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=1000 * DEADLINE_SECONDS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass(slots=True)
class Faults:
    """What must not happen on a page: errors and warnings of its console, exceptions, requests of other origins."""

    origin: str
    seen: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Note the faults of a page from now on."""
        page.on("console", lambda said: self.seen.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.seen.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(self.origin) else self.seen.append(asked.url))


@asynccontextmanager
async def shown(
    browser: Browser, url: str, *, live: bool = True, expected: str = "", **options: Any
) -> AsyncIterator[Page]:
    """The page in a profile of its own; nothing may have gone wrong at its end, except faults with `expected` text."""
    context = await browser.new_context(**{**DESKTOP, **options})
    try:
        page = await context.new_page()
        faults = Faults(url.removesuffix("/ui/"))
        faults.watch(page)
        await page.goto(url)
        if live:
            await page.wait_for_selector("#connection.ok")
        yield page
        unexpected = [fault for fault in faults.seen if not expected or expected not in fault]
        assert not unexpected, unexpected
    finally:
        await context.close()
