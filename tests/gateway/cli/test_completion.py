"""Completion in real shells, each in a terminal of its own."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.cli.completion import SHELLS, script
from quantgate import COMMANDS
from tests.fakes.running import DEADLINE_SECONDS, ROOT

# What a shell runs first: the script, and a prompt that marks where output ends.
INIT = {
    "bash": "source {script}; bind 'set enable-bracketed-paste off'; PS1='READY> '\n",
    "zsh": "fpath=({folder} $fpath); autoload -U compinit; compinit -u -d {folder}/dump; unsetopt zle_bracketed_paste; "
    "PS1='READY> '\n",
}
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][0-9A-B]?|\r|\x1b\][^\x07]*\x07|[\x0e\x0f\x08]")

CASES = [
    ("quantgate resta", "quantgate restart "),
    ("quantgate ps --wat", "quantgate ps --watch "),
    ("quantgate rollout hist", "quantgate rollout history "),
    ("quantgate keys create alice --requests-p", "quantgate keys create alice --requests-per-minute "),
    ("quantgate config check exam", "quantgate config check example.yaml "),
    ("quantgate quantize model --backend gpt", "quantgate quantize model --backend gptqmodel "),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell, under the name that zsh looks for."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).mkdir()
        (folder / shell / "_quantgate").write_text(script(shell))
    return folder


class Terminal:
    """A shell on a pseudo-terminal."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.text = ""

    def type(self, text: str) -> None:
        """Press keys."""
        self.text = ""
        os.write(self._master, text.encode())

    def wait(self, pattern: str) -> str:
        """Read until the screen shows a pattern."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} is not in {self.text!r}"
            self.text += ESCAPES.sub("", os.read(self._master, 65536).decode(errors="replace"))
        return self.text


@contextmanager
def terminal(shell: str, scripts: Path, folder: Path) -> Iterator[Terminal]:
    """Run an interactive shell that has loaded the script."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "HOME": str(folder), "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        START[shell], stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=folder, start_new_session=True
    )
    os.close(slave)
    try:
        screen = Terminal(master)
        screen.type(INIT[shell].format(script=scripts / shell / "_quantgate", folder=scripts / shell))
        screen.wait(r"READY> $")
        yield screen
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize("shell", START)
@pytest.mark.parametrize("typed,completed", CASES)
def test_tab(shell: str, typed: str, completed: str, scripts: Path, tmp_path: Path) -> None:
    """Verbs, subcommands, options, values and files are completed."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "example.yaml").touch()
    with terminal(shell, scripts, tmp_path) as screen:
        screen.type(f"{typed}\t")
        screen.wait(re.escape(completed))


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish(scripts: Path, tmp_path: Path) -> None:
    """The same in fish, which prints its completions on request."""
    (tmp_path / "example.yaml").touch()
    asked = "; echo ---; ".join(f"complete -C {shlex.quote(typed)}" for typed, _ in CASES)
    program = f"source {scripts}/fish/_quantgate; {asked}"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "-N", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    offered = [[line.partition("\t")[0] for line in each.split("\n")] for each in done.stdout.split("---\n")]
    for (_, completed), candidates in zip(CASES, offered, strict=True):
        assert completed.split()[-1] in candidates


def test_the_scripts_know_all_verbs(scripts: Path) -> None:
    """Each of them; the command prints the script."""
    texts = {shell: (scripts / shell / "_quantgate").read_text() for shell in SHELLS}
    assert all(verb in text for verb in COMMANDS for text in texts.values())
    command = [sys.executable, str(ROOT / "quantgate.py"), "completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == texts["bash"]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_a_shell_starts_as_fast(scripts: Path) -> None:
    """Reading the script takes a shell milliseconds: it starts no other program."""
    traced = f"PATH=/nowhere; . {scripts}/bash/_quantgate && echo loaded"
    done = subprocess.run(["/bin/bash", "-c", traced], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("loaded\n", "")
