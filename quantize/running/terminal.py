"""What the command lines of this package share: exit codes, and errors in one line, usage errors too."""

import sys
from collections.abc import Callable
from typing import NoReturn

from config.command_line import CommandParser
from config.errors import CapacityError, ConfigError, ManifestError
from quantize.errors import CalibrationError, QuantizeError, RecipeFileError
from quantize.running.interrupt import Terminated, terminable

DONE, FAILED, USAGE, GATE = 0, 1, 2, 3
_INTERRUPTED, _TERMINATED = 130, 143


class OneLineParser(CommandParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run_command(program: str, run: Callable[[], int]) -> int:
    """Run a verb and return its exit code; an expected error becomes a line on stderr."""
    try:
        with terminable():
            return run()
    except (CalibrationError, RecipeFileError) as error:
        print_stderr("\n".join(f"{program}: {problem}" for problem in error.problems))
        return error.exit_code
    except QuantizeError as error:
        print_stderr(f"{program}: {error}")
        return error.exit_code
    except (CapacityError, ManifestError, OSError) as error:
        print_stderr(f"{program}: {error}")
        return FAILED
    except ConfigError as error:
        print_stderr(f"{program}: {error}")
        return USAGE
    except KeyboardInterrupt:
        print_stderr(f"{program}: interrupted")
        return _INTERRUPTED
    except Terminated:
        print_stderr(f"{program}: terminated")
        return _TERMINATED


def print_stderr(line: str) -> None:
    """Say something that is not data: on stderr, at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
