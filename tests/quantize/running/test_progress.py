"""Progress for people: a few plain lines where there is no terminal."""

import io

import pytest

from quantize.running.progress import ProgressReporter


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_lines_come_at_start_and_end_and_every_ten_seconds() -> None:
    """Many small steps give few lines, with the time left reckoned from the first step."""
    stream, now = io.StringIO(), [0.0]
    progress = ProgressReporter(stream, clock=lambda: now[0])
    with progress.stage("quantize", "layers") as advance:
        for done in range(1, 31):
            now[0] = 100 + done  # a long start-up, then a layer a second
            advance(done, 30)
    assert stream.getvalue().splitlines() == [
        "quantize ...",
        "quantize: 2/30 layers, about 28 s left",
        "quantize: 12/30 layers, about 18 s left",
        "quantize: 22/30 layers, about 8 s left",
        "quantize: done in 130.0 s",
    ]
    assert progress.seconds == {"quantize": 130.0}


def test_labels_tell_runs_apart() -> None:
    """Two variants' stages can be told apart."""
    stream = io.StringIO()
    with ProgressReporter(stream, label="int4", clock=lambda: 0.0).stage("evaluate"):
        pass
    assert stream.getvalue() == "int4: evaluate ...\nint4: evaluate: done in 0.0 s\n"


def test_a_failed_stage_is_not_called_done() -> None:
    """An exception passes through and nothing claims success."""
    stream = io.StringIO()
    with pytest.raises(KeyError), ProgressReporter(stream, clock=lambda: 0.0).stage("evaluate"):
        raise KeyError
    assert "done" not in stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    """On a terminal a bar is drawn and replaced by one final line."""
    stream = Terminal()
    with ProgressReporter(stream, clock=lambda: 0.0).stage("quantize", "layers") as advance:
        advance(1, 2)
        advance(2, 2)
    assert "quantize: done in 0.0 s" in stream.getvalue()
