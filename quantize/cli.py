"""`quantgate quantize`, `evaluate` and `variants`: data on stdout, everything else on stderr."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from config.errors import ManifestError
from config.load import process_environment
from config.manifest import Manifest
from quantize.calibration import shipped_files
from quantize.errors import CalibrationError, QuantizeError
from quantize.interrupt import Terminated, terminable
from quantize.measurement import EVALUATION_TOKENS
from quantize.pipeline import build_variant, evaluate_directory
from quantize.plan import DEFAULT_MAX_TOKENS, DEFAULT_SAMPLES, plan_variant, present_engine
from quantize.progress import Stages
from quantize.report import listing, page, quality_line, summary
from quantize.scheme import PRESETS
from quantize.settings import DAMPING_LADDER, SETTINGS
from quantize.store import reusable
from quantize.worker import child_environ

_DONE, _FAILED, _GATE = 0, 1, 3
_INTERRUPTED, _TERMINATED = 130, 143

_QUANTIZE_HELP = """\
Make an int4 or int8 variant of a model and measure how far it is from its parent.

example:
  quantgate quantize models/QwQ-32B --scheme w4a16-g128 --data chats.jsonl --out variants/qwq-int4

A line of the data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
A third of it is kept out of calibration and used for the evaluation.

exit codes: 0 done (or this very variant was there already), 1 failed, 2 usage, 3 --gate and a limit was missed
"""


class _OneLineParser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str]) -> int:
    """`quantgate quantize`: make a variant, or reuse the finished one."""
    options = _quantize_parser().parse_args(argv)
    return _guarded("quantgate quantize", lambda: _quantize(options))


def evaluate_main(argv: list[str]) -> int:
    """`quantgate evaluate`: measure a variant against a base and print its quality."""
    options = _evaluate_parser().parse_args(argv)
    return _guarded("quantgate evaluate", lambda: _evaluate(options))


def variants_main(argv: list[str]) -> int:
    """`quantgate variants list|show|verify`: read what is sealed."""
    options = _variants_parser().parse_args(argv)
    verb: Callable[[argparse.Namespace], int] = options.verb
    return _guarded("quantgate variants", lambda: verb(options))


def _quantize(options: argparse.Namespace) -> int:
    recipe, drawn = plan_variant(
        options.model,
        options.scheme,
        engine=present_engine() if options.engine == "auto" else options.engine,
        data=options.data,
        samples=options.samples,
        max_tokens=options.max_tokens,
        seed=options.seed,
        settings=replace(SETTINGS["best"], damp=tuple(options.damp or DAMPING_LADDER)),
    )
    out = Path(str(options.out).replace("{id}", recipe.variant_id))
    manifest = reusable(out, recipe.variant_id)
    if manifest:
        _tell(f"{out}: reused, it already holds {manifest.id}")
    else:
        if not options.data:
            _tell(f"no --data given: calibrating on the shipped {', '.join(path.name for path in shipped_files())}")
        manifest = build_variant(
            recipe,
            drawn,
            out,
            environ=child_environ(process_environment()),
            stages=Stages(sys.stderr),
            evaluation_tokens=options.eval_tokens,
        )
    print(manifest.to_json() if options.json else summary(manifest, out))
    return _GATE if options.gate and manifest.quality.verdict == "fail" else _DONE


def _evaluate(options: argparse.Namespace) -> int:
    quality = evaluate_directory(
        options.variant,
        options.against,
        options.data or shipped_files(),
        environ=child_environ(process_environment()),
        stages=Stages(sys.stderr),
        max_tokens=options.max_tokens,
        evaluation_tokens=options.eval_tokens,
        every_row=options.every_row,
    )
    print(quality.model_dump_json(indent=2) if options.json else quality_line(quality))
    return _GATE if options.gate and quality.verdict == "fail" else _DONE


def _list(options: argparse.Namespace) -> int:
    variants = _read_all(options.directories)
    if options.json:
        print(_as_json(variants))
    else:
        print(listing(variants))
    return _DONE


def _show(options: argparse.Namespace) -> int:
    manifest = Manifest.read(options.directory)
    print(manifest.to_json() if options.json else page(manifest, options.directory))
    return _DONE


def _verify(options: argparse.Namespace) -> int:
    altered = {str(path): manifest.altered_files(path) for path, manifest in _read_all(options.directories)}
    if options.json:
        print(json.dumps(altered, indent=2))
    else:
        for path, names in altered.items():
            print(f"{path}: {'altered: ' + ', '.join(names) if names else 'as it was sealed'}")
    return _FAILED if any(altered.values()) else _DONE


def _read_all(directories: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    return [(directory, Manifest.read(directory)) for directory in directories]


def _as_json(variants: Sequence[tuple[Path, Manifest]]) -> str:
    told = [{"directory": str(path), **manifest.model_dump(mode="json")} for path, manifest in variants]
    return json.dumps(told, indent=2, ensure_ascii=False)


def _guarded(program: str, run: Callable[[], int]) -> int:
    try:
        with terminable():
            return run()
    except CalibrationError as error:
        _tell("\n".join(f"{program}: {problem}" for problem in error.problems))
        return error.exit_code
    except QuantizeError as error:
        _tell(f"{program}: {error}")
        return error.exit_code
    except (ManifestError, OSError) as error:
        _tell(f"{program}: {error}")
        return _FAILED
    except KeyboardInterrupt:
        _tell(f"{program}: interrupted; nothing was left behind")
        return _INTERRUPTED
    except Terminated:
        _tell(f"{program}: terminated; nothing was left behind")
        return _TERMINATED


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quantize_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        "quantgate quantize", description=_QUANTIZE_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="model directory: config.json, *.safetensors, tokenizer")
    add("--scheme", required=True, help=f"one of {', '.join(PRESETS)}")
    add(
        "--out",
        type=Path,
        required=True,
        help="directory of the variant, {id} in it becomes its id; appears whole or not at all",
    )
    add(
        "--data", type=Path, action="append", default=[], help="JSONL of chats; may be repeated (default: shipped ones)"
    )
    add("--samples", type=int, default=DEFAULT_SAMPLES, help="chats to calibrate on (default: %(default)s)")
    add("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="cut each chat to this (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides which chats, in which order (default: %(default)s)")
    add(
        "--damp",
        type=float,
        action="append",
        help="share of the Hessian's mean diagonal added to it; repeat it for a ladder (default: 0.01 0.02 0.05 0.1)",
    )
    add("--engine", choices=("auto", "cpu", "cuda"), default="auto", help="where it must load (default: this machine)")
    _add_judging(parser)
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser("quantgate evaluate", description="Measure how far a variant is from its base.")
    add = parser.add_argument
    add("variant", type=Path, help="quantized model directory: GPTQ 4/8 bits or w8a8")
    add("--against", type=Path, required=True, metavar="BASE", help="its unquantized parent")
    add(
        "--data", type=Path, action="append", default=[], help="JSONL of chats; may be repeated (default: shipped ones)"
    )
    add("--every-row", action="store_true", help="use all rows, not only the third that calibration never sees")
    add("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="cut each chat to this (default: %(default)s)")
    _add_judging(parser)
    return parser


def _variants_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser("quantgate variants", description="Read sealed variants.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_OneLineParser)
    for name, verb, text in (
        ("list", _list, "a table of variants"),
        ("show", _show, "everything about one variant"),
        ("verify", _verify, "compare every byte with the seal; exit code 1 if one has changed"),
    ):
        sub = verbs.add_parser(name, help=text, description=text)
        if name == "show":
            sub.add_argument("directory", type=Path, metavar="DIR")
        else:
            sub.add_argument("directories", type=Path, nargs="+", metavar="DIR")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(verb=verb)
    return parser


def _add_judging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--eval-tokens", type=int, default=EVALUATION_TOKENS, help="held-out tokens to compare (default: %(default)s)")
    add("--gate", action="store_true", help="exit with 3 if a limit was missed")
    add("--json", action="store_true", help="print JSON")
