"""Identity of launches: whether a running replica still is the configured one."""

import hashlib
import json

from serving.replica import Launch

# A successor runs beside the old replica, so it needs another id; two ids alternate.
_SUCCESSOR = "b"


def slot_of(replica_id: str) -> str:
    """The id that the configuration gives a replica, whichever of its two ids it runs under."""
    return replica_id.removesuffix(_SUCCESSOR)


def successor_id(replica_id: str) -> str:
    """The id of the successor of a running replica. Planned ids end in a digit, so none has the suffix."""
    slot = slot_of(replica_id)
    return slot if replica_id != slot else slot + _SUCCESSOR


def launch_digest(launch: Launch) -> str:
    """Return a digest of what a server is started with, its variant's manifest included, but not its own id.

    The supervisor's environment and time limits are not part of it.
    """
    settings = launch.settings.model_dump(
        mode="json",
        exclude={"count", "gpus", "port", "api_key", "start_timeout_seconds", "drain_seconds", "hang_seconds"}
        # Never of a server that quantgate starts; what `tool_calling` comes to is the parser.
        | {"kubernetes", "tool_calling"},
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
