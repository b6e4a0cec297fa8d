"""When a change of each option takes effect: at a reload, or at the next start."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from config.schema import Settings

Effect = Literal["reload", "start"]

_REQUESTS = "from the next request on"
# By option, or by the table that it is in: whether a reload applies a change, and how. It is in gateway/README.md, too.
EFFECTS: Mapping[str, tuple[Effect, str]] = MappingProxyType(
    {
        "gateway.listen": ("start", ""),
        "gateway.admin": ("start", ""),
        "gateway.admin_key": ("start", ""),
        "gateway.tls": ("reload", "for new connections, also when a file changes; added or removed: at the next start"),
        "gateway.state": ("start", ""),
        "gateway.keys": ("reload", f"{_REQUESTS}; removed, or from or to `database`: at the next start"),
        "gateway.allowed_hosts": ("start", ""),
        "gateway.cors": ("reload", _REQUESTS),
        "gateway.media_domains": ("reload", f"{_REQUESTS}; own replicas are replaced"),
        "gateway.access_log": ("start", ""),
        "gateway.per_key_metrics": ("start", ""),
        "gateway.usage_days": ("start", ""),
        "gateway.tracing": ("start", ""),
        "gateway.kubernetes": ("start", ""),
        "gateway.limits": ("reload", _REQUESTS),
        "gateway.queue": ("reload", f"{_REQUESTS}; requests that wait already stay"),
        "gateway.retries": ("reload", _REQUESTS),
        "gateway.memory_bytes": ("reload", _REQUESTS),
        "gateway.drain_seconds": ("reload", "when the gateway stops"),
        "serving": ("start", ""),
        "variants": (
            "reload",
            "own replicas of a changed variant are replaced; the first external model: at the next start",
        ),
        "replicas": ("reload", "new ones are started, changed ones replaced, missing ones drained and stopped"),
        "replicas.kubernetes": (
            "reload",
            "ready pods stay; those of another variant or port are verified before they change",
        ),
        "replicas.start_timeout_seconds": ("reload", "when the replica starts again"),
        "replicas.drain_seconds": ("reload", "when the replica stops"),
        "replicas.hang_seconds": ("reload", "when the replica starts again"),
        "aliases": ("reload", f"{_REQUESTS}, once every alias has a ready replica"),
    }
)


def effect(option: str) -> tuple[Effect, str] | None:
    """Return when a change of an option such as `gateway.limits.depth` takes effect, and how; None if unknown."""
    while option not in EFFECTS and "." in option:
        option = option.rpartition(".")[0]
    return EFFECTS.get(option)


def pending_options(started: Settings, now: Settings) -> list[str]:
    """Return the options that have changed since the start and take effect at the next one."""
    return [
        option
        for option, (when, _) in EFFECTS.items()
        if when == "start" and _value(started, option) != _value(now, option)
    ]


def _value(settings: Settings, option: str) -> object:
    value: object = settings
    for name in option.split("."):
        value = getattr(value, name)
    return value
