"""The status page in a real browser."""

import asyncio
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect
from sqlalchemy import update

from gateway.app import gateway, listen_sockets
from gateway.keys import StoredKey, keys_in_force
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.database import StateDatabase
from serving.state.rollouts import RolloutDatabase
from serving.state.tables import ROLLOUTS
from tests.fakes.running import eventually
from tests.gateway.test_workers import free_ports
from tests.gateway.ui.browser import shown
from tests.gateway.ui.scenario import ALIAS, NEW, OLD, Engines, Scene, deployed, load, scene

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
KEYS = keys_in_force({"alice": StoredKey(sha256=(sha256(b"qg-alice").hexdigest(),))})


async def ask(scene: Scene, **headers: str) -> int:
    """Ask the scenario's alias a question; returns the status."""
    body = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}]}
    return (await scene.fleet.ask(body, headers)).status_code


async def tab_to(page: Page, selector: str, most: int = 80) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(most):
        await page.keyboard.press("Tab")
        if await page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


async def test_everything_is_there(browser: Browser, engines: Engines) -> None:
    """Aliases with their ladders, who answers, the chart, replicas, variants and errors; nothing is asked elsewhere."""
    async with scene(engines) as made, shown(browser, made.url, expected="404") as page:
        assert await ask(made, **{"x-quantgate-floor": "top1_agreement=0.999"}) == 200
        assert await ask(made, **{"x-quantgate-floor": "top1_agreement=0.999", "x-quantgate-precision": "int4"}) == 503
        alias = page.get_by_label(f"alias {ALIAS}", exact=True)
        await expect(alias.locator(".now")).to_contain_text("qwq-bf16-1")
        await expect(alias.locator(".rung")).to_have_count(3)
        strict = page.get_by_label(f"alias {ALIAS}-strict", exact=True)
        await expect(strict.locator(".rung").last).to_contain_text("misses the floor 0.98")
        await expect(page.locator("#replicas tbody tr")).to_have_count(8)
        await expect(page.locator("#replicas")).to_contain_text("CUDA out of memory")
        row = page.locator("#variants tbody tr", has_text=OLD).first
        await expect(row).to_contain_text("94.7 %")
        await expect(row).to_contain_text("≥ 94.3 %")
        await expect(page.locator("#chart-summary li")).to_have_count(3)
        assert await page.evaluate("document.querySelector('#chart canvas').width") > 600
        await expect(page.locator("#errors")).to_contain_text("no variant of 'qwq-32b' is good enough")
        await page.click("#errors [data-explain]")
        await expect(page.locator("#explanation")).to_contain_text("no decision on")


async def test_it_updates(browser: Browser, engines: Engines) -> None:
    """A replica that changes its state, and requests that wait, are there within a second or so, without a reload."""
    async with scene(engines) as made, shown(browser, made.url) as page:
        await page.evaluate("window.loadedOnce = true")
        row = page.locator("#replicas tbody tr", has_text="qwq-int8-2")
        await expect(row).to_contain_text("starting")
        made.fleet.registry.move("qwq-int8-2", State.READY)
        await expect(row).to_contain_text("ready")
        async with load(made.fleet, 3):
            await expect(page.locator("#figures")).to_contain_text("In flight3")
        made.fleet.registry.remove("qwq-int8-2")
        await expect(row).to_have_count(0)
        assert await page.evaluate("window.loadedOnce")


async def test_rollouts_are_steered(browser: Browser, engines: Engines, state: str) -> None:
    """Each command is confirmed; Escape and Cancel change nothing; who did it and why is in the history."""
    async with scene(engines, state) as made, shown(browser, made.url) as page:
        card = page.get_by_label(f"rollout of {ALIAS}", exact=True)
        await expect(card).to_contain_text(f"{OLD} → {NEW}")
        await expect(card.locator("[aria-current=step]")).to_have_text("25 %")
        for leave in ("Escape", "Cancel"):
            await card.get_by_role("button", name="Pause").click()
            await (page.keyboard.press("Escape") if leave == "Escape" else page.click("#confirm-no"))
            await expect(page.locator("#confirm")).not_to_be_visible()
        await expect(card).to_contain_text("canary")
        for command, phase in (("Pause", "paused"), ("Resume", "canary"), ("Abort", "roll")):
            await card.get_by_role("button", name=command).click()
            await expect(page.locator("#confirm")).to_contain_text(f"{OLD} → {NEW}")
            await page.fill("#confirm-reason", f"{command} by a test")
            await page.click("#confirm-yes")
            await expect(page.locator("#notice")).to_contain_text(f"{command}: the rollout of {ALIAS}")
            await expect(card.locator(".heading .chip")).to_contain_text(phase)
        database = RolloutDatabase(StateDatabase.at(state))
        steered = [entry for entry in database.entries(ALIAS, limit=100) if entry.by.startswith("admin@")]
        database.database.close()
    assert [(entry.event, entry.why) for entry in steered] == [
        (name, f"{name.capitalize()} by a test") for name in ("pause", "resume", "abort")
    ]


async def test_a_stale_page(browser: Browser, engines: Engines, state: str) -> None:
    """A step that began while the dialog was open is not skipped; an abort of the same rollout is meant in any step."""
    async with scene(engines, state) as made, shown(browser, made.url, expected="409") as page:
        card = page.get_by_label(f"rollout of {ALIAS}", exact=True)
        for command, outcome in (("Promote", "in phase canary, step 3 now"), ("Abort", "is in phase roll")):
            await card.get_by_role("button", name=command).click()
            if command == "Promote":
                answer = await made.fleet.admin.post("/admin/rollouts/promote", json={"alias": ALIAS})
                assert answer.json()["step"] == 2
            await page.click("#confirm-yes")
            await expect(page.locator("#notice")).to_contain_text(outcome)
        await expect(card.locator(".heading .chip")).to_contain_text("roll")


async def test_a_rollout_of_another_version(browser: Browser, engines: Engines, state: str) -> None:
    """It is shown as unreadable, without commands; the status, the metrics and the rest of the page work."""
    database = RolloutDatabase(StateDatabase.at(state))
    with database.database.writing() as connection:
        connection.execute(update(ROLLOUTS).values(plan="{}"))
    database.database.close()
    async with scene(engines, state) as made, shown(browser, made.url) as page:
        card = page.get_by_label(f"rollout of {ALIAS}", exact=True)
        await expect(card).to_contain_text("unreadable: the plan of rollout")
        await expect(card.get_by_role("button")).to_have_count(0)
        await expect(page.locator("#replicas tbody tr")).to_have_count(8)
        assert (await made.fleet.admin.get("/metrics")).status_code == 200
        answer = await made.fleet.admin.post("/admin/rollouts/abort", json={"alias": ALIAS})
        assert (answer.status_code, "another version" in answer.json()["detail"]) == (409, True)


async def test_a_request_is_tried_and_explained(browser: Browser, engines: Engines) -> None:
    """The answer streams, the headers of its response are shown, and one click explains the decision."""
    async with scene(engines) as made, shown(browser, made.url) as page:
        await page.select_option("#trial-precision", "int8")
        await page.fill("#trial textarea", "tell me")
        await page.click("#trial [type=submit]")
        await expect(page.locator("#trial-answer")).to_contain_text("tell me")
        await expect(page.locator("#trial-outcome")).to_contain_text("all of it after")
        await expect(page.locator("#trial-outcome dd", has_text="qwq-int8-1")).to_have_count(1)
        await page.click("#trial [data-explain]")
        await expect(page.locator("#explanation .now")).to_contain_text("qwq-int8-1")
        await expect(page.locator("#explanation")).to_contain_text("precision bf16 was not asked for")
        assert "req-" in await page.input_value("#request-id")


async def test_a_trial_with_a_key(browser: Browser, engines: Engines) -> None:
    """Where clients need a key, the box asks for one; what a client would be told is shown."""
    async with scene(engines, keys=KEYS) as made, shown(browser, made.url, expected="401") as page:
        await expect(page.locator("#trial-key")).to_be_visible()
        await page.click("#trial [type=submit]")
        await expect(page.locator("#trial-outcome")).to_contain_text("401:")
        await page.fill("#trial [name=key]", "qg-alice")
        await page.click("#trial [type=submit]")
        await expect(page.locator("#trial-outcome")).to_contain_text("all of it after")


async def test_the_admin_key(browser: Browser, engines: Engines) -> None:
    """It is asked for, refused if wrong, and stays in the tab: not in the address, a cookie or a lasting storage."""
    async with (
        scene(engines, admin_key="operators") as made,
        shown(browser, made.url, live=False, expected="401") as page,
    ):
        for key in ("wrong", "operators"):
            await expect(page.locator("#key-dialog")).to_be_visible()
            await page.fill("#key-input", key)
            await page.keyboard.press("Enter")
            if key == "wrong":
                await expect(page.locator("#key-problem")).to_have_text("This key was refused.")
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#replicas tbody tr")).to_have_count(8)
        kept = await page.evaluate("[location.href, document.cookie, localStorage.length, sessionStorage.length]")
        assert kept == [made.url, "", 0, 1]


async def test_a_restart_of_the_gateway(browser: Browser, engines: Engines) -> None:
    """The page says that the gateway is away, and follows the next one without a reload."""
    client, admin = free_ports(2)
    ports = {"listen": f"127.0.0.1:{client}", "admin": f"127.0.0.1:{admin}"}
    registry = Registry()
    registry.put(Replica("qwq-bf16-1", "qwq-bf16", "bf16", "http://127.0.0.1:9", "m1"), State.READY)
    setup = deployed(None, None, **ports)

    async def serve(stop: asyncio.Event) -> None:
        with listen_sockets(setup.settings.gateway) as taken:
            async with gateway(setup, registry, taken):
                await stop.wait()

    first, second = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve(first))
    await _listens(admin)
    async with shown(browser, f"http://127.0.0.1:{admin}/ui/", expected="Failed to load resource") as page:
        await page.evaluate("window.loadedOnce = true")
        await page.fill("#request-id", "req-typed")
        began = time.monotonic()
        first.set()
        await serving
        assert time.monotonic() - began < 20, "an open stream does not keep the gateway from stopping"
        await expect(page.locator("#connection.bad")).to_contain_text("retrying")
        registry.put(Replica("qwq-int8-9", "qwq-int8", "int8", "http://127.0.0.1:9", "m1"), State.READY)
        serving = asyncio.create_task(serve(second))
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#replicas")).to_contain_text("qwq-int8-9")
        assert await page.evaluate("window.loadedOnce")
        assert await page.input_value("#request-id") == "req-typed"
        second.set()
        await serving


async def _listens(port: int) -> None:
    async def look() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await eventually(look)


async def test_by_keyboard(browser: Browser, engines: Engines, state: str) -> None:
    """Everything is reached by Tab and used by Enter, Space and arrows; focus stays where it is while data arrives."""
    async with scene(engines, state) as made, shown(browser, made.url) as page:
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        await tab_to(page, "[name=measure]")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#chart-summary li").first).to_contain_text("requests/s")
        await tab_to(page, "[data-command=pause]")
        started = await page.text_content("#gateway")
        await expect(page.locator("#gateway")).not_to_have_text(started or "")
        assert await page.evaluate("document.activeElement.dataset.command") == "pause"
        await page.keyboard.press("Enter")
        await expect(page.locator("#confirm")).to_be_visible()
        for leave in ("Enter", "Escape"):  # the focus is on Cancel
            await page.keyboard.press(leave)
            await expect(page.locator("#confirm")).not_to_be_visible()
            assert await page.evaluate("document.activeElement.dataset.command") == "pause"
            await page.keyboard.press("Enter")
        await page.fill("#confirm-reason", "by keyboard")
        await page.keyboard.press("Enter")
        await expect(page.locator("#notice")).to_contain_text("is in phase paused")
        await tab_to(page, "summary")
        await page.keyboard.press("Space")
        await expect(page.locator("#rollouts table")).not_to_be_visible()
        started = await page.text_content("#gateway")
        await expect(page.locator("#gateway")).not_to_have_text(started or "")
        await expect(page.locator("#rollouts table")).not_to_be_visible()
        await tab_to(page, "#trial textarea")
        await tab_to(page, "#trial [type=submit]")
        await page.keyboard.press("Enter")
        await expect(page.locator("#trial-outcome")).to_contain_text("all of it after")
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "the focus is visible"


async def test_contrast(browser: Browser, engines: Engines, state: str) -> None:
    """Every text has the contrast of WCAG AA in both colour schemes, dialogs and outcomes included."""
    async with scene(engines, state) as made, shown(browser, made.url) as page:
        await everything_open(made, page)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.get_by_role("button", name="Pause").click()
            with_dialog: Any = await page.evaluate(CONTRAST)
            await page.keyboard.press("Escape")
            found: Any = await page.evaluate(CONTRAST)
            assert with_dialog["checked"] > found["checked"] > 150
            assert (with_dialog["bad"], found["bad"]) == ([], [])


async def test_nothing_is_wider_than_the_screen(browser: Browser, engines: Engines, state: str) -> None:
    """The page scrolls in one direction only (WCAG 1.4.10, reflow), on a phone as on a desktop."""
    async with scene(engines, state) as made, shown(browser, made.url) as page:
        await everything_open(made, page)
        for width in (1280, 1000, 768, 390, 320):
            await page.set_viewport_size({"width": width, "height": 800})
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, width


async def everything_open(made: Scene, page: Page) -> None:
    """Have an error, an answer and an explanation on the page."""
    await ask(made, **{"x-quantgate-floor": "top1_agreement=0.999", "x-quantgate-precision": "int4"})
    await expect(page.locator("#errors tbody tr")).to_have_count(1)
    await page.click("#trial [type=submit]")
    await expect(page.locator("#trial-outcome")).to_contain_text("all of it after")
    await page.click("#trial [data-explain]")
    await expect(page.locator("#explanation table").first).to_be_visible()


async def test_text_from_outside_is_text(browser: Browser, engines: Engines) -> None:
    """Markup in reasons, messages and answers is shown as it is, never run."""
    markup = "<img src=x onerror=window.ran=1><script>window.ran=1</script>"
    async with scene(engines) as made, shown(browser, made.url) as page:
        made.fleet.registry.move("qwq-int8-2", State.FAILED, markup)
        await ask(made, **{"x-quantgate-precision": "<b>int4</b>"})
        await expect(page.locator("#replicas")).to_contain_text(markup)
        await expect(page.locator("#errors tbody tr")).to_have_count(1)
        await page.fill("#trial textarea", markup)
        await page.click("#trial [type=submit]")
        await expect(page.locator("#trial-answer")).to_contain_text(markup)
        counted = "[document.querySelectorAll('main img, main script, main b').length, window.ran ?? null]"
        assert await page.evaluate(counted) == [0, None]
