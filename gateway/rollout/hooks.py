"""Hooks: commands and URLs that run on transitions, for a limited time; a failed hook does not stop a rollout."""

import asyncio
import logging
import tempfile
from collections.abc import Iterable

import httpx
import msgspec

from gateway.rollout.plan import Hook
from serving.state.rollout_records import LogEntry

log = logging.getLogger(__name__)

MAX_ERROR_BYTES = 500


def payload(entry: LogEntry) -> bytes:
    """Return the input of a hook: the log entry, as JSON."""
    figures = msgspec.Raw(entry.figures.encode())
    payload = {
        "alias": entry.alias,
        "rollout": entry.rollout,
        "event": entry.event,
        "phase": entry.phase,
        "why": entry.why,
        "by": entry.by,
        "at": entry.at,
        "figures": figures,
    }
    return msgspec.json.encode(payload)


async def run_hooks(hooks: Iterable[Hook], entry: LogEntry) -> tuple[str, ...]:
    """Run the hooks of an entry, one after the other, and return what went wrong."""
    problems = []
    for hook in hooks:
        if hook.events and entry.event not in hook.events:
            continue
        try:
            async with asyncio.timeout(hook.timeout_seconds):
                await (_post(hook.url, payload(entry)) if hook.url else _run(hook.command or (), payload(entry)))
        except TimeoutError:
            problems.append(f"{_name(hook)}: not done within {hook.timeout_seconds:g} s")
        except (OSError, httpx.HTTPError) as error:
            problems.append(f"{_name(hook)}: {error or type(error).__name__}")
    return tuple(problems)


async def _run(command: tuple[str, ...], body: bytes) -> None:
    # A file, not a pipe: a command may end without reading its stdin.
    with tempfile.TemporaryFile() as stdin:
        stdin.write(body)
        stdin.seek(0)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        text = errors.decode(errors="replace").strip()[-MAX_ERROR_BYTES:]
        raise OSError(f"exit code {process.returncode}: {text}")


async def _post(url: str, body: bytes) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        reply = await client.post(url, content=body, headers={"content-type": "application/json"})
        reply.raise_for_status()


def _name(hook: Hook) -> str:
    return hook.url or (hook.command or ("",))[0]
