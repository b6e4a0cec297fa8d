"""Builds an image without a container runtime: each stage is an overlay on the file system of this machine.

`RUN` is run in a chroot, `COPY` takes the files of the build context that .dockerignore lets through. The base image is
this machine, with the Python of the tests; so what an image brings is tested, not what its base image has. All mounts
are in a mount namespace of their own, which ends with its one process.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.dockerfile import Instruction, Stage, mount_options
from tests.fakes.running import ROOT

RUN_SECONDS = 300
PLACE = "/mnt"
# A file system of its own for all layers, and a process that holds the namespace until its stdin is closed.
HOLD = f"mount -t tmpfs -o mode=0755 tmpfs {PLACE} && echo ready && exec cat"


class NotPermitted(Exception):
    """This process may not mount file systems."""


@contextmanager
def image_roots(context: Path) -> Iterator["ImageRoots"]:
    """A namespace for the root file systems of images; NotPermitted if the kernel refuses it.

    `context` is the directory that holds the build context.
    """
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stderr
        if holder.stdout.readline() != b"ready\n":
            raise NotPermitted(holder.stderr.read().decode())
        try:
            yield ImageRoots(holder.pid, context)
        finally:
            holder.stdin.close()


@dataclass(slots=True)
class ImageRoots:
    """The root file systems of the stages that were built, in the namespace of one process."""

    holder: int
    context: Path
    _built: dict[str, "ImageRoot"] = field(default_factory=dict)

    def build(self, stages: Mapping[str, Stage], name: str) -> "ImageRoot":
        """Build a stage, and first those that it is made from and copies from."""
        if name in self._built:
            return self._built[name]
        stage = stages[name]
        parent = self.build(stages, stage.parent.name) if stage.parent else None
        root = self.layer(name, parent)
        for instruction in stage.own:
            sources = {flag: self.build(stages, flag) for flag in _stages_of(instruction)}
            root.apply(stage, instruction, sources)
        self._built[name] = root
        return root

    def layer(self, name: str, parent: "ImageRoot | None") -> "ImageRoot":
        """A root file system with the directories of its parent below; without one, this machine's."""
        layer = f"{PLACE}/{name}"
        lower = f"{parent.upper}:{parent.lower}" if parent else "/"
        work_directory = parent.work_directory if parent else "/"
        root = ImageRoot(self.holder, self.context, f"{layer}/root", f"{layer}/upper", lower, work_directory)
        root.outside("mkdir", "-p", root.directory, root.upper, f"{layer}/work")
        options = f"lowerdir={lower},upperdir={root.upper},workdir={layer}/work"
        root.outside("mount", "-t", "overlay", "overlay", "-o", options, root.directory)
        for directory in ("proc", "dev"):
            root.outside("mount", "--rbind", f"/{directory}", f"{root.directory}/{directory}")
        root.add_python()
        return root


@dataclass(slots=True)
class ImageRoot:
    """The root file system of one stage."""

    holder: int
    context: Path
    directory: str
    upper: str
    lower: str
    work_directory: str = "/"

    def path(self, inside: str) -> Path:
        """A path of the image, as this process reaches it."""
        return Path(f"/proc/{self.holder}/root{self.directory}{inside}")

    def apply(self, stage: Stage, instruction: Instruction, sources: Mapping[str, "ImageRoot"]) -> None:
        """Do what an instruction does to the file system."""
        match instruction.name:
            case "WORKDIR":
                self.work_directory = instruction.value
                self.path(instruction.value).mkdir(parents=True, exist_ok=True)
            case "COPY":
                origin = sources.get(instruction.flag("from") or "")
                *names, target = instruction.words
                self._copy(names, target, origin)
            case "RUN":
                self._run(stage, instruction, sources)

    def command(
        self, words: Sequence[str], environment: Mapping[str, str], user: str = "0:0", work_directory: str = "/"
    ) -> list[str]:
        """The command line that runs words in this root, as a user, with this environment alone."""
        # The library of the tests' Python may be where this user can't read it (`add_python`).
        variables = [f"{key}={value}" for key, value in {"LD_LIBRARY_PATH": "/opt/python/lib", **environment}.items()]
        enter = ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt", "chroot", f"--userspec={user}", "--groups="]
        cd = ["sh", "-c", 'cd "$0" && exec "$@"', work_directory]
        return [*enter, self.directory, "env", "-i", *variables, *cd, *words]

    def add_python(self) -> None:
        """Bring the Python of the tests to where the official image has it, also if it is in somebody's home."""
        home = "/opt/python"
        self.outside("mkdir", "-p", f"{self.directory}{home}")
        self.outside("mount", "--bind", sys.base_prefix, f"{self.directory}{home}")
        # Not a link: Python would look for its library beside that.
        script = self.path("/usr/local/bin/python3")
        script.unlink(missing_ok=True)
        script.write_text(f'#!/bin/sh\nexec {home}/bin/python3.{sys.version_info.minor} "$@"\n')
        script.chmod(0o755)

    def make_read_only(self, volumes: Sequence[str]) -> None:
        """Remount the root read-only, with empty file systems of the user 10001 at `volumes`, and one at /tmp."""
        for volume in volumes:
            options = "uid=10001,gid=10001,mode=0750"
            self.outside("mount", "-t", "tmpfs", "-o", options, "tmpfs", f"{self.directory}{volume}")
        self.outside("mount", "-t", "tmpfs", "tmpfs", f"{self.directory}/tmp")
        self.outside("mount", "-o", "remount,ro", self.directory)

    def outside(self, *words: str) -> None:
        """Run a command in the namespace, but not in this root; AssertionError if it fails."""
        _succeed(["nsenter", f"--mount=/proc/{self.holder}/ns/mnt", *words])

    def _copy(self, names: Sequence[str], target: str, origin: "ImageRoot | None") -> None:
        """As COPY: files go into a directory that ends in a slash, directories give their content."""
        destination = self.path(str(Path(self.work_directory, target)))
        for name in names:
            source = origin.path(name) if origin else self.context / name
            assert source.exists(), f"COPY {name}: not in {'the stage' if origin else 'the build context'}"
            if source.is_dir():
                shutil.copytree(source, destination, symlinks=True, dirs_exist_ok=True)
            else:
                file = destination / source.name if target.endswith("/") else destination
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, file)

    def _run(self, stage: Stage, instruction: Instruction, sources: Mapping[str, "ImageRoot"]) -> None:
        mounts = [mount_options(flag) for flag in instruction.flags if flag.startswith("--mount=")]
        binds = [(sources[each["from"]], each) for each in mounts if each["type"] == "bind"]
        for origin, options in binds:
            target = self.directory + options["target"]
            self.outside("mkdir", "-p", target)
            self.outside("mount", "--bind", origin.directory + options["source"], target)
        # How packages are found is the host's business, as with the arguments of a proxy for a real build.
        pip = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        environment = {**pip, "HOME": "/root", **stage.pairs("ENV"), **stage.pairs("ARG")}
        words = ["sh", "-c", instruction.value]
        _succeed(self.command(words, environment, work_directory=self.work_directory))
        for _, options in binds:
            self.outside("umount", self.directory + options["target"])


def build_context(target: Path) -> Path:
    """Copy what a build is sent: the files that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (line[1:] for line in lines if line.startswith("!")):
        source = ROOT / name
        assert source.exists(), f".dockerignore: {name} does not exist"
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "screenshots")
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy2(source, target / name)
    return target


def _stages_of(instruction: Instruction) -> list[str]:
    mounted = [mount_options(flag).get("from") for flag in instruction.flags if flag.startswith("--mount=")]
    return [name for name in (instruction.flag("from"), *mounted) if name]


def _succeed(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
