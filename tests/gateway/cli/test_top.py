"""`quantgate top`: its tables, and its screen in front of a real gateway."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from gateway.cli.admin_client import AdminClient, AdminUnavailable
from gateway.cli.top import decoded
from gateway.cli.top_app import TopApp
from gateway.cli.top_tables import heading, plain, sections, share_bar, sparkline
from gateway.rollout.record import UnreadableRecord
from gateway.rollout.status import unreadable_status
from gateway.status.values import RateStatus, Status, TrafficPoint, read_status
from serving.replica import Replica, State
from serving.state.rollout_records import RolloutRecord
from tests.fakes.running import DEADLINE_SECONDS, ROOT, FakeReplica
from tests.gateway.cli.test_serve import FREE, run, running, write
from tests.gateway.fleet import HELLO, STREAM, Fleet, deployment, running_gateway

session_loop = pytest.mark.asyncio(loop_scope="session")


def app_of(fleet: Fleet, interval_seconds: float = 0.1) -> TopApp:
    """The screen for a gateway."""
    client = AdminClient(fleet.served.addresses.admin, None, Path("quantgate.yaml"))
    return TopApp(client, partial(decoded, client=client), interval_seconds)


def text_of(app: TopApp) -> str:
    """What the screen shows, without styles."""
    return unescape(re.sub(r"<[^>]+>", "\n", app.export_screenshot())).replace("\xa0", " ")


def printed(status: Status) -> str:
    """What `--once` prints."""
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(heading(status, "h:1"))
        for title, content in sections(status):
            console.print(title)
            console.print(content)
    return capture.get()


async def until(check: Callable[[], bool]) -> None:
    """Wait until the screen shows something."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not check():  # noqa: ASYNC110 - the app's own timer
            await asyncio.sleep(0.05)


@session_loop
async def test_the_screen(fake: FakeReplica, tmp_path: Path) -> None:
    """Ladder, traffic, replicas and errors are there, follow what happens, and a picture of it can be made."""
    async with running_gateway(deployment()) as fleet:
        app = app_of(fleet)
        async with app.run_test(size=(200, 60)) as pilot:
            await until(lambda: "no replica" in text_of(app))
            with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
                for body in (HELLO, STREAM, {**HELLO, "model": "lo"}):
                    assert (await fleet.ask(body)).status_code == 200
                assert (await fleet.ask({**HELLO, "model": "hopeless"})).status_code == 503
                await until(lambda: "hi-0 answers now (preferred)" in text_of(app) and "hopeless" in text_of(app))
                await until(lambda: "int4" in (shown := text_of(app)) and "requests/s" in shown)
                text = text_of(app)
                assert all(title in text for title in ("Aliases", "Traffic", "Replicas", "Variants", "Rollouts"))
                assert "top1_agreement 0.97" in text
                picture = tmp_path / "top.svg"
                picture.write_text(app.export_screenshot(title="quantgate top"))
                assert picture.read_text().startswith("<svg")
            await until(lambda: "hi-0" not in text_of(app))
            await pilot.press("q")
        assert app.return_value is None


@session_loop
async def test_keys(fake: FakeReplica) -> None:
    """p stops and goes on, r reads once, d changes the colors, arrows scroll."""
    async with running_gateway(deployment()) as fleet:
        app = app_of(fleet)
        async with app.run_test(size=(160, 20)) as pilot:
            await until(lambda: "Aliases" in text_of(app))
            await pilot.press("p")
            assert "paused: p goes on" in text_of(app)
            with fleet.replicas(("hi", fake.url)):
                await pilot.pause(0.3)
                assert "hi-0" not in text_of(app)
                await pilot.press("r")
                await until(lambda: "hi-0" in text_of(app))
                assert "paused" in text_of(app)
            await pilot.press("p")
            await until(lambda: "hi-0" not in text_of(app))
            theme = app.theme
            await pilot.press("d")
            assert app.theme != theme
            await pilot.press("end")
            await until(lambda: "Errors" in text_of(app))


@session_loop
async def test_a_read_that_ends_while_the_screen_is_taken_down(fake: FakeReplica) -> None:
    """Widgets go one by one: what is left is updated, and nothing fails."""
    async with running_gateway(deployment()) as fleet:
        app = app_of(fleet)
        async with app.run_test(size=(160, 40)) as pilot:
            await until(lambda: "Aliases" in text_of(app))
            await app.query_one("#notice").remove()
            with fleet.replicas(("hi", fake.url)):
                await pilot.press("r")
                await until(lambda: "hi-0" in text_of(app))
            await app.query_one("#sections").remove()
            await app.action_read()


@session_loop
async def test_a_gateway_that_goes_away(tmp_path: Path) -> None:
    """The last picture stays, with a line that says since when; another gateway at the address is shown again."""
    clock = iter(range(1000))
    async with running_gateway(deployment()) as fleet:
        app = app_of(fleet)
        app._clock = lambda: float(next(clock))
        address = fleet.served.addresses.admin
        stack = app.run_test(size=(160, 40))
        await stack.__aenter__()
        await until(lambda: "Aliases" in text_of(app))
    try:
        await until(lambda: f"no gateway answers at {address}" in text_of(app) and "for 2s" in text_of(app))
        assert "smol" in text_of(app)
        # A process of its own: textual has this one's stderr.
        settings = f"gateway: {{listen: '127.0.0.1:0', admin: '{address}'}}\n"
        async with running(write(tmp_path, settings + "variants: {a: {precision: int4}}\n")):
            await until(lambda: "retrying" not in text_of(app) and "smol" not in text_of(app))
    finally:
        await stack.__aexit__(None, None, None)


@session_loop
async def test_a_wrong_key() -> None:
    """The screen ends with the reason."""
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "admin_key": "operators"}
    async with running_gateway(deployment({"gateway": settings})) as fleet:
        app = app_of(fleet)
        async with app.run_test():
            await until(lambda: app.return_value is not None)
    assert "requires a key, but gateway.admin_key is not set" in (app.return_value or "")


@session_loop
async def test_once(tmp_path: Path, fake: FakeReplica) -> None:
    """`--once` prints the tables, `--json` what /admin/status says; without a terminal there is no screen."""
    replica = f"replicas: [{{variant: a, url: '{fake.url}'}}]\n"
    config = write(tmp_path, FREE + "variants: {a: {precision: int4}}\naliases: {x: {ladder: [a]}}\n" + replica)
    async with running(config) as (process, _, admin):
        arguments = ("top", "--config", config, "--admin", admin)
        text = await run(*arguments, "--once")
        assert (text.code, text.err) == (0, "")
        assert "Aliases" in text.out
        assert "\x1b" not in text.out
        without = await run("top", "--config", str(tmp_path / "none.yaml"), "--admin", admin, "--once")
        assert (without.code, "Aliases" in without.out) == (0, True)
        told = await run(*arguments, "--once", "--json")
        assert [alias["name"] for alias in json.loads(told.out)["aliases"]] == ["x"]
        assert (await run(*arguments)).err == "quantgate top: this is no terminal; use --once, or --once --json\n"
        process.terminate()
        await process.communicate()
    gone = await run(*arguments, "--once")
    assert (gone.code, "no gateway answers at" in gone.err) == (1, True)


def test_textual_is_imported_for_the_screen_only() -> None:
    """Neither the gateway nor `top --once` loads it."""
    code = "import sys, gateway.app, gateway.cli.top, quantgate; print('textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


@session_loop
async def test_untrusted_text(fleet: Fleet) -> None:
    """What clients and engines say is neither markup nor a control sequence."""
    fleet.registry.put(Replica("r", "hi", "bf16", "http://x", "m"), State.FAILED, "[red]no[/red] \x1b[31mred")
    try:
        status = read_status((await fleet.admin.get("/admin/status")).content)
    finally:
        fleet.registry.remove("r")
    assert "[red]no[/red] \N{REPLACEMENT CHARACTER}[31mred" in printed(status)


@session_loop
async def test_all_sections(fleet: Fleet) -> None:
    """Rollouts, failures, histories, workers, and a database that is away."""
    status = read_status((await fleet.admin.get("/admin/status")).content)
    rates = {"bf16": RateStatus(1.5, 100.0, 20.0)}
    points = tuple(TrafficPoint(float(at), 60.0, 0.0, rates if at else {}) for at in range(3))
    worker = msgspec.structs.replace(status.gateway.worker, number=2, of=4)
    rollout = {
        *({"alias": "smol", "old": "lo", "new": "lo2", "phase": "canary", "phase_seconds": 61, "weight": 0.05}.items()),
    }
    full = msgspec.structs.replace(
        status,
        gateway=msgspec.structs.replace(status.gateway, worker=worker, draining=True, state_database="db is away"),
        traffic=msgspec.structs.replace(status.traffic, recent=TrafficPoint(9.0, 5.0, 0.5, rates), points=points),
        rollouts=(
            {**dict(rollout), "gates": [{"name": "errors", "verdict": "more"}], "waits_for": "evidence"},
            unreadable_status(
                RolloutRecord("r-1", "smol", "", "", "shadow", True, 1, "anna", 0.0), UnreadableRecord("!")
            ),
        ),
    )
    text = printed(full)
    for words in (
        "worker 2 of 4",
        "draining",
        "db is away",
        "lo -> lo2",
        "errors:more",
        "evidence",
        "unreadable: !",
        "1m01s",
        " ██",
    ):
        assert words in text


def test_bars() -> None:
    """Shares and histories as text."""
    assert share_bar(None) == ""
    assert share_bar(0.5) == "█████       50%"
    assert share_bar(1.0) == "██████████ 100%"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "  "
    assert sparkline([0, 1, 8]) == " ▂█"
    assert plain("a\nb") == "a\N{REPLACEMENT CHARACTER}b"


def test_another_version() -> None:
    """A status that this version does not know is an error that says what to do."""
    with pytest.raises(AdminUnavailable, match="use the version of the gateway"):
        decoded(b'{"version": 2}', AdminClient("h:1", None, Path("q.yaml")))
