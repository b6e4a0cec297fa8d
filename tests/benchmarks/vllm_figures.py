"""Figures of any variant through vLLM's prompt log-probabilities: base and variant served one after the other.

vLLM names the K likeliest tokens of each place and the one that came; what one side leaves out is lumped, so the KL
is a little too small, less so with a larger K. It computes in bf16 unless told otherwise, and that rounding is in it,
too.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from config.load import process_environment
from quantize.running.worker import child_environ
from serving.command import VLLM_MODULE
from tests.benchmarks.figures import Figures, LogProbabilities, Sums, TokenSample, lumped_divergence

_START_SECONDS = 600.0
_POLL_SECONDS = 1.0
_REQUEST_SECONDS = 600.0
_KV_CACHE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Engine:
    """What vLLM computes in, and how many log-probabilities a place it names (-1: all)."""

    dtype: str
    top: int


@dataclass(frozen=True, slots=True)
class Place:
    """What a model predicts at one place of a prompt: its first choice, and log-probabilities by token."""

    first: int
    logprobs: LogProbabilities


def figures_through_vllm(variant: Path, base: Path, samples: list[TokenSample], engine: Engine) -> Figures:
    """Ask both models about the same token samples and compare their answers."""
    ids = [sample.ids for sample in samples]
    parents = list(predictions(base, ids, engine))
    variants = list(predictions(variant, ids, engine))
    sums = Sums()
    for sample, parent, child in zip(samples, parents, variants, strict=True):
        add_sample(sums, sample, parent, child)
    return sums.figures()


def add_sample(sums: Sums, sample: TokenSample, parent: list[Place], variant: list[Place]) -> None:
    """Compare two models on one sample, at every token that counts."""
    for token, counts, p, q in zip(sample.ids[1:], sample.counts, parent, variant, strict=True):
        if not counts:
            continue
        divergence = lumped_divergence(p.logprobs, q.logprobs)
        sums.add(divergence, p.logprobs[token] - q.logprobs[token], tokens=1, agreed=int(p.first == q.first))


def read_places(told: list[dict[str, dict[str, Any]] | None]) -> list[Place]:
    """Read `prompt_logprobs` of an answer; a prompt's first token has none."""
    named = [place for place in told if place is not None]
    return [
        Place(
            first=next(int(token) for token, entry in place.items() if entry["rank"] == 1),
            logprobs={int(token): entry["logprob"] for token, entry in place.items()},
        )
        for place in named
    ]


def predictions(model: Path, samples: list[list[int]], engine: Engine) -> Iterator[list[Place]]:
    """Serve a model and ask it about one sample after the other."""
    longest = max(map(len, samples))
    with serving(model, engine.dtype, longest + 1) as address:
        for number, ids in enumerate(samples, 1):
            # No seed: on a CPU, vLLM 0.32 ends on one where it reads a prompt in parts.
            asked = {"model": "it", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": engine.top}
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=_REQUEST_SECONDS)
            told = answer.raise_for_status().json()
            print(f"{model.name}: {number}/{len(samples)} samples", file=sys.stderr, flush=True)
            yield read_places(told["choices"][0]["prompt_logprobs"])


@contextmanager
def serving(model: Path, dtype: str, max_tokens: int) -> Iterator[str]:
    """Run a vLLM server on a free port of this machine; its log is shown if it doesn't start."""
    port = _free_port()
    with TemporaryDirectory(prefix="reproduce-") as folder:
        log = Path(folder, "vllm.log")
        with log.open("wb") as stream:
            server = subprocess.Popen(
                [sys.executable, *VLLM_MODULE, *_arguments(model, port, dtype, max_tokens)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=_environment(),
                start_new_session=True,
            )
        try:
            _wait(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it ended by itself, and its children with it
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _arguments(model: Path, port: int, dtype: str, max_tokens: int) -> list[str]:
    options: dict[str, object] = {
        "--model": model.resolve(),
        "--served-model-name": "it",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": max_tokens,
        "--max-logprobs": -1,
        "--kv-cache-memory-bytes": _KV_CACHE_BYTES,
        "--generation-config": "vllm",
    }
    return [text for flag, value in options.items() for text in (flag, str(value))] + ["--enforce-eager"]


def _environment() -> dict[str, str]:
    last = (os.cpu_count() or 1) - 1
    return {
        **child_environ(process_environment()),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{last}" if last else "0",
        "VLLM_NO_USAGE_STATS": "1",
        # A sample may fill all positions of a model; the one token that is made after it is never read.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }


def _wait(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/health", timeout=_POLL_SECONDS).is_success:
                return
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"vLLM didn't start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
