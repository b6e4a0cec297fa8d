"""What to do with a gateway that has just started."""

import json
import shlex
from pathlib import Path

from config.schema import Settings
from gateway.app import Addresses, url_of
from gateway.cli.admin_client import reachable


def next_steps(settings: Settings, addresses: Addresses, config: Path, *, keys: bool) -> str:
    """Return the lines that `quantgate up` prints: where it answers, a first request, and where to look.

    `keys`: requests need one.
    """
    client, admin = reachable(addresses.client), reachable(addresses.admin)
    file = shlex.quote(str(config))
    page = f"http://{admin}/ui"
    # The configuration does not say which port was free.
    where = f" --admin {admin}" if settings.gateway.admin.endswith(":0") else ""
    steps = [
        (page, "what runs, live" + (" (needs gateway.admin_key)" if settings.gateway.admin_key else "")),
        (f"quantgate top --config {file}{where}", "the same in a terminal"),
        (f"quantgate ps {file}", "replicas, while they start"),
    ]
    width = max(len(step) for step, _ in steps)
    url, tls = url_of(settings.gateway, client), settings.gateway.tls
    options = f"--cacert {shlex.quote(str(config.parent / tls.certificate))} " if tls else ""
    lines = [f"quantgate answers on {url}, its admin port is http://{admin}. Next steps:"]
    lines += [f"  {step:{width}}  # {purpose}" for step, purpose in steps]
    model = next(iter((*settings.aliases, *settings.variants)), None)
    if model is not None:
        lines.insert(1, "  " + _curl(options + url, model, keys=keys))
    return "\n".join(lines)


def _curl(target: str, model: str, *, keys: bool) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "authorization: Bearer $QUANTGATE_KEY"' if keys else ""
    return f"curl {target}/v1/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(body)}"
