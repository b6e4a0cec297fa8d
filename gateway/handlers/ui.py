"""`/ui`: the files of the status page. They hold no data, so they need no key; the page asks for it."""

from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import FastAPI, HTTPException
from fastapi.responses import RedirectResponse, Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Nothing from elsewhere is loaded, sent or framed; no script or style in the page itself.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def add_ui(app: FastAPI) -> None:
    """Add the files to the app of the admin port."""
    files = _files_in(resources.files("gateway") / "ui", "")

    @app.get("/ui", include_in_schema=False)
    async def folder() -> RedirectResponse:
        return RedirectResponse("ui/", headers=HEADERS)

    @app.get("/ui/{path:path}", include_in_schema=False)
    async def file(path: str) -> Response:
        found = files.get(path or "index.html")
        if found is None:
            raise HTTPException(404, "no such file", headers=HEADERS)
        suffix = found.name[found.name.rindex(".") :]
        return Response(found.read_bytes(), headers={**HEADERS, "content-type": TYPES[suffix]})


def _files_in(folder: Traversable, prefix: str) -> dict[str, Traversable]:
    """The files of a folder that a browser loads, by path."""
    found: dict[str, Traversable] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _files_in(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(TYPES)):
            found[f"{prefix}{entry.name}"] = entry
    return found
