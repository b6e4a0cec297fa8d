"""The pictures of the page in the README."""

from pathlib import Path

import pytest
from PIL import Image
from playwright.async_api import Browser

from tests.fakes.running import ROOT
from tests.gateway.ui.screenshots import FOLDER, PICTURES, take


@pytest.mark.asyncio(loop_scope="session")
async def test_pictures(browser: Browser, tmp_path: Path) -> None:
    """They can be taken: of the sizes in the repository, small, and with something on them."""
    await take(browser, tmp_path)
    for name in PICTURES:
        with Image.open(tmp_path / f"{name}.png") as taken, Image.open(FOLDER / f"{name}.png") as kept:
            assert taken.size == kept.size
            assert len(taken.getcolors(1000) or ()) > 100
        assert (tmp_path / f"{name}.png").stat().st_size < 150_000


async def test_the_readme_shows_them() -> None:
    """Each is in the README, and none else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.iterdir():
        assert path.stem in PICTURES
        assert str(path.relative_to(ROOT)) in readme
