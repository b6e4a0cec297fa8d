"""What makes two launches the same: whether a running replica is still the one that is wanted."""

import hashlib
import json

from serving.replica import Launch

# A replacement runs beside what it replaces, so it needs another name; names alternate, so there are never more.
_SUCCESSOR = "b"


def slot_of(replica_id: str) -> str:
    """The name that the configuration gives a replica, whichever of its two names it runs under."""
    return replica_id.removesuffix(_SUCCESSOR)


def successor_id(replica_id: str) -> str:
    """The name for what replaces a running replica. Planned names end in a digit, so the suffix is never theirs."""
    slot = slot_of(replica_id)
    return slot if replica_id != slot else slot + _SUCCESSOR


def launch_digest(launch: Launch) -> str:
    """Digest everything that a server is started with, its variant's content included, but for its own name.

    Not in it: the environment that we happened to be started in, and how patient we are with the replica.
    """
    settings = launch.settings.model_dump(
        mode="json",
        exclude={"count", "gpus", "port", "api_key", "start_timeout_seconds", "drain_seconds", "hang_seconds"}
        # What it comes to is the parser.
        | {"tool_calling"},
    )
    key, manifest = launch.settings.api_key, launch.variant.manifest
    template = launch.thinking.template
    fields: list[object] = [
        slot_of(launch.replica_id),
        settings,
        key.get_secret_value() if key else None,
        list(launch.gpus),
        launch.port,
        launch.engine,
        launch.thinking.parser,
        launch.thinking.enable_thinking,
        launch.tool_parser,
        str(template) if template else None,
        [launch.variant.name, str(launch.variant.path), manifest.to_json() if manifest else None],
    ]
    if launch.media_domains:
        fields.append(sorted(launch.media_domains))
    if launch.variant.loras:
        fields.append([[lora.name, str(lora.path), lora.rank] for lora in launch.variant.loras])
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
