"""The flags of `quantgate quantize` and `quantgate evaluate`: parsed values, None for what was not given."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from config.command_line import CommandParser
from quantize.calibration.datasets import MAX_BAD
from quantize.evaluation.evaluate import DEFAULT_PLAN, REPLICA_SAMPLE_TOKENS
from quantize.planning.flag_values import (
    address,
    count,
    gpus,
    limit,
    override,
    positive,
    share,
    size,
    text_file,
)
from quantize.planning.recipe_file import limit_names
from quantize.planning.request import DEFAULT_TEXT
from quantize.planning.transforms import NO_TRANSFORM, TRANSFORMS
from quantize.running.terminal import OneLineParser
from quantize.schemes.scheme import PRESETS
from quantize.schemes.settings import DAMPING_LADDER, SETTINGS

_QUANTIZE = "Make an int4 or int8 variant of a model and measure how far it is from its parent."
_QUANTIZE_EXAMPLES = (
    "quantgate quantize models/QwQ-32B --scheme w4a16-g128 --data chats.jsonl --out variants/qwq-int4",
    "quantgate quantize models/QwQ-32B --recipe reasoning-best --data chats.jsonl --plan",
    "quantgate quantize --recipe qwq.yaml --override '*.down_proj=8' --gate",
)
_QUANTIZE_EPILOG = """\
A row of the data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; ShareGPT,
Alpaca and other formats are recognized (`Data` in quantize/README.md). A third of the prompts is kept out of
calibration and used for the evaluation. A flag wins over the recipe.

exit codes: 0 done (or this very variant was there already), 1 failed, 2 usage, 3 --gate: not shown to meet all limits,
            4 another process is making this variant
"""
_EVALUATE = "Measure how far a variant is from its base; any tool may have made it."
_EVALUATE_EXAMPLES = (
    "quantgate evaluate variants/qwq-int4 --against models/QwQ-32B --data chats.jsonl --limit kl_mean=0.03 --gate",
    "quantgate evaluate variants/qwq-fp8 --against models/QwQ-32B --replica http://h:8001 --parent-replica http://h:8000",
)
_EVALUATE_EPILOG = "exit codes: 0 done, 1 failed, 2 usage, 3 --gate: not shown to meet all limits"


def quantize_parser() -> CommandParser:
    """Describe `quantgate quantize`."""
    parser = _parser("quantgate quantize", _QUANTIZE, _QUANTIZE_EXAMPLES, _QUANTIZE_EPILOG)
    parser.add_argument(
        "model", type=Path, nargs="?", help="model directory: config.json, *.safetensors, tokenizer (recipe: base)"
    )
    _add_recipe(parser)
    _add_scheme(parser)
    _add_text(parser)
    _add_solver(parser)
    _add_machine(parser)
    add_evaluation(parser)
    _add_output(parser)
    return parser


def evaluate_parser() -> CommandParser:
    """Describe `quantgate evaluate`."""
    parser = _parser("quantgate evaluate", _EVALUATE, _EVALUATE_EXAMPLES, _EVALUATE_EPILOG)
    add = parser.add_argument
    add("variant", type=Path, help="quantized model directory: GPTQ 4/8 bits or w8a8; with --replica any format")
    add("--against", type=Path, required=True, metavar="BASE", help="its unquantized parent")
    add(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="JSON lines, a JSON array or parquet of chats; may be repeated (default: shipped ones)",
    )
    add("--every-row", action="store_true", help="use all rows, not only the third that calibration never sees")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"cut each chat to this (default: {_by_device('max_tokens')}; with --replica {REPLICA_SAMPLE_TOKENS})",
    )
    add_replicas(parser)
    add_evaluation(parser)
    _add_gate(parser.add_argument_group("output"))
    return parser


def add_replicas(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the servers through which a variant is measured."""
    group = parser.add_argument_group(
        "replicas",
        "Measure through running vLLM servers instead of transformers: any format that vLLM serves, without a model in "
        "this machine's memory. Start both with --max-logprobs 1024 if you can: of less, the KL divergence is a looser "
        "lower bound. VLLM_API_KEY is their key, if they have one. Keep other requests off them meanwhile.",
    )
    group.add_argument("--replica", type=address, metavar="URL", help="a server of the variant, http://host:port")
    group.add_argument(
        "--parent-replica",
        type=address,
        metavar="URL",
        help="a server of its parent (default: what it answered in an earlier evaluation on the same chats)",
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is measured, and which limits replace the scheme's own."""
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--eval-chats",
        type=positive,
        metavar="N",
        help=f"held-out chats to compare on; more give narrower intervals (default: {DEFAULT_PLAN.chats})",
    )
    add("--eval-tokens", type=positive, metavar="N", help="fewer chats where they have more tokens than this together")
    add(
        "--eval-prompts",
        type=count,
        metavar="N",
        help=f"prompts that both answer, for length and endings; 0: none (default: {DEFAULT_PLAN.prompts})",
    )
    add("--eval-seeds", type=positive, metavar="N", help=f"answers to each prompt (default: {DEFAULT_PLAN.seeds})")
    add(
        "--eval-new-tokens",
        type=positive,
        metavar="N",
        help=f"cut answers to this (default: {DEFAULT_PLAN.new_tokens})",
    )
    add("--tasks", type=Path, metavar="FILE", help="JSONL of questions with answers: recovery and flips")
    add(
        "--task-tokens",
        type=positive,
        metavar="N",
        help=f"cut answers to the questions to this (default: {DEFAULT_PLAN.task_tokens})",
    )
    add(
        "--limit",
        type=limit,
        action="append",
        metavar="NAME=VALUE",
        help=f"replace a limit; may be repeated ({', '.join(limit_names())})",
    )


def _by_device(name: str) -> str:
    cpu, gpu = (getattr(DEFAULT_TEXT[engine], name) for engine in ("cpu", "cuda"))
    return f"{gpu} on a GPU, {cpu} on a CPU"


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to make").add_argument
    add("--recipe", metavar="FILE|NAME", help="a recipe file, or the name of a shipped one")
    add("--recipes", action="store_true", help="list the shipped recipes, and stop")
    add("--plan", action="store_true", help="tell size, memory, time, engines and limits of the variant, and stop")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the variant, {id} in it becomes its id; whole or not at all",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the results of stages that earlier runs kept (default); --no-resume solves and evaluates again",
    )
    add(
        "--keep-bytes",
        type=size,
        metavar="SIZE",
        help="results of stages that stay in $QUANTGATE_HOME/stages when the variant is done (default: 20GB)",
    )


def _add_scheme(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scheme").add_argument
    add("--scheme", metavar="NAME", help=f"one of {', '.join(PRESETS)}, auto or auto-asym")
    add(
        "--max-bytes",
        type=size,
        metavar="SIZE",
        help="auto, auto-asym: the best variant of at most this size, like 19GB",
    )
    add(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="auto, auto-asym: the smallest variant of at most this mean divergence",
    )
    add(
        "--override",
        type=override,
        action="append",
        metavar="PATTERN=BITS",
        help="modules that differ: '*.down_proj=8', '*.o_proj=4:32' (bits:group), '*.0.*=keep'; the first match counts",
    )
    add(
        "--kv-cache",
        choices=("auto", "fp8"),
        help="fp8: with calibrated scales for an FP8 KV cache, half the memory of a token; the evaluation rounds keys "
        "and values, too (default: auto, the model's dtype)",
    )
    add("--tensor-parallel", type=positive, metavar="N", help="GPUs that must be able to share it")
    add("--engine", choices=("auto", "cpu", "cuda"), help="where it must load (default: auto, this machine's)")


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration").add_argument
    add(
        "--data",
        type=text_file,
        action="append",
        metavar="FILE[=WEIGHT]",
        help="JSON lines, a JSON array or parquet of chats; may be repeated (default: shipped ones)",
    )
    add(
        "--max-bad",
        type=share,
        metavar="SHARE",
        help=f"skip invalid rows up to this share of a file (default: {MAX_BAD:.0%})".replace("%", "%%"),
    )
    add("--self-generate", type=count, metavar="N", help="let the base itself answer N prompts of the data")
    add(
        "--replica",
        type=address,
        metavar="URL",
        help="a running server of the base that answers them, http://host:port",
    )
    add("--samples", type=int, metavar="N", help=f"chats to calibrate on (default: {_by_device('samples')})")
    add("--max-tokens", type=int, metavar="N", help=f"cut each chat to this (default: {_by_device('max_tokens')})")
    add("--seed", type=int, metavar="N", help="decides which chats, in which order (default: 0)")


def _add_solver(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("solver").add_argument
    add(
        "--transform",
        action="append",
        choices=(*TRANSFORMS, NO_TRANSFORM),
        help="change the base before it is solved, without changing what it computes; may be repeated (default: smooth "
        "for w8a8, else none)",
    )
    add("--solver", choices=tuple(SETTINGS), help="a preset (default: best); replaces the recipe's solver table")
    add("--group-order", action=argparse.BooleanOptionalAction, help="order inputs by activation inside groups")
    add(
        "--weighted-scales",
        action=argparse.BooleanOptionalAction,
        help="search scales for the error that GPTQ is charged for",
    )
    add(
        "--scale-norm",
        type=float,
        metavar="P",
        help="without it: power of the error that is minimised, 0: none",
    )
    add("--gptaq", type=float, metavar="SHARE", help="make up for this share of the error that earlier layers left")
    add(
        "--residual",
        type=float,
        metavar="SHARE",
        help="with --gptaq: make up for this share of the error in the residual stream, too, where the family is known",
    )
    add(
        "--shrinkage",
        type=float,
        metavar="S",
        help="add S K / T of the Hessian's median diagonal to it, for K inputs and T tokens; 0: nothing",
    )
    add(
        "--damp",
        type=float,
        action="append",
        metavar="SHARE",
        help="share of the Hessian's diagonal added to it; repeat it for a ladder "
        f"(default: {' '.join(f'{step:g}' for step in DAMPING_LADDER)})",
    )
    add("--allow-fallback", type=count, metavar="N", help="so many modules may be rounded to nearest (default: 0)")
    add(
        "--expert-fallback",
        choices=("rtn", "fail"),
        help="experts that less than 0.5%% of the tokens reach: round them to nearest, or stop (default: rtn)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--backend", choices=("gptqmodel", "auto-gptq"), help="program that solves (default: gptqmodel)")
    add("--gpus", type=gpus, metavar="2,5", help="GPUs that may work (default: all)")
    add("--gpu-memory", type=size, metavar="SIZE", help="memory of each that may be used, like 80GB")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    _add_gate(group)
    group.add_argument("--log", type=Path, metavar="FILE", help="write the run's log here")


def _add_gate(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gate", action="store_true", help="exit with 3 unless all limits are shown to be met")
    group.add_argument("--json", action="store_true", help="print JSON")


def _parser(program: str, description: str, examples: Sequence[str], epilog: str) -> OneLineParser:
    return OneLineParser(
        prog=program,
        usage="%(prog)s [MODEL] [--recipe FILE] [--scheme NAME] --out DIR [...]" if "quantize" in program else None,
        description=description,
        examples=examples,
        epilog=epilog,
    )
