"""Convert a GGUF file to a bf16 safetensors model directory: `python -m quantize.gguf FILE OUT_DIR`."""

import sys
from collections.abc import Mapping
from pathlib import Path

from config.load import process_environment
from config.manifest import sha256_of
from quantize.errors import QuantizeError, RecipeError, TargetError
from quantize.running.interrupt import Terminated, terminable
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ, run_worker
from quantize.variants.store import require_space, staging, work_folder

_MAGIC = b"GGUF"
# 4 bits per weight become 16.
_GROWTH = 4


def unpack_gguf(file: Path, out: Path, *, environ: Mapping[str, str], progress: ProgressReporter) -> None:
    """Dequantize a GGUF file into a model directory, which appears complete or not at all.

    RecipeError if the file is no GGUF file or not supported by transformers, TargetError if `out` is not empty.
    """
    _require_gguf(file)
    if out.exists() and any(out.iterdir()):
        raise TargetError(f"{out}: exists and is not empty; choose another directory or remove it")
    require_space({out: (file.stat().st_size * _GROWTH, "choose another directory")})
    with staging(out) as staged, progress.stage(f"unpack {file.name}", "tensors") as advance:
        job = {"file": str(file.resolve()), "sha256": sha256_of(file), "into": str(staged)}
        run_worker("quantize.gguf_weights", job, folder=work_folder(staged), environ=environ, on_progress=advance)


def _require_gguf(file: Path) -> None:
    if not file.is_file():
        raise RecipeError(f"{file}: no such file")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise RecipeError(f"{file}: not a GGUF file")


def main(argv: list[str]) -> int:
    """`python -m quantize.gguf FILE OUT_DIR`."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m quantize.gguf FILE OUT_DIR\n")
        return 2
    environ = child_environ(process_environment())
    try:
        with terminable():
            unpack_gguf(Path(argv[0]), Path(argv[1]), environ=environ, progress=ProgressReporter(sys.stderr))
    except QuantizeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
