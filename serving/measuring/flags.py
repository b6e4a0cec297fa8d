"""The command line of `quantgate measure`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from config.capacity import Hardware
from config.command_line import CommandParser, exit_codes
from serving.measuring.mix import parse_mix

DESCRIPTION = """\
Run each VARIANT with vLLM on this machine (or use a replica that runs already: --url), keep a number of requests
running, and write the figures to capacity.json beside the model: tokens per second, time to first token, inter-token
latency, KV cache capacity, memory. A second measurement of the same hardware, engine version and launch settings
replaces the first; others stay. Every prompt is random, so that the prefix cache has no effect.
"""
LAUNCH = {
    "tensor_parallel": ("N", "GPUs (or NUMA nodes) that share the model (default: 1)"),
    "pipeline_parallel": ("N", "groups of layers, each on GPUs of its own (default: 1)"),
    "data_parallel": ("N", "engines of one server, each with the whole model (default: 1)"),
    "dtype": ("TYPE", "auto, bfloat16, float16 or float32 (default: auto)"),
    "max_model_len": ("N", "tokens in a context (default: what the model says)"),
    "max_num_seqs": ("N", "requests in one batch (default: vLLM's)"),
    "kv_cache_bytes": ("SIZE", "memory for the KV cache, such as 24GiB (default: 512MiB on CPU, else vLLM's choice)"),
    "kv_cache_dtype": ("TYPE", "auto, bfloat16, float16, fp8, fp8_e4m3 or fp8_e5m2 (default: auto)"),
    "cores": ("LIST", "on CPU, which cores compute, such as 0-7 (default: all)"),
}


class OneLineParser(CommandParser):
    """Prints a usage error as one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def read_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; options that exclude each other are a usage error."""
    parser = measure_parser()
    options = parser.parse_args(arguments)
    if options.out and (len(options.variants) > 1 or options.plot):
        parser.error("--out takes the measurement of one VARIANT")
    if options.url and (options.config or len(options.variants) > 1):
        parser.error("--url is the replica of one VARIANT; a configuration names its own")
    if options.ca and not (options.url or "").startswith("https://"):
        parser.error("--ca is for --url https://...; a configuration names its own")
    described = [f"--{name.replace('_', '-')}" for name in (*LAUNCH, "gpus", "arg") if getattr(options, name)]
    if options.config and described:
        parser.error(f"{described[0]}: --config says how a variant is run; use one of them")
    return options


def launch_settings(options: argparse.Namespace) -> dict[str, object]:
    """Return the launch options as the settings of a configured replica."""
    settings = {name: getattr(options, name) for name in LAUNCH if getattr(options, name) is not None}
    others = {"gpus": options.gpus, "args": tuple(options.arg), "url": options.url, "ca": options.ca}
    return settings | {name: value for name, value in others.items() if value}


def measure_parser() -> CommandParser:
    """Describe `quantgate measure`."""
    parser = OneLineParser(
        prog="quantgate measure",
        description=DESCRIPTION,
        examples=[
            "quantgate measure variants/qwq-int4 --gpus 0,1 --tensor-parallel 2",
            "quantgate measure qwq-int4 --config quantgate.yaml --json",
        ],
        epilog=exit_codes(0, 1, 2, code_130="Ctrl-C", code_143="SIGTERM"),
    )
    add = parser.add_argument
    add("variants", nargs="+", metavar="VARIANT", help="a variant's directory, or its parent's; with --config a name")
    add("--concurrency", type=_typed(_counts), metavar="N,...", help="default: 1,4,16; on GPUs 1,4,16,64")
    add("--mix", type=_typed(parse_mix), metavar="PROMPT:ANSWER:SHARE,...", help=_mix_help())
    add(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="duration of each level (default: %(default)g)",
    )
    add(
        "--requests",
        type=_typed(_count),
        metavar="N",
        help="and until N requests were answered (default: twice the level)",
    )
    add("--out", type=Path, metavar="FILE", help="write this instead of capacity.json in the model's directory")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="OUT.png", help="measure nothing: draw what the variants' capacity.json hold")
    _add_server(parser.add_argument_group("the server"))
    return parser


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--config", type=Path, metavar="FILE", help="run each variant like its first replica in this configuration")
    add("--url", help="a running replica; the flags below describe its settings. VLLM_API_KEY is its key")
    add("--ca", metavar="FILE", help="with --url https://..., the certificates to trust instead of the machine's")
    add("--hardware", type=_typed(Hardware.parse), metavar="TEXT", help="with --url, such as 'NVIDIA H100, 2 GPUs'")
    for name, (metavar, text) in LAUNCH.items():
        add(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    add("--gpus", type=_typed(_gpus), metavar="N,...", help="which GPUs (default: the first ones)")
    add(
        "--arg",
        action="append",
        default=[],
        metavar="WORD",
        help="a word for vLLM's command line: --arg=--enforce-eager",
    )


def _mix_help() -> str:
    return (
        "requests by length, in tokens (default: 256:256:50,1024:128:25,128:1024:25, an eighth as long on CPU, and "
        "at most half of the context)"
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a positive number")
    return int(text)


def _gpus(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{text!r} is not a list of GPUs; write for example 0,1")
    return tuple(map(int, text.split(",")))


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Keep the message of a ValueError, which argparse would replace."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
