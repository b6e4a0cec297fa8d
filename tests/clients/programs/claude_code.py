# npm: @anthropic-ai/claude-code@2.1.197
# title: Claude Code
# runs: `claude -p` with `ANTHROPIC_BASE_URL` and `ANTHROPIC_MODEL`
"""Claude Code answers a question, with its tools offered."""

import os
import subprocess
import sys
from pathlib import Path

url, model = os.environ["QUANTGATE_URL"], os.environ["QUANTGATE_MODEL"]
settings = {
    "ANTHROPIC_BASE_URL": url,
    "ANTHROPIC_AUTH_TOKEN": "any",
    "ANTHROPIC_MODEL": model,
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}
program = Path(os.environ["CLIENT_FOLDER"], "node_modules", ".bin", "claude")
done = subprocess.run(
    [program, "-p", "say hello"],
    env={**os.environ, **settings},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
)
if done.returncode or "m1 heard" not in done.stdout:
    sys.exit((done.stdout or done.stderr)[-500:])
