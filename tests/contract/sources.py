"""The Python sources of a vLLM version: those that are installed, or those in a wheel; read, never imported."""

import ast
import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path


class Sources:
    """Source files by their path below `vllm/`, and what their syntax trees define."""

    def __init__(self, version: str, paths: tuple[str, ...], read: Callable[[str], str]) -> None:
        self.version = version
        self._paths = paths
        self._read = read
        self._trees: dict[str, ast.Module] = {}

    def matching(self, pattern: str) -> Iterator[str]:
        """Yield the paths that match a shell pattern; `*` also matches slashes."""
        return (path for path in self._paths if fnmatch(path, pattern))

    def text(self, path: str) -> str:
        """Return one file."""
        return self._read(path)

    def strings(self, pattern: str) -> set[str]:
        """Return every string literal of the files that match a pattern."""
        nodes = (node for path in self.matching(pattern) for node in ast.walk(self._tree(path)))
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    def names(self, pattern: str) -> set[str]:
        """Return what the files that match a pattern define or import, methods as `Class.method`."""
        return {name for path in self.matching(pattern) for name in _names(self._tree(path).body)}

    def fields(self, class_name: str) -> set[str]:
        """Return the annotated fields of a class and of its bases."""
        found, wanted = set(), [class_name]
        while wanted:
            for node in self._classes.get(wanted.pop(), ()):
                found |= {each.target.id for each in node.body if _is_field(each)}  # type: ignore[attr-defined]
                wanted += [base.id for base in node.bases if isinstance(base, ast.Name)]
        return found

    @cached_property
    def _classes(self) -> dict[str, list[ast.ClassDef]]:
        classes: dict[str, list[ast.ClassDef]] = {}
        for pattern in ("entrypoints/*.py", "engine/arg_utils.py", "config/cache.py"):
            for path in self.matching(pattern):
                for node in self._tree(path).body:
                    if isinstance(node, ast.ClassDef):
                        classes.setdefault(node.name, []).append(node)
        return classes

    def _tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            self._trees[path] = ast.parse(self.text(path))
        return self._trees[path]


class NoSources(Exception):
    """There is no vLLM to read."""


def installed_sources() -> Sources:
    """Read the vLLM of this environment; NoSources without one."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise NoSources("vllm is not installed")
    folder = Path(spec.origin).parent
    paths = tuple(str(path.relative_to(folder)) for path in sorted(folder.rglob("*.py")))
    version = ast.literal_eval(_assigned((folder / "_version.py").read_text(), "version"))
    return Sources(str(version), paths, lambda path: (folder / path).read_text(encoding="utf-8"))


def wheel_sources(wheel: Path) -> Sources:
    """Read a wheel file without installing it."""
    archive = zipfile.ZipFile(wheel)
    names = (name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py"))
    paths = tuple(sorted(name.removeprefix("vllm/") for name in names))
    return Sources(wheel.name.split("-")[1], paths, lambda path: archive.read(f"vllm/{path}").decode())


def _assigned(text: str, name: str) -> ast.expr:
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        if any(name in _targets(target) for target in node.targets):
            return node.value
    raise NoSources(f"vllm has no {name} in _version.py")


def _targets(node: ast.expr) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name
            case ast.ClassDef():
                yield node.name
                yield from (f"{node.name}.{name}" for name in _names(node.body))
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name) for alias in node.names)
            case ast.Assign():
                yield from (name for target in node.targets for name in _targets(target))
            case ast.AnnAssign():
                yield from _targets(node.target)
            case ast.If() | ast.Try():
                yield from _names(node.body)
                yield from _names(node.orelse)
