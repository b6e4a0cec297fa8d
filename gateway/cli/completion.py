"""`quantgate completion`: a script that completes the command line in a shell."""

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from config.command_line import CommandParser, exit_codes
from quantgate import COMMANDS, parser_of

SHELLS = ("bash", "zsh", "fish")
# By the name of a value in the help: files and folders; `type` says it for the others.
FOLDERS, FILES = (
    ("DIR", "BASE", "MODEL"),
    ("FILE", "CONFIG", "PLAN", "VARIANT", "FILE[=WEIGHT]", "FILE|NAME", "OUT.png"),
)
USE = """\
bash:  quantgate completion bash > ~/.local/share/bash-completion/completions/quantgate

zsh:   quantgate completion zsh > ~/.zfunc/_quantgate, with ~/.zfunc in fpath before compinit

fish:  quantgate completion fish > ~/.config/fish/completions/quantgate.fish

The script knows all verbs and options of this version. Shells load it at the first use; nothing else is run."""


def completion_main(arguments: list[str]) -> int:
    """Print the script."""
    shell: str = completion_parser().parse_args(arguments).shell
    print(script(shell), end="")
    return 0


def completion_parser() -> CommandParser:
    """Describe `quantgate completion`."""
    parser = CommandParser(
        prog="quantgate completion",
        description=f"Print a script that completes verbs, options and files in a shell.\n\n{USE}",
        examples=["quantgate completion bash > ~/.local/share/bash-completion/completions/quantgate"],
        epilog=exit_codes(0, 2),
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="the shell")
    return parser


def script(shell: str) -> str:
    """Return the script for a shell."""
    # Imported here: the other commands do not need it.
    shtab = import_module("shtab")
    tree = command_tree()
    for action in _actions(tree):
        if kind := _files(action):
            action.complete = shtab.FILE if kind == "file" else shtab.DIRECTORY  # type: ignore[attr-defined]
    text: str = shtab.complete(tree, shell)
    return text if text.endswith("\n") else f"{text}\n"


def command_tree() -> argparse.ArgumentParser:
    """Return one parser of the whole command line."""
    tree = argparse.ArgumentParser(prog="quantgate")
    tree.add_argument("--version", action="store_true", help="print the version")
    verbs = tree.add_subparsers(metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for verb, command in COMMANDS.items():
        verbs.add_parser(verb, parents=[parser_of(verb)], add_help=False, help=command.help, description=command.help)
    return tree


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list them
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for sub in action.choices.values():
                yield from _actions(sub)


def _files(action: argparse.Action) -> str | None:
    """Whether the value is a file or a directory; None: neither."""
    if action.metavar in FOLDERS or (action.type is Path and action.dest in ("model", "variant")):
        return "directory"
    return "file" if action.type is Path or action.metavar in FILES else None
