"""Signals become exceptions, once, and never in the middle of starting a child."""

import signal

import pytest

from quantize.running.interrupt import Terminated, terminable, undisturbed


@pytest.mark.parametrize("number,error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_the_first_signal_unwinds_and_later_ones_wait_for_the_clean_up(
    number: signal.Signals, error: type[BaseException]
) -> None:
    """A second Ctrl-C doesn't interrupt what the first one set off."""
    cleaned = False
    with pytest.raises(error), terminable():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_handlers_are_put_back() -> None:
    """Afterwards signals mean what they meant."""
    before = signal.getsignal(signal.SIGTERM)
    with terminable(), undisturbed():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_waits_for_an_undisturbed_step() -> None:
    """The step ends, then the signal is delivered."""
    ended = False
    with pytest.raises(Terminated), terminable(), undisturbed():
        signal.raise_signal(signal.SIGTERM)
        ended = True
    assert ended
