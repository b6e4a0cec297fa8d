"""The screen of `quantgate top`: reads the status at an interval, and shows it. Imported only for a terminal."""

import time
from collections.abc import Callable
from typing import ClassVar

import httpx
from rich.console import RenderableType
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from config.errors import ConfigError
from gateway.cli.admin_client import STATUS, AdminClient, AdminUnavailable
from gateway.cli.top_tables import Section, heading, sections
from gateway.status.values import Status
from serving.duration import duration

CSS = """
#heading, #notice { height: auto; padding: 0 1; }
#notice { color: $text-warning; }
#sections { height: 1fr; }
.title { padding: 1 1 0 1; text-style: bold; }
.content { padding: 0 1; width: auto; }
"""


class TopApp(App[str]):
    """Shows a gateway; ends with a text if the configuration turns out to be wrong."""

    CSS = CSS
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p", "pause", "Pause"),
        Binding("r", "read", "Read now"),
        Binding("d", "toggle_dark", "Dark/light"),
    ]

    def __init__(
        self,
        client: AdminClient,
        decode: Callable[[bytes], Status],
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.paused = False
        self._client = client
        self._decode = decode
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._away_since: float | None = None
        self._connection: httpx.AsyncClient | None = None

    def compose(self) -> ComposeResult:
        """Lay out the screen: a heading, a notice, the sections, the keys."""
        yield Static(id="heading")
        yield Static(id="notice")
        yield VerticalScroll(id="sections")
        yield Footer()

    async def on_mount(self) -> None:
        """Read at once, and then at the interval."""
        self._connection = self._client.connection()
        self.set_interval(self._interval_seconds, self._read_unless_paused)
        self.query_one("#sections").focus()
        await self.action_read()

    async def on_unmount(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.aclose()

    async def action_read(self) -> None:
        """Read the status, and show it; while no gateway answers, the last one stays."""
        assert self._connection is not None
        try:
            status = self._decode(await self._client.read_by(self._connection, STATUS))
        except AdminUnavailable as error:
            self._away(str(error))
            return
        except ConfigError as error:
            self.exit(str(error))
            return
        self._away_since = None
        self._update("notice", "paused: p goes on" if self.paused else "")
        self._update("heading", heading(status, self._client.address))
        for section in sections(status):
            await self._show(section)

    def action_pause(self) -> None:
        """Stop to read, or go on."""
        self.paused = not self.paused
        self._update("notice", "paused: p goes on" if self.paused else "")

    def action_toggle_dark(self) -> None:
        """Change between a dark and a light screen."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    async def _read_unless_paused(self) -> None:
        if not self.paused:
            await self.action_read()

    async def _show(self, section: Section) -> None:
        title, content = section
        name = title.lower()
        if found := self.query(f"#{name}"):
            found.first(Static).update(content)
        elif parents := self.query("#sections"):
            body = Static(content, id=name, classes="content", expand=False)
            await parents.first().mount(Static(title, classes="title"), body)

    def _away(self, why: str) -> None:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
        since = f"for {duration(now - self._away_since)}: " if now - self._away_since >= 1 else ""
        self._update("notice", Text(f"{since}{why}; retrying", style="red"))

    def _update(self, name: str, content: RenderableType) -> None:
        """Change a widget, if it is there: a read may end while the screen is taken down."""
        for widget in self.query(f"#{name}").results(Static):
            widget.update(content)


def run(client: AdminClient, decode: Callable[[bytes], Status], interval_seconds: float) -> str | None:
    """Run the screen until it is left; return what is wrong with the configuration, None if nothing."""
    return TopApp(client, decode, interval_seconds).run()
