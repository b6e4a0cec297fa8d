"""The quant log of a variant: bits, loss and damping of every quantized module, as JSON beside the weights."""

from pathlib import Path

# Not modules.json: vLLM takes that name for a file of sentence-transformers, and does not start.
QUANT_LOG = "quant_log.json"
# Its name in variants that older versions wrote.
OLD_QUANT_LOG = "solved.json"


def quant_log_file(variant: Path) -> Path:
    """Return the path of a variant's quant log; the file is missing where another program made the variant."""
    old = variant / OLD_QUANT_LOG
    return old if old.is_file() else variant / QUANT_LOG
