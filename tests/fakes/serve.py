"""`quantgate serve` or `up` with the fake in vLLM's place: `python -m tests.fakes.serve CONFIG HOME [up]`."""

import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from gateway.deployment import read_deployment
from gateway.process import everything
from serving.app import read_wanted, replicas_alone
from serving.foreground import run_until_signal
from serving.registry import Registry
from tests.serving.supervised import fake_machine


def main(config: Path, home: Path, command: str = "serve") -> int:
    """Run until a signal, as the verb does; its exit code."""

    def start() -> AbstractAsyncContextManager[object]:
        if command == "up":
            return everything(read_deployment(config), fake_machine(home), Registry(), home, config)
        return replicas_alone(read_wanted(config), fake_machine(home), Registry(), home, config)

    return run_until_signal(start)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
