"""`quantgate variants`: list, compare, verify, lint, prune and adopt variants; data on stdout, the rest on stderr."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from config.command_line import CommandParser, exit_codes
from config.errors import ConfigError, ManifestError
from config.load import load_settings, process_environment
from config.manifest import FILE_NAME, Manifest
from config.measurements import EVALUATION_FILE, read_measurements
from config.quality import Quality
from quantize.base import read_base
from quantize.calibration.datasets import shipped_files
from quantize.errors import VariantError
from quantize.module_tree import with_module_tree
from quantize.options import RunOptions
from quantize.pipeline import evaluate_directory
from quantize.planning.flag_values import size
from quantize.planning.flags import add_evaluation, add_replicas
from quantize.planning.plan import present_engine
from quantize.planning.resolve import evaluation_max_tokens, evaluation_of
from quantize.report.text_report import disposal_lines, stage_listing, summary_line, variant_table, variant_text
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import stage_store
from quantize.running.terminal import DONE, FAILED, OneLineParser, print_stderr, run_command
from quantize.running.worker import child_environ
from quantize.variants.adoption import adopt, scheme_told
from quantize.variants.artefact import read_artefact
from quantize.variants.comparison import compare, comparison_json, comparison_text
from quantize.variants.lint import lint
from quantize.variants.pruning import disposables, remove, stage_disposables

_Verb = Callable[[argparse.Namespace], int]
_PRUNE_AFTER_DAYS = 7.0


def variants_main(argv: list[str]) -> int:
    """Run `quantgate variants VERB`; return the exit code."""
    parser = variants_parser()
    options = parser.parse_args(argv)
    if "keep_bytes" in options and not options.directories and options.keep_bytes is None:
        parser.error("DIR is missing: a folder of variants; or pass --keep-bytes SIZE to prune stages")
    if "config" in options and options.config is None and not getattr(options, "directories", True):
        parser.error("DIR is missing: a variant, a folder of variants, or --config FILE")
    verb: _Verb = options.verb
    return run_command("quantgate variants", lambda: verb(options))


def _list(options: argparse.Namespace) -> int:
    variants, problems = [], []
    for directory in _directories(options):
        try:
            variants.append((directory, Manifest.read(directory)))
        except ManifestError as error:
            problems.append(f"quantgate variants: {error}")
    if variants or not problems:
        print(_as_json(variants) if options.json else variant_table(variants))
    for problem in problems:
        print_stderr(problem)
    return FAILED if problems else DONE


def _show(options: argparse.Namespace) -> int:
    directory = _named(options.config, options.directory)
    manifest = Manifest.read(directory)
    print(manifest.to_json() if options.json else variant_text(manifest, directory))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    altered = {str(path): manifest.altered_files(path) for path, manifest in _read_all(_directories(options))}
    if options.json:
        print(json.dumps(altered, indent=2))
    else:
        for path, names in altered.items():
            print(f"{path}: {'checksum mismatch: ' + ', '.join(names) if names else 'all checksums match'}")
    return FAILED if any(altered.values()) else DONE


def _diff(options: argparse.Namespace) -> int:
    places = [_named(options.config, each) for each in (options.left, options.right)]
    left, right = (Manifest.read(place) for place in places)
    before, after = (read_measurements(place) for place in places)
    comparison = compare(left, right, (before, after) if before and after else None)
    print(comparison_json(comparison) if options.json else comparison_text(comparison))
    return DONE


def _lint(options: argparse.Namespace) -> int:
    base = None
    if options.against:
        environ = child_environ(process_environment())
        base = with_module_tree(read_base(options.against, digested=False), environ)
    directory = _named(options.config, options.directory)
    artefact = read_artefact(directory)
    findings = lint(directory, base, scheme_told(artefact, base.shapes if base else {}))
    if options.json:
        rows = [{"check": finding.check, "where": finding.where, "problem": finding.problem} for finding in findings]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(str, findings)) or f"{directory}: no findings")
    return FAILED if findings else DONE


def _prune(options: argparse.Namespace) -> int:
    found = [
        disposable
        for place in options.directories
        for disposable in disposables(
            place, older_than_days=options.older_than, failed=options.failed, superseded=options.superseded
        )
    ]
    if options.keep_bytes is not None:
        store = stage_store(process_environment())
        found += stage_disposables(store, keep_bytes=options.keep_bytes, older_than_days=options.older_than)
    if options.json:
        print(json.dumps([{**asdict(each), "path": str(each.path)} for each in found], indent=2))
    else:
        print("\n".join(disposal_lines(found)))
    if options.yes:
        for disposable in remove(found):
            print_stderr(f"{disposable.path}: removed")
    elif found:
        print_stderr("nothing was removed; pass --yes to remove the listed directories")
    return DONE


def _stages(options: argparse.Namespace) -> int:
    store = stage_store(process_environment())
    store.sweep()
    entries = store.entries()
    if options.json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        print(json.dumps(rows, indent=2))
    else:
        print(stage_listing(entries, store.root))
    return DONE


def _adopt(options: argparse.Namespace) -> int:
    run_options = RunOptions(
        child_environ(process_environment()),
        ProgressReporter(sys.stderr),
        evaluation_of(options),
    )

    base = with_module_tree(read_base(options.against), run_options.environ)

    def measure() -> Quality:
        return evaluate_directory(
            options.directory,
            options.against,
            options.data or shipped_files(),
            run_options,
            max_tokens=evaluation_max_tokens(options, present_engine()),
            every_row=options.every_row,
            evidence=options.directory / EVALUATION_FILE,
        )

    manifest = adopt(options.directory, base, measure, print_stderr)
    print(manifest.to_json() if options.json else summary_line(manifest, options.directory))
    return DONE


def _report(options: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise VariantError("variants report needs matplotlib; install quantgate[plots]")
    from quantize.report.html_report import write_report  # noqa: PLC0415 - matplotlib is an extra

    write_report(_read_all(_directories(options)), options.out, options.against)
    print(options.out)
    return DONE


def _directories(options: argparse.Namespace) -> list[Path]:
    """Return the variant directories: given, inside a given folder, by name, or all of a configuration."""
    config: Path | None = options.config
    if config is None:
        return [each for place in options.directories for each in variant_directories(place)]
    if options.directories:
        return [_named(config, name) for name in options.directories]
    paths = _configured(config).values()
    return [path for path in paths if path is not None and (path / FILE_NAME).exists()]


def variant_directories(place: Path) -> list[Path]:
    """Return the variants of a folder, sorted by name; any other directory is returned itself."""
    if (place / FILE_NAME).exists() or not place.is_dir():
        return [place]
    # A name with a leading dot is of an unfinished variant.
    inside = [each for each in sorted(place.iterdir()) if (each / FILE_NAME).is_file() and each.name[0] != "."]
    return inside or [place]


def _named(config: Path | None, given: Path) -> Path:
    """Return a variant's directory: `given` itself, or with a configuration that of the variant of this name."""
    if config is None:
        return given
    paths, name = _configured(config), str(given)
    if name not in paths:
        near = get_close_matches(name, paths, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{config}: there is no variant {name!r}; {hint}known: {', '.join(paths) or 'none'}")
    path = paths[name]
    if path is None:
        raise ConfigError(f"{config}: the variant {name!r} has no path, only replicas with a url")
    return path


def _configured(config: Path) -> dict[str, Path | None]:
    variants = load_settings(config).variants
    return {
        name: None if each.path is None else config.parent / Path(each.path).expanduser()
        for name, each in variants.items()
    }


def _read_all(directories: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    return [(directory, Manifest.read(directory)) for directory in directories]


def _as_json(variants: Sequence[tuple[Path, Manifest]]) -> str:
    payload = [{"directory": str(path), **manifest.model_dump(mode="json")} for path, manifest in variants]
    return json.dumps(payload, indent=2, ensure_ascii=False)


_EXAMPLES = {
    "list": ("quantgate variants list variants --json",),
    "show": ("quantgate variants show variants/qwq-int4",),
    "verify": ("quantgate variants verify variants",),
    "diff": ("quantgate variants diff variants/qwq-int4 variants/qwq-int8",),
    "lint": ("quantgate variants lint downloads/qwq-awq --against models/QwQ-32B",),
    "stages": ("quantgate variants stages --json",),
    "prune": ("quantgate variants prune variants --superseded --keep-bytes 20GB",),
    "adopt": ("quantgate variants adopt downloads/qwq-awq --against models/QwQ-32B --data chats.jsonl",),
    "report": ("quantgate variants report variants --out report.html",),
}


def variants_parser() -> CommandParser:
    """Describe `quantgate variants`."""
    codes = exit_codes(0, 1, 2)
    parser = OneLineParser(
        prog="quantgate variants",
        description="List, compare, verify, lint, prune and adopt variants.",
        examples=["quantgate variants list variants", "quantgate variants verify variants/qwq-int4"],
        epilog=codes,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)

    def verb(name: str, run: _Verb, text: str, codes: str = codes) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, examples=_EXAMPLES[name], epilog=codes)
        sub.set_defaults(verb=run)
        return sub

    altered = exit_codes(2, code_0="all checksums match", code_1="checksum mismatch")
    wrong = exit_codes(2, code_0="no findings", code_1="findings")
    readers = [
        verb("list", _list, "list variants as a table"),
        verb("show", _show, "print the manifest of a variant"),
        verb("verify", _verify, "compare all files with their checksums", altered),
        verb("diff", _diff, "compare two variants"),
        verb("lint", _lint, "check the format of a quantized directory", wrong),
    ]
    _add_directories(readers)
    for sub in readers:
        sub.add_argument("--json", action="store_true", help="print JSON")
        _add_config(sub)
    readers[-1].add_argument("--against", type=Path, metavar="BASE", help="its unquantized parent; enables all checks")
    _add_stages(verb("stages", _stages, "list the results of stages that runs of `quantize` kept, and their sizes"))
    _add_prune(verb("prune", _prune, "list, or with --yes remove, what a folder of variants can do without"))
    _add_adopt(verb("adopt", _adopt, "lint, measure and seal a directory that another tool quantized, where it lies"))
    _add_report(verb("report", _report, "write one HTML page about variants: plots, checks, worst samples"))
    return parser


def _add_directories(readers: Sequence[argparse.ArgumentParser]) -> None:
    listing_, showing, verifying, comparing, linting = readers
    for sub in (listing_, verifying):
        sub.add_argument("directories", type=Path, nargs="*", metavar="DIR", help="a variant, or a folder of variants")
    for sub in (showing, linting):
        sub.add_argument("directory", type=Path, metavar="DIR")
    comparing.add_argument("left", type=Path, metavar="A")
    comparing.add_argument("right", type=Path, metavar="B")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="DIR is the name of a variant of this configuration file"
    )


def _add_stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_prune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directories", type=Path, nargs="*", metavar="DIR", help="folder that holds variants")
    add(
        "--keep-bytes",
        type=size,
        metavar="SIZE",
        help="results of stages in $QUANTGATE_HOME/stages beyond this size, too: those longest unused first",
    )
    add("--failed", action="store_true", help="variants that missed a limit, too")
    add("--superseded", action="store_true", help="variants replaced by a newer one of the same base and scheme, too")
    add(
        "--older-than",
        type=float,
        default=_PRUNE_AFTER_DAYS,
        metavar="DAYS",
        help="keep for so long what a stopped run left for the next one (default: %(default)g)",
    )
    add("--yes", action="store_true", help="remove what is listed")
    add("--json", action="store_true", help="print JSON")


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="made by AutoGPTQ, GPTQModel, llm-compressor, ...")
    add("--against", type=Path, required=True, metavar="BASE", help="its unquantized parent")
    add(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="evaluation data (default: included chats)",
    )
    add("--every-row", action="store_true", help="evaluate on all rows: none was used for its calibration")
    add("--max-tokens", type=int, metavar="N", help="truncate each chat (default: 4096 on a GPU, 2048 on a CPU)")
    add("--json", action="store_true", help="print JSON")
    add_replicas(parser)
    add_evaluation(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", type=Path, nargs="*", metavar="DIR", help="a variant, or a folder of variants")
    _add_config(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="BASE", help="their parent; adds its measured speed")
