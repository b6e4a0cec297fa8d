"""The load that the engine of a replica reports on its metrics page."""

import re
from collections.abc import Iterator
from math import isfinite

import msgspec

# Names of vLLM 0.32 (vllm/v1/metrics/loggers.py). A page without one of them is reported as incomplete.
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
READ_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"
WANTED = (RUNNING, WAITING, KV_USAGE, READ_TOKENS, GENERATED_TOKENS)
CACHE_INFO = b"vllm:cache_config_info"
_WANTED_BYTES = tuple(name.encode() for name in WANTED)

# The rest of a line after the metric name, in Prometheus' text format 0.0.4: (1) the labels, (2) the value.
_SAMPLE = re.compile(rb'(?:\{((?:[^"}\n]++|"(?:[^"\\\n]++|\\.)*+")*+)\})?[ \t]++([0-9.eE+-]++)(?=\s|\Z)[^\n]*+')
_KV_TOKENS = re.compile(rb'(?<![^,\s])kv_cache_size_tokens="(\d{1,18})"')
_KV_BLOCKS = re.compile(rb'(?<![^,\s])num_gpu_blocks="(\d{1,9})"')
_BLOCK_TOKENS = re.compile(rb'(?<![^,\s])block_size="(\d{1,9})"')


class EngineMetrics(msgspec.Struct, frozen=True, gc=False):
    """The values of one metrics page; None means missing or invalid, not zero.

    `at_seconds` is when it was read (monotonic). `running` and `waiting` are requests, `kv_usage` is from 0 to 1.
    `read_tokens` (prompts) and `generated_tokens` are counters, which restart with the engine.
    """

    at_seconds: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    kv_capacity_tokens: int | None = None
    read_tokens: float | None = None
    generated_tokens: float | None = None

    @property
    def tells_load(self) -> bool:
        """Whether the number of requests in the engine is known."""
        return self.running is not None and self.waiting is not None


class PollResult(msgspec.Struct, frozen=True, gc=False):
    """The state of polling one replica.

    `poll` is the last page; None if the last poll failed. `missing` are the metrics that the last page lacked; None
    until a page was read. `polled_at` is when the last poll that reported the load began (monotonic). Both are kept
    when a poll fails.
    """

    poll: EngineMetrics | None = None
    polled_at: float | None = None
    missing: frozenset[str] | None = None
    answers: bool = True

    def unanswered(self) -> "PollResult":
        """The state after a failed poll."""
        return PollResult(None, self.polled_at, self.missing, answers=False)


def parse_metrics(page: bytes, at_seconds: float) -> tuple[EngineMetrics, frozenset[str]]:
    """Parse a metrics page, and return the names of WANTED that it lacks.

    The values of several engines (data parallel) are added; KV usage is averaged. If the value of one engine is
    invalid, the metric is missing: the sum of the others would be too small.
    """
    lines = b"\n" + page
    values = [_numbers(lines, name) for name in _WANTED_BYTES]
    running, waiting, kv_usage, read_tokens, generated_tokens = map(_total, values)
    if kv_usage is not None:
        kv_usage /= len(values[2])
    poll = EngineMetrics(
        at_seconds, running, waiting, kv_usage, _kv_capacity_tokens(lines), read_tokens, generated_tokens
    )
    totals = zip(WANTED, (running, waiting, kv_usage, read_tokens, generated_tokens), strict=True)
    return poll, frozenset([name for name, total in totals if total is None])


def _total(numbers: list[float]) -> float | None:
    """The sum; None if there is no number, or the sum is not finite."""
    total = sum(numbers)
    return total if numbers and isfinite(total) else None


def _numbers(lines: bytes, name: bytes) -> list[float]:
    """The values of a metric, one per engine; empty if one of them is invalid or negative."""
    numbers = []
    for sample in _samples(lines, name):
        try:
            number = float(sample[2]) if sample else -1.0
        except ValueError:  # "1.2.3"
            number = -1.0
        if number < 0:
            return []
        numbers.append(number)
    return numbers


def _kv_capacity_tokens(lines: bytes) -> int | None:
    """The KV cache size of all engines together; None if one does not report it."""
    total = 0
    for sample in _samples(lines, CACHE_INFO):
        labels = sample[1] if sample else None
        tokens = _capacity_in(labels) if labels else 0
        if not tokens:
            return None
        total += tokens
    return total or None


def _capacity_in(labels: bytes) -> int:
    """The KV cache size in the labels of one engine, in tokens; 0 if it is not there."""
    if size := _KV_TOKENS.search(labels):
        return int(size[1])
    blocks, block = _KV_BLOCKS.search(labels), _BLOCK_TOKENS.search(labels)
    return int(blocks[1]) * int(block[1]) if blocks and block else 0


def _samples(lines: bytes, name: bytes) -> Iterator[re.Match[bytes] | None]:
    """Yield the lines of a metric, which the format requires to be one group; None for an invalid line."""
    # Include the character after the name: other metric names begin with this one.
    starts = (b"\n" + name + b"{", b"\n" + name + b" ")
    position = lines.find(starts[0])
    if position < 0:
        position = lines.find(starts[1])
    while position >= 0 and lines.startswith(starts, position):
        sample = _SAMPLE.match(lines, position + 1 + len(name))
        yield sample
        position = sample.end() if sample else -1
