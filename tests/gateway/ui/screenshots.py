"""The pictures of the page in the README: `python -m tests.gateway.ui.screenshots` takes them again."""

import asyncio
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.async_api import Browser, Page

from tests.fakes.running import ROOT
from tests.gateway.ui.browser import DESKTOP, PHONE, running_browser, shown
from tests.gateway.ui.scenario import load, rollout_in_canary, running_engines, scene, state_in

FOLDER = ROOT / "gateway" / "ui" / "screenshots"
PICTURES: dict[str, dict[str, Any]] = {
    "desktop-light": {**DESKTOP, "viewport": {"width": 1280, "height": 1390}, "color_scheme": "light"},
    "desktop-dark": {**DESKTOP, "viewport": {"width": 1280, "height": 1390}, "color_scheme": "dark"},
    "phone-dark": {**PHONE, "color_scheme": "dark"},
}
COLOURS = 256
CLIENTS = 10


async def take(browser: Browser, folder: Path) -> None:
    """Write the pictures of a gateway under load: a rung that spills, and a rollout half way."""
    with tempfile.TemporaryDirectory(prefix="screenshots-") as name:
        state = state_in(Path(name))
        await rollout_in_canary(state)
        async with (
            running_engines(fast=60, slow=25) as engines,
            scene(engines, state) as made,
            load(made.fleet, CLIENTS),
            load(made.fleet, 1, "coder"),
        ):
            for picture, options in PICTURES.items():
                async with shown(browser, made.url, **options) as page:
                    await page.wait_for_selector(".rung.spilling, .rung .chip.warn")
                    await page.wait_for_selector("#chart canvas")
                    await page.wait_for_selector("#rollouts .rollout")
                    _write(await _picture(page), folder / f"{picture}.png")


async def _picture(page: Page) -> bytes:
    # The first status has come; what moves (bars, the dot) is as it is in the end.
    return await page.screenshot(animations="disabled")


def _write(picture: bytes, path: Path) -> None:
    """Write a picture with few colours: it is looked at in a README."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


async def main() -> None:
    """Take all pictures."""
    async with running_browser() as browser:
        await take(browser, FOLDER)


if __name__ == "__main__":
    asyncio.run(main())
