"""What all commands have in common: examples and exit codes in the help, the configuration as argument or option."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from config.command_line import CommandParser
from quantgate import COMMANDS, main, parser_of

SUBCOMMANDS = {
    "config": ["check", "schema", "show"],
    "keys": ["create", "import", "list", "revoke", "rotate"],
    "rollout": ["abort", "history", "pause", "plan", "promote", "resume", "retry", "start", "status", "undo"],
    "route": ["explain", "state"],
    "variants": ["adopt", "diff", "lint", "list", "prune", "report", "show", "stages", "verify"],
}
ALL = [[verb] for verb in COMMANDS] + [[verb, sub] for verb, subs in SUBCOMMANDS.items() for sub in subs]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_exit_codes(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """The help of every command and subcommand ends with its exit codes; 0 and 2 are among them."""
    _, _, codes = shown(capsys, *words).partition("\nexit codes: ")
    numbers = [int(number) for number in re.findall(r"(?:^|[;,]\s+)(\d+)\s", codes)]
    assert numbers == sorted(set(numbers))
    assert {0, 2} <= set(numbers)


def parser_at(words: list[str]) -> CommandParser:
    """The parser of a command or subcommand."""
    parser = parser_of(words[0])
    for word in words[1:]:
        (verbs,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parser = verbs.choices[word]
    assert isinstance(parser, CommandParser)
    return parser


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """The help of every command and subcommand has an example of it, as a line of its own, that its parser takes."""
    examples = parser_at(words).examples
    assert examples
    text = shown(capsys, *words)
    for example in examples:
        assert f"\n  {example}\n" in text
        program, verb, *arguments = shlex.split(example.partition(" > ")[0])
        assert program == "quantgate"
        assert [verb, *arguments][: len(words)] == words
        parser_of(verb).parse_args(arguments)


@pytest.mark.parametrize("verb", COMMANDS)
def test_subcommands_are_known_here(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """The table above has every subcommand, so that the test above covers it."""
    text = shown(capsys, verb)
    listed = re.findall(r"^    (\w+) ", text.partition("options:")[0], re.MULTILINE)
    assert sorted(listed) == SUBCOMMANDS.get(verb, [])


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_configuration_is_an_option_too(capsys: pytest.CaptureFixture[str], words: list[str], tmp_path: Path) -> None:
    """A command that takes a configuration as an argument takes it as `--config FILE`; both are a usage error."""
    if "[CONFIG]" not in shown(capsys, *words):
        return
    with pytest.raises(SystemExit) as ended:
        main([*words, str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert ended.value.code == 2
    assert "the configuration is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["config", "check"], ["config", "show"], ["ps"], ["doctor"], ["gateway"], ["up"]])
def test_the_option_names_the_file(capsys: pytest.CaptureFixture[str], words: list[str], tmp_path: Path) -> None:
    """The file of `--config` is the one that is read."""
    path = tmp_path / "b.yaml"
    path.write_text("gateway: {lissten: 1}\n")
    assert main([*words, "--config", str(path)]) == 2
    assert f"{path}:1:11: gateway.lissten: unknown key" in capsys.readouterr().err
