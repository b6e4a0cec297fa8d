"""`quantgate variants`: read, compare, tidy up and adopt variants; data on stdout, everything else on stderr."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from config.load import process_environment
from config.manifest import Manifest, Quality
from quantize.base import read_base
from quantize.conduct import Conduct
from quantize.measuring.measurement import EVIDENCE_FILE
from quantize.pages.html_report import write_report
from quantize.pages.report import disposal_lines, listing, page, summary
from quantize.pipeline import evaluate_directory
from quantize.planning.flags import add_evaluation
from quantize.planning.plan import present_engine
from quantize.planning.recipe_schema import EvaluationTable
from quantize.planning.request import DEFAULT_TEXT
from quantize.planning.resolve import chosen_evaluation
from quantize.running.progress import Stages
from quantize.running.terminal import DONE, FAILED, OneLineParser, guarded, tell
from quantize.running.worker import child_environ
from quantize.text.calibration import shipped_files
from quantize.variants.adoption import adopt, scheme_told
from quantize.variants.artefact import read_artefact
from quantize.variants.comparison import compare, comparison_json, comparison_text
from quantize.variants.lint import lint
from quantize.variants.pruning import disposables, remove

_Verb = Callable[[argparse.Namespace], int]
_PRUNE_AFTER_DAYS = 7.0


def variants_main(argv: list[str]) -> int:
    """`quantgate variants VERB`: read, compare, tidy up and adopt variants."""
    options = _parser().parse_args(argv)
    verb: _Verb = options.verb
    return guarded("quantgate variants", lambda: verb(options))


def _list(options: argparse.Namespace) -> int:
    variants = _read_all(options.directories)
    print(_as_json(variants) if options.json else listing(variants))
    return DONE


def _show(options: argparse.Namespace) -> int:
    manifest = Manifest.read(options.directory)
    print(manifest.to_json() if options.json else page(manifest, options.directory))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    altered = {str(path): manifest.altered_files(path) for path, manifest in _read_all(options.directories)}
    if options.json:
        print(json.dumps(altered, indent=2))
    else:
        for path, names in altered.items():
            print(f"{path}: {'altered: ' + ', '.join(names) if names else 'as it was sealed'}")
    return FAILED if any(altered.values()) else DONE


def _diff(options: argparse.Namespace) -> int:
    comparison = compare(Manifest.read(options.left), Manifest.read(options.right))
    print(comparison_json(comparison) if options.json else comparison_text(comparison))
    return DONE


def _lint(options: argparse.Namespace) -> int:
    base = read_base(options.against, digested=False) if options.against else None
    artefact = read_artefact(options.directory)
    findings = lint(options.directory, base, scheme_told(artefact, base.shapes if base else {}))
    if options.json:
        rows = [{"check": one.check, "where": one.where, "problem": one.problem} for one in findings]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(str, findings)) or f"{options.directory}: no findings")
    return FAILED if findings else DONE


def _prune(options: argparse.Namespace) -> int:
    found = [
        one
        for place in options.directories
        for one in disposables(
            place, older_than_days=options.older_than, failed=options.failed, superseded=options.superseded
        )
    ]
    print("\n".join(disposal_lines(found)))
    if options.yes:
        for one in remove(found):
            tell(f"{one.path}: removed")
    elif found:
        tell("nothing was removed: pass --yes to remove what is listed")
    return DONE


def _adopt(options: argparse.Namespace) -> int:
    conduct = Conduct(
        child_environ(process_environment()), Stages(sys.stderr), chosen_evaluation(options, EvaluationTable())
    )

    def measure() -> Quality:
        return evaluate_directory(
            options.directory,
            options.against,
            options.data or shipped_files(),
            conduct,
            max_tokens=options.max_tokens or DEFAULT_TEXT[present_engine()].max_tokens,
            every_row=options.every_row,
            evidence=options.directory / EVIDENCE_FILE,
        )

    manifest = adopt(options.directory, read_base(options.against), measure, tell)
    print(manifest.to_json() if options.json else summary(manifest, options.directory))
    return DONE


def _report(options: argparse.Namespace) -> int:
    write_report(_read_all(options.directories), options.out, options.against)
    print(options.out)
    return DONE


def _read_all(directories: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    return [(directory, Manifest.read(directory)) for directory in directories]


def _as_json(variants: Sequence[tuple[Path, Manifest]]) -> str:
    told = [{"directory": str(path), **manifest.model_dump(mode="json")} for path, manifest in variants]
    return json.dumps(told, indent=2, ensure_ascii=False)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("quantgate variants", description="Read, compare, tidy up and adopt variants.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)

    def verb(name: str, run: _Verb, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=run)
        return sub

    readers = [
        verb("list", _list, "a table of variants"),
        verb("show", _show, "everything about one variant"),
        verb("verify", _verify, "compare every byte with the seal; exit code 1 if one has changed"),
        verb("diff", _diff, "what differs between two variants, and which is better"),
        verb("lint", _lint, "check a quantized directory in seconds; exit code 1 if something is wrong"),
    ]
    _add_directories(readers)
    for sub in readers:
        sub.add_argument("--json", action="store_true", help="print JSON")
    readers[-1].add_argument("--against", type=Path, metavar="BASE", help="its unquantized parent, for every check")
    _add_prune(verb("prune", _prune, "list, or with --yes remove, what a folder of variants can do without"))
    _add_adopt(verb("adopt", _adopt, "lint, measure and seal a directory that another tool quantized, where it lies"))
    _add_report(verb("report", _report, "write one HTML page about variants: plots, checks, worst samples"))
    return parser


def _add_directories(readers: Sequence[argparse.ArgumentParser]) -> None:
    listing_, showing, verifying, comparing, linting = readers
    for sub in (listing_, verifying):
        sub.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    for sub in (showing, linting):
        sub.add_argument("directory", type=Path, metavar="DIR")
    comparing.add_argument("left", type=Path, metavar="A")
    comparing.add_argument("right", type=Path, metavar="B")


def _add_prune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directories", type=Path, nargs="+", metavar="DIR", help="folder that holds variants")
    add("--failed", action="store_true", help="variants that missed a limit, too")
    add("--superseded", action="store_true", help="variants replaced by a newer one of the same base and scheme, too")
    add(
        "--older-than",
        type=float,
        default=_PRUNE_AFTER_DAYS,
        metavar="DAYS",
        help="keep what a stopped run left for --resume for so long (default: %(default)g)",
    )
    add("--yes", action="store_true", help="remove what is listed")


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="made by AutoGPTQ, GPTQModel or llm-compressor")
    add("--against", type=Path, required=True, metavar="BASE", help="its unquantized parent")
    add("--data", type=Path, action="append", default=[], metavar="FILE", help="chats (default: shipped ones)")
    add("--every-row", action="store_true", help="use all rows: its maker's calibration never saw a part of them")
    add("--max-tokens", type=int, metavar="N", help="cut each chat (default: 4096 on a GPU, 2048 on a CPU)")
    add("--json", action="store_true", help="print JSON")
    add_evaluation(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--against", type=Path, metavar="BASE", help="their parent, whose measured speed is plotted, too"
    )
