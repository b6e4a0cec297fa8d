"""What a replica's engine says of its own load."""

import re
from collections.abc import Iterator
from math import isfinite

import msgspec

# Names of vLLM 0.32 (vllm/v1/metrics/loggers.py); whatever of these is not on a page is an alarm.
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
READ_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"
WANTED = (RUNNING, WAITING, KV_USAGE, READ_TOKENS, GENERATED_TOKENS)
CACHE_INFO = b"vllm:cache_config_info"
_WANTED_BYTES = tuple(name.encode() for name in WANTED)

# A line behind its metric's name, in Prometheus' text format 0.0.4: labels, and the value if that is a number.
_SAMPLE = re.compile(rb'(?:\{((?:[^"}\n]++|"(?:[^"\\\n]++|\\.)*+")*+)\})?[ \t]++([0-9.eE+-]++)(?=\s|\Z)[^\n]*+')
_KV_TOKENS = re.compile(rb'(?<![^,\s])kv_cache_size_tokens="(\d{1,18})"')
_KV_BLOCKS = re.compile(rb'(?<![^,\s])num_gpu_blocks="(\d{1,9})"')
_BLOCK_TOKENS = re.compile(rb'(?<![^,\s])block_size="(\d{1,9})"')


class EngineMetrics(msgspec.Struct, frozen=True, gc=False):
    """One look at an engine's metrics; what is None wasn't there, which is never the same as zero.

    `at_seconds` is on the monotonic clock. The two counters only grow, until the engine starts anew.
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
        """Tell whether this says how many requests the engine has."""
        return self.running is not None and self.waiting is not None


class PollResult(msgspec.Struct, frozen=True, gc=False):
    """What polls have shown of a replica so far.

    `poll` is the last page; None while nobody answers. `missing` is what that page lacked, and is kept without an
    answer; None until a page was read. `polled_at` is when the last poll began that told the load (monotonic).
    """

    poll: EngineMetrics | None = None
    polled_at: float | None = None
    missing: frozenset[str] | None = None
    answers: bool = True

    def unanswered(self) -> "PollResult":
        """What is known after a poll that failed."""
        return PollResult(None, self.polled_at, self.missing, answers=False)


def parse_metrics(page: bytes, at_seconds: float) -> tuple[EngineMetrics, frozenset[str]]:
    """Read a page of metrics, and name those of WANTED that it lacks.

    Several engines (data parallel) are added up, their KV usage is averaged. If one of them gives no number, the metric
    is missing: a part of the load would pass for all of it.
    """
    lines = b"\n" + page
    found = [_numbers(lines, name) for name in _WANTED_BYTES]
    running, waiting, kv_usage, read_tokens, generated_tokens = map(_total, found)
    if kv_usage is not None:
        kv_usage /= len(found[2])
    poll = EngineMetrics(
        at_seconds, running, waiting, kv_usage, _kv_capacity_tokens(lines), read_tokens, generated_tokens
    )
    told = zip(WANTED, (running, waiting, kv_usage, read_tokens, generated_tokens), strict=True)
    return poll, frozenset([name for name, value in told if value is None])


def _total(numbers: list[float]) -> float | None:
    total = sum(numbers)
    return total if numbers and isfinite(total) else None


def _numbers(lines: bytes, name: bytes) -> list[float]:
    """What a metric's lines say; nothing if one of them says no number that can be."""
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
    total = 0
    for sample in _samples(lines, CACHE_INFO):
        labels = sample[1] if sample else None
        tokens = _capacity_in(labels) if labels else 0
        if not tokens:
            return None
        total += tokens
    return total or None


def _capacity_in(labels: bytes) -> int:
    """Read the KV cache's size from an engine's labels; 0 if they don't tell."""
    if told := _KV_TOKENS.search(labels):
        return int(told[1])
    blocks, block = _KV_BLOCKS.search(labels), _BLOCK_TOKENS.search(labels)
    return int(blocks[1]) * int(block[1]) if blocks and block else 0


def _samples(lines: bytes, name: bytes) -> Iterator[re.Match[bytes] | None]:
    """Give the lines of a metric, which the format wants in one group; None for one that can't be read."""
    # Searched for with what stands behind it: other names begin with this one.
    starts = (b"\n" + name + b"{", b"\n" + name + b" ")
    at = lines.find(starts[0])
    if at < 0:
        at = lines.find(starts[1])
    while at >= 0 and lines.startswith(starts, at):
        sample = _SAMPLE.match(lines, at + 1 + len(name))
        yield sample
        at = sample.end() if sample else -1
