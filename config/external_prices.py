"""litellm's table of prices, read from its file: importing litellm takes seconds, and only a gateway needs it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "litellm"
TABLE = "model_prices_and_context_window_backup.json"
PRICES = ("input_cost_per_token", "output_cost_per_token")


def litellm_directory() -> Path | None:
    """Where litellm is installed; None if it is not."""
    found = find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent


def is_priced(model: str, directory: Path) -> bool:
    """Return whether litellm knows the price of a model, by its name with or without the provider."""
    try:
        table = json.loads((directory / TABLE).read_bytes())
    except (OSError, ValueError):
        return True  # another version of litellm keeps it elsewhere
    entries: list[Any] = [table.get(name) for name in (model, model.partition("/")[2])]
    return any(isinstance(entry, dict) and all(price in entry for price in PRICES) for entry in entries)
