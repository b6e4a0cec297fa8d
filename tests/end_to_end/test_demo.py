"""The main job on real parts: a real chat model, real GPTQ, real vLLM, the real OpenAI SDK.

The tests build on one another in the order of this file and the two that follow: first run, second run, requests, load,
stop, kill.
"""

import json
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from config.manifest import Manifest
from tests.end_to_end.running_demo import (
    Running,
    address,
    admin_address,
    noted_sessions,
    start,
    until,
)

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(2700)]

VARIANTS = ("smol-bf16", "smol-int8", "smol-int4")
QUESTION = [{"role": "user", "content": "Name three colours."}]


def test_first_run_answers_with_all_variants(first_run: Running, home: Path) -> None:
    """From nothing to three variants that have answered; the alias is answered by the best; nothing stays behind."""
    assert first_run.process.returncode == 0, first_run.told[-3000:]
    rows = {name: row for name in VARIANTS for row in first_run.out.splitlines() if row.strip().startswith(name)}
    assert set(rows) == set(VARIANTS), first_run.out
    assert all(row.count(name) == 2 for name, row in rows.items()), first_run.out
    assert rows["smol-bf16"].rstrip().endswith("smol, smol-bf16")
    assert "x-quantgate-precision: bf16" in first_run.out
    for stage in ("base model", "quantize w8a8", "quantize w4a16-g64", "start replicas", "ask"):
        assert f"{stage}: " in first_run.told
    assert noted_sessions(home) == {}


@pytest.mark.parametrize("name,bits", [("smol-int8", 8), ("smol-int4", 4)])
def test_variant_is_sealed_and_measured(first_run: Running, home: Path, name: str, bits: int) -> None:
    """A variant's manifest matches its files, and its quality is a measurement that makes sense."""
    folder = directory(home, name)
    manifest = Manifest.read(folder)
    assert manifest.altered_files(folder) == []
    assert (manifest.scheme.bits, manifest.base.dtype) == (bits, "bf16")
    assert manifest.calibration is not None
    assert manifest.calibration.reasoning_tokens > 1000
    quality = manifest.quality
    assert quality.tokens > 1000
    assert 0 < quality.kl_mean < (0.1 if bits == 8 else 0.6)
    assert quality.top1_agreement > (0.85 if bits == 8 else 0.65)


def test_int8_is_nearer_to_the_parent_than_int4(first_run: Running, home: Path) -> None:
    """What is measured tells the precisions apart."""
    int8, int4 = (Manifest.read(directory(home, name)).quality for name in ("smol-int8", "smol-int4"))
    assert int8.kl_mean < int4.kl_mean
    assert int8.top1_agreement > int4.top1_agreement


def test_second_run_reuses_everything(serving: Running, home: Path) -> None:
    """The same recipes are not made again."""
    made = [Manifest.read(directory(home, name)).created for name in ("smol-int8", "smol-int4")]
    assert "Serving on" in serving.out
    assert "layers" not in serving.told
    assert [Manifest.read(directory(home, name)).created for name in ("smol-int8", "smol-int4")] == made


def test_models_are_listed(serving: Running) -> None:
    """The alias comes first, with the context length that every rung has."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        models = client.models.list().data
    assert [model.id for model in models] == ["smol", *VARIANTS]
    assert models[0].model_dump()["max_model_len"] == 2048


@pytest.mark.parametrize("name", ["smol", *VARIANTS])
def test_chat(serving: Running, name: str) -> None:
    """A whole answer names the model that was asked, and the headers name the variant that answered."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=name,
            messages=QUESTION,
            max_tokens=16,
        )
    answer = raw.parse()
    assert answer.model == name
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    expected = "smol-bf16" if name == "smol" else name
    assert raw.headers["x-quantgate-variant"] == expected
    assert raw.headers["x-quantgate-reason"] == ("preferred" if name == "smol" else "pinned")
    assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"


def test_stream(serving: Running) -> None:
    """A stream comes in pieces, each under the asked name, and without the usage that was not asked for."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        chunks = list(
            client.chat.completions.create(
                model="smol",
                messages=QUESTION,
                max_tokens=16,
                stream=True,
            )
        )
    assert len(chunks) > 3
    assert {chunk.model for chunk in chunks} == {"smol"}
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_completions(serving: Running) -> None:
    """The older endpoint works, too."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        answer = client.completions.create(model="smol", prompt="One, two, three,", max_tokens=4, temperature=0)
    assert answer.model == "smol"
    assert answer.choices[0].text


def test_engine_errors_reach_the_client(serving: Running) -> None:
    """A prompt that is too long is the client's to mend, in a shape that the SDK understands."""
    with (
        openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client,
        pytest.raises(openai.BadRequestError, match="maximum context length") as caught,
    ):
        client.completions.create(model="smol", prompt="word " * 5000, max_tokens=4)
    assert isinstance(caught.value.code, str)


def test_client_that_leaves_stops_the_generation(serving: Running) -> None:
    """vLLM works for nobody: its running requests go down to none after the client has left."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        stream = client.chat.completions.create(
            model="smol-int8",
            messages=QUESTION,
            max_tokens=1500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert in_flight(serving) == {"smol-int8-1": 1}
        stream.close()
    until(lambda: in_flight(serving) == {}, 20, serving)
    replica = next(each for each in replicas(serving) if each["id"] == "smol-int8-1")
    until(lambda: "num_requests_running" in (text := httpx.get(f"{replica['url']}/metrics").text) and idle(text), 20)


def directory(home: Path, variant: str) -> Path:
    """Where the demo's configuration says that a variant lies."""
    return Path(yaml.safe_load((home / "demo.yaml").read_text())["variants"][variant]["path"])


def replicas(serving: Running) -> list[dict[str, object]]:
    """What the admin port tells of every replica."""
    told = httpx.get(f"{admin_address(serving)}/admin/replicas").json()
    assert isinstance(told, list)
    return told


def in_flight(serving: Running) -> dict[object, object]:
    """The replicas that answer something now."""
    return {each["id"]: each["in_flight"] for each in replicas(serving) if each["in_flight"]}


def idle(metrics: str) -> bool:
    """Tell whether vLLM runs no request."""
    values = [line.split()[-1] for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return bool(values) and all(float(value) == 0 for value in values)


def test_variants_are_told_as_json(first_run: Running, home: Path, tmp_path: Path) -> None:
    """`quantgate variants show --json` prints what the manifest says."""
    listing = start(tmp_path, home, "variants", "show", str(directory(home, "smol-int4")), "--json")
    assert listing.wait(30) == 0, listing.told
    assert json.loads(listing.out)["scheme"]["bits"] == 4
