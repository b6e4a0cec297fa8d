"""The overhead benchmark's arithmetic: what it makes of given times and counts."""

import os
import subprocess

import pytest

from tests.benchmarks.overhead.client import Answer
from tests.benchmarks.overhead.figures import (
    Cost,
    Tally,
    added,
    chunk_times,
    gaps,
    journeys,
    percentile,
    ratios,
    tally_of,
    tally_of_wrk,
)
from tests.benchmarks.overhead.loads import PLAIN, Load
from tests.benchmarks.overhead.processes import cpu_seconds, resident_bytes, tree
from tests.benchmarks.overhead.report import Report

TWO_CHUNKS = Load("two", 2)


def stream(*pieces: tuple[float, bytes]) -> Answer:
    """An answer of which these pieces came at these times."""
    return Answer(asked_at=1.0, status=200, ended_at=pieces[-1][0], pieces=list(pieces))


def event(text: bytes) -> bytes:
    return b'data: {"content":"%b"}\n\n' % text


def cost(contender: str, cpu_seconds: float, load: Load = PLAIN) -> Cost:
    """100 requests that took so long."""
    return Cost(contender, load.name, load.chunks, Tally(100, 1.0, 1.0, 2.0, 0), cpu_seconds, 50_000_000)


@pytest.mark.parametrize("percent,expected", [(1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)])
def test_a_percentile_is_one_of_the_values(percent: float, expected: int) -> None:
    """Nearest rank: no value is made up between two."""
    assert percentile(range(100, 0, -1), percent) == expected


def test_wrk_is_read_from_its_last_line() -> None:
    """What wrk itself prints before is for people."""
    printed = 'Running 2s test\n\n{"requests":10,"seconds":2.0,"p50_ms":1.5,"p99_ms":3.0,"bad":1}\n'
    assert tally_of_wrk(printed) == Tally(10, 2.0, 1.5, 3.0, 1)


def test_pairs_tell_how_sure_their_mean_is() -> None:
    """Differences that are all alike leave no doubt."""
    found = added([0.001, 0.003], [0.002, 0.004], paired=True)
    assert (found.p50_ms, found.p99_ms, found.mean_ms) == pytest.approx((1, 1, 1))
    assert found.error_ms == pytest.approx(0)
    assert added([0.001], [0.002], paired=False).error_ms is None


def test_a_chunk_is_there_with_its_last_byte() -> None:
    """Several in one piece came together; one that was cut came with its second half."""
    first, second, third = event(b"1000000000 "), event(b"1500000000 "), event(b"2000000000 ")
    answer = stream((1.25, first + second), (2.0, third[:12]), (2.25, third[12:]))
    assert chunk_times(answer) == [(1.0, 1.25), (1.5, 1.25), (2.0, 2.25)]
    assert gaps([answer]) == [0.0, 1.0]
    assert journeys([answer]) == [0.25, -0.25, 0.25]


def test_an_answer_that_lacks_something_is_bad() -> None:
    """Neither another status nor a stream cut short counts as an answer."""
    whole = stream((2.0, event(b"") + event(b"1 ") + event(b"2 ") + event(b"") + b"data: [DONE]\n\n"))
    short = stream((2.0, event(b"") + event(b"1 ") + event(b"") + b"data: [DONE]\n\n"))
    assert tally_of([whole, short], TWO_CHUNKS, 1.0) == Tally(2, 1.0, 1000.0, 1000.0, 1)
    assert not Answer(1.0, status=503).good(PLAIN)


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which everything was slower says nothing about anybody."""
    rounds = [cost("ours", 2.0), cost("router", 1.0), cost("ours", 6.0), cost("router", 3.0), cost("ours", 9.0)]
    assert ratios(rounds, "router") == {("ours", PLAIN.name): 2.0, ("router", PLAIN.name): 1.0}


def test_costs_are_told_per_request_and_per_chunk() -> None:
    """Without chunks there is nothing to tell of them."""
    assert (cost("ours", 0.01).per_request_us, cost("ours", 0.01).per_chunk_us) == (100.0, None)
    assert cost("ours", 0.01, TWO_CHUNKS).per_chunk_us == 50.0


def test_a_report_tells_what_was_measured_and_what_was_skipped() -> None:
    """Without the yardstick there are no ratios, and no empty tables."""
    report = Report("a machine", {"Python": "3"}, {"smg": "no wheel"}, [cost("direct", 0.0), cost("ours", 0.01)])
    told = report.markdown()
    assert "| plain request | ours | 100.0 |  |  | 100 | 1.00 | 2.00 | 0 | 50 |" in told
    assert "| plain request | direct |  |  |  | 100 | 1.00 | 2.00 | 0 |  |" in told
    assert "smg: skipped, no wheel" in told
    assert "workers" not in told
    assert report.as_json()["costs"][1]["cpu_seconds"] == 0.01


def test_a_process_is_read_with_all_that_it_started() -> None:
    """This one has computed something, and lies in memory."""
    own = os.getpid()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert tree(own)[0] == own
        assert child.pid in tree(own)
        assert cpu_seconds(own) > 0
        assert resident_bytes(own) > resident_bytes(child.pid) > 0
