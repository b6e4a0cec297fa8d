"""A measurement as text."""

from collections.abc import Sequence

from config.capacity import Load, Measurement, Percentiles

HEADINGS = (
    *("concurrency", "requests", "errors", "tokens/s", "prefill/s", "decode/s"),
    *(f"{time} {percent}" for time in ("TTFT", "ITL") for percent in ("p50", "p95", "p99")),
)
LEGEND = """\
tokens/s: answers of all requests together; prefill/s, decode/s: prompt and answer of one request
TTFT, ITL: milliseconds to the first token, and from token to token"""


def measurement_text(name: str, measured: Measurement) -> str:
    """Format a measurement: its setup, and a row for each concurrency."""
    facts = [
        ("KV cache", _tokens(measured.kv_capacity_tokens)),
        ("context", _tokens(measured.max_model_len_tokens)),
        ("memory", _gigabytes(measured.memory_bytes)),
        ("GPU memory", _gigabytes(measured.gpu_memory_bytes)),
    ]
    known = ", ".join(f"{fact} {value}" for fact, value in facts if value)
    mix = ", ".join(f"{shape.share:.0%} {shape.prompt_tokens}+{shape.answer_tokens}" for shape in measured.mix)
    lines = [f"{name} on {measured.setup.machine}", *([known] if known else []), f"requests (prompt+answer): {mix}"]
    return "\n".join([*lines, "", *_aligned([HEADINGS, *map(_row, measured.loads)]), LEGEND])


def _row(load: Load) -> tuple[str, ...]:
    return (
        str(load.concurrency),
        str(load.requests),
        str(load.errors),
        f"{load.output_tokens_per_second:,.1f}",
        f"{load.prefill_tokens_per_second:,.1f}",
        f"{load.decode_tokens_per_second:,.1f}",
        *_milliseconds(load.time_to_first_token_seconds),
        *_milliseconds(load.inter_token_seconds),
    )


def _milliseconds(latency: Percentiles | None) -> tuple[str, str, str]:
    if latency is None:
        return "-", "-", "-"
    return f"{latency.p50 * 1e3:,.1f}", f"{latency.p95 * 1e3:,.1f}", f"{latency.p99 * 1e3:,.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _tokens(count: int | None) -> str:
    return f"{count:,} tokens" if count else ""


def _gigabytes(count_bytes: int | None) -> str:
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes else ""
