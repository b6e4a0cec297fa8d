"""`quantgate demo` on real parts: a real chat model, real GPTQ, real vLLM, the real OpenAI SDK.

The tests depend on one another in the order of this file and the two that follow: first run, second run, requests,
load, stop, interrupt.
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
    """From an empty home to three variants that answer; the best one answers the alias; no replica stays behind."""
    assert first_run.process.returncode == 0, first_run.stderr[-3000:]
    rows = {name: row for name in VARIANTS for row in first_run.stdout.splitlines() if row.strip().startswith(name)}
    assert set(rows) == set(VARIANTS), first_run.stdout
    assert all(row.count(name) == 2 for name, row in rows.items()), first_run.stdout
    assert rows["smol-bf16"].rstrip().endswith("smol, smol-bf16")
    # With half of the demo's tokens, few chats decide top-1 or not; with all of them int8 passes.
    assert " pass " in rows["smol-int8"] or " not shown " in rows["smol-int8"], first_run.stdout
    assert " fail " in rows["smol-int4"], first_run.stdout
    assert "verdicts: all variants are held to the default limits for 4 bits" in first_run.stdout
    assert "x-quantgate-precision: bf16" in first_run.stdout
    for stage in ("base model", "quantize w8a8", "quantize w4a16-g64", "start replicas", "ask"):
        assert f"{stage}: " in first_run.stderr
    assert noted_sessions(home) == {}


def test_base_model_keeps_its_words_and_its_ties(smollm2: Path) -> None:
    """The GGUF file becomes a model with single-token chat marks, digits apart, its end token and tied embeddings."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2)
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2026")) == ["2", "0", "2", "6"]
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    assert json.loads((smollm2 / "generation_config.json").read_bytes())["eos_token_id"] == 2
    assert json.loads((smollm2 / "config.json").read_bytes())["tie_word_embeddings"] is True
    assert 268e6 < (smollm2 / "model.safetensors").stat().st_size < 270e6
    assert [path.name for path in smollm2.parent.iterdir()] == [smollm2.name]


@pytest.mark.parametrize("name,bits", [("smol-int8", 8), ("smol-int4", 4)])
def test_variant_is_sealed_and_measured(first_run: Running, home: Path, name: str, bits: int) -> None:
    """A variant's manifest matches its files, and its quality is a plausible measurement."""
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
    """The measured quality separates the precisions."""
    int8, int4 = (Manifest.read(directory(home, name)).quality for name in ("smol-int8", "smol-int4"))
    assert int8.kl_mean < int4.kl_mean
    assert int8.top1_agreement > int4.top1_agreement


def test_second_run_reuses_everything(serving: Running, home: Path) -> None:
    """Variants of the same recipes are not quantized again."""
    created = [Manifest.read(directory(home, name)).created for name in ("smol-int8", "smol-int4")]
    assert "Serving on" in serving.stdout
    assert "layers" not in serving.stderr
    assert [Manifest.read(directory(home, name)).created for name in ("smol-int8", "smol-int4")] == created


def test_models_are_listed(serving: Running) -> None:
    """The alias comes first, with the context length of its rungs."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        models = client.models.list().data
    assert [model.id for model in models] == ["smol", *VARIANTS]
    assert models[0].model_dump()["max_model_len"] == 2048


@pytest.mark.parametrize("name", ["smol", *VARIANTS])
def test_chat(serving: Running, name: str) -> None:
    """A whole answer names the requested model, and the headers name the variant that answered."""
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
    """A stream has several chunks, each with the requested name, and no usage unless requested."""
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
    """/v1/completions works, too."""
    with openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client:
        answer = client.completions.create(model="smol", prompt="One, two, three,", max_tokens=4, temperature=0)
    assert answer.model == "smol"
    assert answer.choices[0].text


def test_engine_errors_reach_the_client(serving: Running) -> None:
    """A prompt that is too long is a 400 in a shape that the SDK understands."""
    with (
        openai.OpenAI(base_url=address(serving), api_key="EMPTY") as client,
        pytest.raises(openai.BadRequestError, match="maximum context length") as caught,
    ):
        client.completions.create(model="smol", prompt="word " * 5000, max_tokens=4)
    assert isinstance(caught.value.code, str)


def test_client_that_leaves_stops_the_generation(serving: Running) -> None:
    """vLLM aborts the request of a client that closes its stream: no request is left running."""
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
    """A variant's directory, from the demo's configuration."""
    return Path(yaml.safe_load((home / "quantgate.yaml").read_text())["variants"][variant]["path"])


def replicas(serving: Running) -> list[dict[str, object]]:
    """All replicas as the admin port lists them."""
    listed = httpx.get(f"{admin_address(serving)}/admin/replicas").json()
    assert isinstance(listed, list)
    return listed


def in_flight(serving: Running) -> dict[object, object]:
    """The number of requests in flight, of replicas that have any."""
    return {each["id"]: each["in_flight"] for each in replicas(serving) if each["in_flight"]}


def idle(metrics: str) -> bool:
    """Whether vLLM runs no request, by its metrics page."""
    values = [line.split()[-1] for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return bool(values) and all(float(value) == 0 for value in values)


def test_a_variant_is_shown_as_json(first_run: Running, home: Path, tmp_path: Path) -> None:
    """`quantgate variants show --json` prints what the manifest says."""
    listing = start(tmp_path, home, "variants", "show", str(directory(home, "smol-int4")), "--json")
    assert listing.wait(30) == 0, listing.stderr
    assert json.loads(listing.stdout)["scheme"]["bits"] == 4
