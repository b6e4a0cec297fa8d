# npm: @openai/codex@0.171.0
# title: Codex
# runs: `codex exec` with `wire_api = "responses"`
"""Codex answers a question, with its tools offered."""

import os
import subprocess
import sys
from pathlib import Path

url, model = os.environ["QUANTGATE_URL"], os.environ["QUANTGATE_MODEL"]
home = Path(os.environ["HOME"])
(home / ".codex").mkdir()
(home / ".codex" / "config.toml").write_text(f"""
model = "{model}"
model_provider = "quantgate"
model_context_window = 32768

[model_providers.quantgate]
name = "quantgate"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "QUANTGATE_KEY"
""")
program = Path(os.environ["CLIENT_FOLDER"], "node_modules", ".bin", "codex")
done = subprocess.run(
    [program, "exec", "--skip-git-repo-check", "say hello"],
    env={**os.environ, "QUANTGATE_KEY": "any"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
)
if done.returncode or "heard say hello" not in done.stdout:
    sys.exit((done.stdout or done.stderr)[-500:])
