# pip: aider-chat==0.86.2
# title: aider
# runs: `aider --message` on a file, as `openai/MODEL`
"""Aider asks about a repository of its own."""

import os
import subprocess
import sys
from pathlib import Path

subprocess.run(["git", "init", "--quiet"], check=True)
Path("hello.py").write_text("print('hello')\n")
program = Path(os.environ["CLIENT_FOLDER"], "venv", "bin", "aider")
quiet = ("--yes-always", "--no-show-model-warnings", "--no-check-update", "--no-analytics", "--no-auto-commits")
done = subprocess.run(
    [program, "--model", f"openai/{os.environ['QUANTGATE_MODEL']}", *quiet, "--message", "say hello", "hello.py"],
    env={**os.environ, "OPENAI_API_BASE": f"{os.environ['QUANTGATE_URL']}/v1", "OPENAI_API_KEY": "any"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
)
if done.returncode or "m1 heard" not in done.stdout:
    sys.exit((done.stdout + done.stderr)[-500:])
