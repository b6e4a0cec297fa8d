"""What `config check` says of mistakes that operators have made: place, problem and remedy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from config.manifest import Manifest
from config.quantization import QuantizationArgs
from gateway.cli.doctor import doctor_main
from gateway.validation import notices
from quantgate import main
from tests.config.sealed import manifest_of, seal
from tests.gateway.fleet import deployment
from tests.gateway.mistakes import FINE, MISTAKES, OWN, VALID, VARIANTS, document, listening, replica
from tests.gateway.test_lora import TABLES as LORA_TABLES
from tests.serving.supervised import model_directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a model and a sealed variant."""
    model_directory(tmp_path / "model")
    (tmp_path / "sealed").mkdir()
    seal(tmp_path / "sealed", 4)
    return tmp_path


def check(folder: Path, text: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, list[str]]:
    """The exit code of `config check`, and what it prints."""
    path = folder / "quantgate.yaml"
    path.write_bytes(text.encode())
    code = main(["config", "check", str(path), *options])
    out, err = capsys.readouterr()
    return code, out, [line.replace(str(path), "f").replace(str(folder), "DIR") for line in err.splitlines()]


@pytest.mark.parametrize("text", FINE)
def test_valid_files(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Line ends of Windows, a byte order mark and any loopback address are fine."""
    code, out, err = check(folder, text, capsys)
    assert (code, err) == (0, [])
    assert out.endswith("1 aliases, 1 variants, no problems\n")


@pytest.mark.parametrize("text, code, lines", MISTAKES)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, lines: list[str]) -> None:
    """Each mistake has its place, the problem and a remedy; without an exit code 2, a summary follows."""
    found, out, err = check(folder, text, capsys)
    assert (found, err) == (code, lines)
    assert bool(out) == (code != 2)


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script reads the same, each with its level, from stdout; a valid file has no problems."""
    code, out, err = check(folder, document(replicas="replicas: []"), capsys, "--json")
    assert (code, err) == (3, [])
    assert json.loads(out) == [
        {
            "level": "unservable",
            "file": str(folder / "quantgate.yaml"),
            "line": 6,
            "column": 3,
            "path": "aliases.m",
            "what": "no replica serves a",
            "hint": "add one under replicas",
        }
    ]
    code, out, _ = check(folder, "gateway: 1", capsys, "--json")
    assert (code, json.loads(out)[0]["level"]) == (2, "error")
    assert check(folder, VALID, capsys, "--json") == (0, "[]\n", [])


def test_all_files_are_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Problems of the keys file have their own places, and those of several files are told at once."""
    (folder / "keys.yaml").write_text("alice: {sha256: abc}\n")
    variants = "variants:\n  a: {path: none}\n  b: {path: model}"
    text = document(listening(keys="keys.yaml"), variants, replica("") + "\n  - {variant: b}")
    code, _, err = check(folder, text, capsys)
    assert code == 2
    assert [line.split(": ")[0] for line in err] == ["DIR/keys.yaml:1:9", "f:3:7"]
    assert check(folder, text, capsys, "--file-only")[0] == 0


def test_replicas_that_vllm_cannot_serve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `up` would refuse to start is told with the line of the replica."""
    quantization = {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True, "desc_act": False}
    model_directory(folder / "model", quantization_config=quantization)
    code, _, err = check(folder, document(variants=OWN, replicas=replica("")), capsys)
    assert code == 2
    assert "f:5:5: replicas.0: DIR/model: vLLM on CPU loads GPTQ of 4 bits, not of 3; quantize to 4 bits" in err


@pytest.mark.parametrize("text", [text for text, code, _ in MISTAKES if code == 2])
def test_doctor_and_up_refuse_what_check_refuses(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """One validation: the other commands tell the same problems, with the same exit code."""
    _, _, expected = check(folder, text, capsys)
    assert doctor_main([str(folder / "quantgate.yaml")]) == 2
    err = capsys.readouterr().err.replace(str(folder / "quantgate.yaml"), "f").replace(str(folder), "DIR")
    assert err.splitlines() == expected
    if "can't listen" not in err:
        assert main(["up", str(folder / "quantgate.yaml")]) == 2
        err = capsys.readouterr().err.replace(str(folder / "quantgate.yaml"), "f").replace(str(folder), "DIR")
        assert err.removeprefix("quantgate: ").splitlines() == expected


def test_doctor_tells_notices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An alias that nobody can answer is an error of the doctor's, a variant without a replica a warning."""
    path = folder / "quantgate.yaml"
    variants = VARIANTS + "\n  b: {precision: int8}"
    path.write_text(document(variants=variants, replicas="replicas: []"))
    assert doctor_main([str(path), "--json"]) == 1
    found = [finding for finding in json.loads(capsys.readouterr().out) if finding["subject"].startswith("quantgate")]
    assert [(finding["level"], finding["subject"]) for finding in found] == [
        ("error", "quantgate.yaml:7"),
        ("warning", "quantgate.yaml:4"),
    ]
    assert found[0]["fix"] == "add one under replicas"


def test_the_valid_document_is_what_it_seems() -> None:
    """The document that all mistakes start from has one replica behind one alias."""
    assert yaml.safe_load(VALID)["aliases"] == {"m": {"ladder": ["a"]}}


def test_a_served_adapter_is_not_reported() -> None:
    """An alias of adapters is answered by the replicas of their bases; one without any is unservable."""
    found = {each.location: each.what for each in notices(deployment(LORA_TABLES))}
    assert ("aliases", "math") not in found
    assert ("aliases", "plain") not in found
    assert found[("variants", "hi")] == "no replica serves it"
    without = notices(deployment({**LORA_TABLES, "replicas": []}))
    assert ("aliases", "math") in {each.location for each in without if each.unservable}


def test_an_fp8_cache_has_no_part_in_figures_without_it(folder: Path) -> None:
    """Not even the parent's are true of it; a variant with scales of its own was measured with them."""
    tables = {
        "variants": {"a": {"path": str(folder / "model")}},
        "aliases": {"m": {"ladder": ["a"]}},
        "replicas": [{"variant": "a", "url": "http://127.0.0.1:1"}, {"variant": "a", "kv_cache_dtype": "fp8_e5m2"}],
    }
    found = {each.location: each.what for each in notices(deployment(tables))}
    where = ("replicas", 1, "kv_cache_dtype")
    assert found == {where: "the quality of 'a' was measured without an FP8 KV cache, which costs some, too"}
    plain = deployment(tables)
    fields = manifest_of(8)
    fields["scheme"]["kv_cache"] = QuantizationArgs(type="float")
    variant = replace(plain.variants["a"], manifest=Manifest.model_validate(fields))
    assert not [*notices(replace(plain, variants={"a": variant}))]


def test_doctor_tells_of_external_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they are asked through, what they may cost a day, and which have no limit."""
    models = "\n  gpt: {external: openai/gpt-4.1, budget: {usd_per_day: 20}}\n  claude: {external: anthropic/claude-x}"
    path = folder / "quantgate.yaml"
    path.write_text(document(variants=VARIANTS + models))
    doctor_main([str(path), "--json"])
    found = {each["subject"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["litellm"]["what"].endswith(", loaded when the gateway starts")
    assert found["variants.gpt"]["what"] == "openai/gpt-4.1, 20 USD a day at most"
    assert (found["variants.claude"]["level"], found["variants.claude"]["what"]) == (
        "warning",
        "anthropic/claude-x has no budget",
    )


def test_secrets_of_external_models_are_masked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config show` prints none of them."""
    model = "\n  gpt: {external: bedrock/x, api_key: sk-1, credentials: {aws_secret_access_key: sk-2}}"
    path = folder / "quantgate.yaml"
    path.write_text(document(variants=VARIANTS + model))
    assert main(["config", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "sk-1" not in out
    assert "sk-2" not in out
    assert "aws_secret_access_key: '**********'" in out
