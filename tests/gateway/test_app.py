"""The composition root: replicas that the process starts, and the gateway in front of them."""

from pathlib import Path

import pytest

from config.schema import Settings
from config.variant import read_variants
from gateway.app import live_config_for
from gateway.deployment import Deployment, read_deployment
from gateway.keys import KeyFile, Keys
from gateway.keys.issuing import create_key
from gateway.process import everything
from serving.registry import Registry
from tests.config.sealed import seal
from tests.fakes.running import group_members
from tests.gateway.fleet import HELLO, clients
from tests.serving.supervised import fake_machine, model_directory, noted_session

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_everything_on_one_machine(tmp_path: Path) -> None:
    """A replica is started and answers, also a request from before it is ready; it is gone when the block ends."""
    own = {"variant": "own", "drain_seconds": 5}
    settings = Settings.model_validate(
        {
            "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"},
            "variants": {"own": {"path": str(model_directory(tmp_path / "own"))}},
            "replicas": [own],
            "aliases": {"smol": {"ladder": ["own"]}},
        }
    )
    deployment = Deployment(settings, read_variants(settings.variants, tmp_path), Keys())
    registry = Registry()
    async with (
        everything(deployment, fake_machine(tmp_path), registry, tmp_path) as addresses,
        clients(addresses) as (client, admin),
    ):
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.status_code, answer.headers["x-quantgate-replica"]) == (200, "own-1")
        assert answer.json()["model"] == "smol"
        assert (await admin.get("/readyz")).json() == {"aliases": {"smol": ["own"]}}
        session = noted_session(tmp_path)
        assert group_members(session)
    assert not group_members(session)
    assert [status.state for status in registry.snapshot()] == ["stopped"]


async def test_access_log_goes_to_the_given_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a stream of its own the access log has a line per request there, and nothing on stdout or stderr."""
    settings = Settings.model_validate(
        {
            "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"},
            "variants": {"own": {"path": str(model_directory(tmp_path / "own"))}},
            "replicas": [{"variant": "own"}],
        }
    )
    deployment = Deployment(settings, read_variants(settings.variants, tmp_path), Keys())
    with (tmp_path / "access.log").open("ab") as stream:
        async with (
            everything(deployment, fake_machine(tmp_path), Registry(), tmp_path, access_log_stream=stream) as addresses,
            clients(addresses) as (client, _),
        ):
            for _ in range(2):
                answer = await client.post("/v1/chat/completions", json={**HELLO, "model": "own"})
                assert answer.status_code == 200
    lines = (tmp_path / "access.log").read_text().splitlines()
    assert [line.split()[0][:3] for line in lines] == ["ts=", "ts="]
    assert answer.headers["x-request-id"] in lines[1]
    out, err = capfd.readouterr()
    assert "request_id=" not in out + err


async def test_files_beside_the_configuration(tmp_path: Path) -> None:
    """Paths of variants and keys are relative to the configuration."""
    model_directory(tmp_path / "models" / "own")
    key = create_key(KeyFile(tmp_path / "keys.yaml"), "alice")
    path = tmp_path / "quantgate.yaml"
    path.write_text("gateway: {keys: keys.yaml}\nvariants: {own: {path: models/own}}\n")
    deployment = read_deployment(path)
    assert deployment.keys.authenticate({b"x-api-key": key.encode()}, now_seconds=0).name == "alice"
    assert deployment.variants["own"].path == tmp_path / "models" / "own"
    assert deployment.variants["own"].precision == "bf16"


async def test_variants_excluded_by_a_verdict_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each configuration logs rungs that are never chosen, and aliases that nobody can answer."""
    model_directory(tmp_path / "own")
    (tmp_path / "bad").mkdir()
    seal(tmp_path / "bad", 4, verdict="fail")
    path = tmp_path / "quantgate.yaml"
    variants = "variants: {own: {path: own}, bad: {path: bad}}\n"
    path.write_text(f"{variants}aliases: {{smol: {{ladder: [own, bad]}}, lone: {{ladder: [bad]}}}}\n")
    live_config_for(read_deployment(path))
    why = "its verdict is fail (an alias can take it: admit_failed)"
    assert caplog.messages == [
        f"aliases.smol.ladder.1: 'bad' is never chosen: {why}; remove it from the ladder",
        "aliases.smol: no replica serves own; add one under replicas",
        f"aliases.lone: no variant is good enough (bad: {why}); lower the floor, or add a better variant",
        "variants.bad: no replica serves it; add one under replicas, or remove the variant",
    ]
