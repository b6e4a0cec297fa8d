"""Progress of long stages: bars on a terminal, plain lines elsewhere; both on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Clock = Callable[[], float]
Advance = Callable[[int, int], None]

_LINE_SECONDS = 10.0


@dataclass(slots=True)
class ProgressReporter:
    """Tells one reader how a run goes; `journal` gets every line, `seconds` keeps what each finished stage took."""

    stream: TextIO
    label: str = ""
    clock: Clock = time.monotonic
    run_log: TextIO | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, unit: str = "") -> Iterator[Advance]:
        """Announce a stage, lend a function `(done, total)` for its progress, and tell the time it took."""
        started = self.clock()
        title = f"{self.label}: {name}" if self.label else name
        show = self._bar(title, unit) if self.stream.isatty() else self._lines(title, unit)
        with show as advance:
            yield advance
        self.seconds[name] = self.clock() - started
        self.log(f"{title}: done in {self.seconds[name]:.1f} s")

    def log(self, text: str) -> None:
        """Print one line."""
        print(text, file=self.stream, flush=True)
        self.log_detail(text)

    def log_detail(self, text: str) -> None:
        """Write one line into the journal only, with the time."""
        if self.run_log is not None:
            print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}", file=self.run_log, flush=True)

    @contextmanager
    def _lines(self, title: str, unit: str) -> Iterator[Advance]:
        self.log(f"{title} ...")
        logged_at = self.clock()
        first: tuple[float, int] | None = None  # start-up before it says nothing about the pace

        def advance(done: int, total: int) -> None:
            nonlocal logged_at, first
            now = self.clock()
            if first is None:
                first = (now, done)
            if now - logged_at >= _LINE_SECONDS and first[1] < done < total:
                logged_at = now
                left = (now - first[0]) / (done - first[1]) * (total - done)
                self.log(f"{title}: {done}/{total} {unit}, about {left:.0f} s left")

        yield advance

    @contextmanager
    def _bar(self, title: str, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=self.stream)
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance
