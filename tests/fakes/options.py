"""The fake's command line: vLLM's flags that change what is seen on the wire, and `--fake-` flags for misbehaviour."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Faults:
    """How this replica answers, and how it misbehaves: one field for each `--fake-` flag that the engine knows."""

    tokens: int
    tokens_per_second: float
    reasoning_tokens: int
    think_prefix: bool
    think_tokens: bool
    crash_after_requests: int | None
    fail_first: int
    fail_status: int
    queue_limit: int | None
    draining: bool
    stall_before_first_byte: bool
    stall_after_tokens: int | None
    first_token_seconds: float
    drop_after_tokens: int | None
    logprob_shift: float
    vocabulary: int
    noise: float
    no_prompt_logprobs: bool


@dataclass(frozen=True, slots=True)
class Life:
    """How this process starts and ends."""

    start_delay: float
    exit_while_starting: int | None
    last_words: str
    exit_code: int
    ignore_sigterm: bool
    spawn_child: bool
    split_bytes: int | None
    port_file: Path | None
    log_requests: Path | None


@dataclass(frozen=True, slots=True)
class Options:
    """vLLM's options, and the fake's own flags beside them."""

    model: str
    chat_template: Path | None
    served: tuple[str, ...]
    adapters: dict[str, str]  # directories of LoRA adapters by name
    host: str
    port: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    api_keys: frozenset[str]
    shutdown_timeout_seconds: float
    keep_alive_seconds: float
    request_id_headers: bool
    load_tracking: bool
    force_usage: bool
    auto_tools: bool
    fingerprint: str | None
    faults: Faults
    life: Life


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Read a vLLM command line; flags that the fake does not know are skipped together with their values."""
    given, _ = _parser().parse_known_args(argv)
    named = vars(given)
    if named["queue_limit"] is None:
        named["queue_limit"] = given.max_num_queued_reqs
    environment_key = environ.get("VLLM_API_KEY")
    return Options(
        model=given.model,
        chat_template=given.chat_template,
        served=tuple(given.served_model_name or [given.model]),
        adapters=_adapters(given.lora_modules) if given.enable_lora else {},
        host=given.host,
        port=given.port,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        max_logprobs=given.max_logprobs,
        api_keys=frozenset(given.api_key or ([environment_key] if environment_key else [])),
        shutdown_timeout_seconds=given.shutdown_timeout,
        keep_alive_seconds=float(environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
        request_id_headers=given.enable_request_id_headers,
        load_tracking=given.enable_server_load_tracking,
        force_usage=given.enable_force_include_usage,
        auto_tools=given.enable_auto_tool_choice and given.tool_call_parser is not None,
        fingerprint=given.fingerprint_value,
        faults=Faults(**{field.name: named[field.name] for field in fields(Faults)}),
        life=Life(**{field.name: named[field.name] for field in fields(Life)}),
    )


def _parser() -> argparse.ArgumentParser:
    # Without abbreviations: `--max-num` of a newer vLLM must not be taken for a flag of ours.
    parser = argparse.ArgumentParser("fake vllm", allow_abbrev=False)
    _add_vllm_flags(parser)
    _add_answer_flags(parser)
    _add_fault_flags(parser)
    _add_life_flags(parser)
    return parser


def _add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="fake-model")
    parser.add_argument("--chat-template", type=Path)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=_length, default=32768)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-queued-reqs", type=int)
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--fingerprint-value")
    parser.add_argument("--enable-request-id-headers", action="store_true")
    parser.add_argument("--enable-server-load-tracking", action="store_true")
    parser.add_argument("--enable-force-include-usage", action="store_true")
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser")


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    fake = parser.add_argument_group("what it answers")
    fake.add_argument("--fake-tokens", dest="tokens", type=int, default=16)
    fake.add_argument("--fake-tokens-per-second", dest="tokens_per_second", type=float, default=0.0)
    fake.add_argument("--fake-reasoning-tokens", dest="reasoning_tokens", type=int, default=0)
    fake.add_argument("--fake-think-prefix", dest="think_prefix", action="store_true")
    fake.add_argument("--fake-think-tokens", dest="think_tokens", action="store_true")
    fake.add_argument("--fake-vocabulary", dest="vocabulary", type=int, default=0)
    fake.add_argument("--fake-noise", dest="noise", type=float, default=0.0)
    fake.add_argument("--fake-split-bytes", dest="split_bytes", type=int)


def _add_fault_flags(parser: argparse.ArgumentParser) -> None:
    fake = parser.add_argument_group("how it misbehaves")
    fake.add_argument("--fake-crash-after-requests", dest="crash_after_requests", type=int)
    fake.add_argument("--fake-fail-first", dest="fail_first", type=int, default=0)
    fake.add_argument("--fake-fail-status", dest="fail_status", type=int, default=503)
    fake.add_argument("--fake-queue-limit", dest="queue_limit", type=int)
    fake.add_argument("--fake-draining", dest="draining", action="store_true")
    fake.add_argument("--fake-stall-before-first-byte", dest="stall_before_first_byte", action="store_true")
    fake.add_argument("--fake-stall-after-tokens", dest="stall_after_tokens", type=int)
    fake.add_argument("--fake-first-token-seconds", dest="first_token_seconds", type=float, default=0.0)
    fake.add_argument("--fake-no-prompt-logprobs", dest="no_prompt_logprobs", action="store_true")
    fake.add_argument("--fake-logprob-shift", dest="logprob_shift", type=float, default=0.0)
    fake.add_argument("--fake-drop-after-tokens", dest="drop_after_tokens", type=int)


def _add_life_flags(parser: argparse.ArgumentParser) -> None:
    fake = parser.add_argument_group("how it starts and ends")
    fake.add_argument("--fake-start-delay", dest="start_delay", type=float, default=0.0)
    fake.add_argument("--fake-exit-while-starting", dest="exit_while_starting", type=int)
    fake.add_argument(
        "--fake-last-words",
        dest="last_words",
        default="ValueError: Unsupported quantization config: bits=4, sym=False",
    )
    fake.add_argument("--fake-exit-code", dest="exit_code", type=int, default=0)
    fake.add_argument("--fake-ignore-sigterm", dest="ignore_sigterm", action="store_true")
    fake.add_argument("--fake-spawn-child", dest="spawn_child", action="store_true")
    fake.add_argument("--fake-port-file", dest="port_file", type=Path)
    fake.add_argument("--fake-log-requests", dest="log_requests", type=Path)


def _adapters(modules: Sequence[str]) -> dict[str, str]:
    """Read `name=directory`, as vLLM does."""
    return dict(module.split("=", 1) for module in modules)


def _length(text: str) -> int:
    """4096, 4k (thousands), 4K (times 1024) or auto: as vLLM reads a length."""
    if text == "auto":
        return 32768
    factor = {"k": 1000, "K": 1024}.get(text[-1:], 1)
    return int(float(text.rstrip("kK")) * factor)
