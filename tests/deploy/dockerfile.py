"""Reads deploy/docker/Dockerfile: stages, and what each image runs."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tests.fakes.running import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, its flags (`--from=...`), and the rest of its line."""

    name: str
    flags: tuple[str, ...]
    value: str

    @property
    def words(self) -> list[str]:
        """The value as words; that of an exec form is its list."""
        return list(json.loads(self.value)) if self.value.startswith("[") else shlex.split(self.value)

    def flag(self, name: str) -> str | None:
        """The value of a flag; None without it."""
        return next((flag.split("=", 1)[1] for flag in self.flags if flag.startswith(f"--{name}=")), None)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its instructions, after those of the stage that it is made from; None if that is an image."""

    name: str
    image: str
    parent: "Stage | None"
    own: tuple[Instruction, ...]

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """All instructions, from the base image on."""
        return (*(self.parent.instructions if self.parent else ()), *self.own)

    def last(self, name: str) -> Instruction:
        """The instruction of a kind that is in force; AssertionError without one."""
        found = [each for each in self.instructions if each.name == name]
        assert found, f"{self.name} has no {name}"
        return found[-1]

    def pairs(self, name: str) -> dict[str, str]:
        """The pairs of all instructions of a kind (ENV, LABEL, ARG), with references to earlier ones replaced."""
        found: dict[str, str] = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin"} if name == "ENV" else {}
        for each in self.instructions:
            if each.name == name:
                found |= {key: Template(value).safe_substitute(found) for key, value in _pairs(each)}
        return found

    @property
    def health_command(self) -> list[str]:
        """What the health check runs; empty for an image without one."""
        value = self.last("HEALTHCHECK").value
        return [] if value == "NONE" else list(json.loads(value.removeprefix("CMD ")))


def read_stages(path: Path = DOCKERFILE) -> dict[str, Stage]:
    """Parse a Dockerfile; AssertionError for a base image that has no default."""
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    own: list[Instruction] = []
    base, name = "", ""
    for each in [*_instructions(path.read_text()), Instruction("FROM", (), "end AS end")]:
        if each.name == "FROM":
            if name:
                stages[name] = Stage(name, base, stages.get(base), tuple(own))
            elif own:
                arguments |= {key: value for argument in own for key, value in _pairs(argument)}
            source, _, name = each.value.partition(" AS ")
            base, own = Template(source).substitute(arguments), []
        else:
            own.append(each)
    return stages


def _pairs(instruction: Instruction) -> Iterator[tuple[str, str]]:
    for word in shlex.split(instruction.value):
        key, _, value = word.partition("=")
        yield key, value


def _instructions(text: str) -> Iterator[Instruction]:
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            flags = []
            while flag := re.match(r"\s*(--[\w-]+=\S+)\s+", rest):
                flags.append(flag[1])
                rest = rest[flag.end() :]
            yield Instruction(name, tuple(flags), re.sub(r"\s+", " ", rest.strip()))


def mount_options(flag: str) -> Mapping[str, str]:
    """The options of `--mount=`; those without a value are empty."""
    return {key: value for key, _, value in (part.partition("=") for part in flag.split("=", 1)[1].split(","))}
