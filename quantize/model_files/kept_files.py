"""Which files of a base a variant takes over byte for byte: tokenizer, chat template, processor, code of its own."""

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Patterns of `Path.glob`. Tokenizers: tokenizers, sentencepiece, tekken (Mistral), tiktoken (Qwen 1, Kimi).
KEPT_PATTERNS = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
)
# One of them says how text becomes tokens.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
# Files whose `auto_map` names classes as "module.Class", with "repository--" before it where the code is elsewhere.
_NAMING_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def kept_files(directory: Path) -> list[Path]:
    """List the files that a variant takes over byte for byte, sorted."""
    matched = {path for pattern in KEPT_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(matched | code_files(directory))


def code_files(directory: Path) -> set[Path]:
    """Find the Python files that `auto_map` names, and those that they import from the same directory."""
    found: set[Path] = set()
    waiting = {module for name in _NAMING_CODE for module in _mapped_modules(_read_object(directory / name))}
    while waiting:
        path = directory / f"{waiting.pop()}.py"
        if path.is_file() and path not in found:
            found.add(path)
            waiting |= set(_relative_imports(path.read_text(encoding="utf-8", errors="replace")))
    return found


def _mapped_modules(config: Mapping[str, Any]) -> Iterator[str]:
    auto_map = config.get("auto_map")
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        # A tokenizer has a list: the slow and the fast class, either of them null.
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and "--" not in name:
                yield name.partition(".")[0]


def _relative_imports(source: str) -> Iterator[str]:
    """Yield the modules of `from .module import ...`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
