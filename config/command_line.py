"""What the command lines of all packages share: examples and exit codes in the help, and the configuration file."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

DEFAULT_CONFIG = Path("quantgate.yaml")

# What a code means unless a command says otherwise.
MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        0: "done",
        1: "failed",
        2: "usage or configuration error",
        4: "another process runs the replicas of this home",
    }
)


class HelpFormatter(argparse.HelpFormatter):
    """Fills each paragraph of a description or epilog by itself; one that begins with `example` keeps its lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            textwrap.indent(each, indent)
            if each.startswith("example")
            else super(HelpFormatter, self)._fill_text(each, width, indent)
            for each in paragraphs
        )


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, with examples in its help, each a line for a shell; subcommands get the same kind."""

    def __init__(self, *, examples: Sequence[str] = (), epilog: str = "", **options: Any) -> None:
        self.examples = tuple(examples)
        title = "example:" if len(self.examples) == 1 else "examples:"
        shown = "\n  ".join((title, *self.examples)) if self.examples else ""
        text = "\n\n".join(filter(None, (shown, epilog)))
        super().__init__(**{"formatter_class": HelpFormatter, **options}, epilog=text)


def exit_codes(*codes: int, **meanings: str) -> str:
    """Format the exit codes of a command for the end of its help.

    `codes` have their usual meaning; the others are given as `code_3="..."`.
    """
    texts = {code: MEANINGS[code] for code in codes}
    texts |= {int(name.removeprefix("code_")): meaning for name, meaning in meanings.items()}
    return "exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in sorted(texts.items()))


def add_config(parser: argparse.ArgumentParser, text: str = f"configuration file (default: {DEFAULT_CONFIG})") -> None:
    """Add the configuration file as an argument, and as `--config FILE` for those who name it."""
    parser.add_argument("file", type=Path, nargs="?", metavar="CONFIG", help=text)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same, as an option")


def chosen_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Return the configuration file that was given, or the default one; given twice, it is a usage error."""
    return given_config(parser, options) or DEFAULT_CONFIG


def given_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path | None:
    """Return the configuration file that was given, None if there was none; given twice, it is a usage error."""
    argument: Path | None = options.file
    option: Path | None = options.config
    if argument is not None and option is not None:
        parser.error(f"the configuration is given twice: {argument} and --config {option}")
    return argument or option
