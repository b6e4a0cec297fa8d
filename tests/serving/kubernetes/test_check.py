"""What `quantgate doctor` says about pods."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.errors import OptionError
from gateway.deployment import read_deployment
from gateway.process import gateway_alone
from gateway.validation import validate
from serving.kubernetes.access import ClusterAccess
from serving.kubernetes.check import check_sources
from tests.fakes.kubernetes.running import running_cluster
from tests.fakes.running import ROOT
from tests.serving.kubernetes.pods import SERVICE, sources


def write(folder: Path, **gateway: Any) -> Path:
    """Write a configuration whose replicas are pods."""
    document = {
        "gateway": gateway,
        "variants": {"int8": {"precision": "int8"}},
        "replicas": [{"variant": "int8", "kubernetes": {"service": SERVICE}}],
        "aliases": {"smol": {"ladder": ["int8"]}},
    }
    path = folder / "quantgate.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


async def test_pods_that_are_found() -> None:
    """They are counted by their state in Kubernetes."""
    async with running_cluster() as cluster:
        access = ClusterAccess(cluster.url, token_file=cluster.token_file)
        (none,) = await check_sources(access, sources())
        assert (none.problem, none.pods) == (None, "none")
        await cluster.add_workload(SERVICE, 2, [(f"10.0.0.{number}", 8000) for number in range(3)], start_seconds=60)
        await cluster.scale(SERVICE, 3)
        (some,) = await check_sources(access, sources())
        assert (some.problem, some.pods) == (None, "2 ready, 1 not_ready")


@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_the_doctor_names_what_a_role_lacks(tmp_path: Path, verb: str) -> None:
    """It is an error, with verb and resource."""
    async with running_cluster() as cluster:
        await cluster.refuse(403, verbs=[verb])
        path = write(tmp_path, kubernetes={"server": cluster.url, "token_file": str(cluster.token_file)})
        (finding,) = [each for each in await doctor(path) if each["subject"] == "pods of int8"]
        assert finding["level"] == "error"
        assert f"{verb} endpointslices of discovery.k8s.io in the namespace default: 403" in finding["what"]


async def doctor(path: Path) -> list[dict[str, Any]]:
    """Run the command."""
    argv = [sys.executable, str(ROOT / "quantgate.py"), "doctor", "--json", str(path)]
    process = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    found: list[dict[str, Any]] = json.loads(out)
    return found


async def test_a_gateway_outside_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server it does not start; for `config check` that is a warning, as the file may be meant for a pod."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = write(tmp_path, listen="127.0.0.1:0", admin="127.0.0.1:0")
    report = validate(path)
    assert (report.errors, report.unservable) == ((), ())
    (warning,) = report.warnings
    assert str(warning).endswith("run the gateway in a pod, or set it, with ca and token_file")
    with pytest.raises(OptionError, match=r"gateway\.kubernetes\.server: is missing"):
        async with gateway_alone(read_deployment(path), path):
            pass


def test_files_that_are_missing(tmp_path: Path) -> None:
    """They are errors at their options."""
    path = write(tmp_path, kubernetes={"server": "https://k:6443", "ca": "ca.pem", "token_file": "token"})
    assert [each.path for each in validate(path).errors] == ["gateway.kubernetes.ca", "gateway.kubernetes.token_file"]
