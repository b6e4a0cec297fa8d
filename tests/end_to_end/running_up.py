"""`quantgate up` with the demo's variants; its replicas survive when it is killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.end_to_end.running_demo import Running, listens, start

VARIANTS = ("smol-bf16", "smol-int8", "smol-int4")
# An alias with a ladder of one rung: no answer of it depends on load.
ALONE, ALONE_VARIANT = "alone", "smol-bf16"
ALL_READY_SECONDS = 400


@dataclass(slots=True)
class Up:
    """A configuration file, and the process that serves it at the moment."""

    running: Running
    config: Path
    home: Path

    @property
    def addresses(self) -> tuple[str, str]:
        """The URLs of the client port and of the admin port."""
        return listens(self.running)

    def replicas(self) -> list[dict[str, Any]]:
        """All replicas as the admin port lists them; none before the gateway listens."""
        if "listening on" not in self.running.stderr:
            return []
        listed: list[dict[str, Any]] = httpx.get(f"{self.addresses[1]}/admin/replicas").json()
        return listed

    def all_ready(self) -> bool:
        """Whether there is one replica of each variant, and all are ready."""
        states = [replica["state"] for replica in self.replicas()]
        return states == ["ready"] * len(VARIANTS)


def start_up(config: Path, home: Path, name: str) -> Running:
    """Start `quantgate up`; its output goes to a folder of this name beside the configuration."""
    return start(config.parent / name, home, "up", str(config))


def write_configuration(home: Path, folder: Path) -> Path:
    """Write the demo's configuration with ports of its own, and a best replica whose answers can be compared.

    Without prefix caching no answer depends on an earlier one; the tool parser is for calls with tools.
    """
    document = yaml.safe_load((home / "quantgate.yaml").read_text())
    document["gateway"] |= {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "state": f"sqlite:///{folder}/state.db"}
    (replica,) = [replica for replica in document["replicas"] if replica["variant"] == ALONE_VARIANT]
    replica["prefix_caching"] = False
    replica["args"] += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    document["aliases"][ALONE] = {"ladder": [ALONE_VARIANT]}
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(document))
    return config
