"""Which tool parser of vLLM a replica is started with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.machine import installed_tool_parsers
from serving.replica import Launch, external_replicas
from serving.templates.tool_calling import TOOL_FORMATS, takes_tools, with_tool_calling, without_tools
from tests.fakes.running import ROOT
from tests.serving.templates import families
from tests.serving.templates.tool_templates import FAMILIES, template

QWEN = template(*FAMILIES["qwen3"][2])


def launch(path: Path | None, **settings: Any) -> Launch:
    """A replica of a model directory, with options of its configuration."""
    return Launch("a-1", Variant("a", "int4", PARENT_QUALITY, path), "cpu", ReplicaSettings(variant="a", **settings))


def parser(path: Path | None, parsers: frozenset[str] = frozenset(), **settings: Any) -> str | None:
    """The parser that such a replica is started with."""
    (planned,) = with_tool_calling([launch(path, **settings)], parsers)
    return planned.tool_parser


def model(folder: Path, text: str | None, model_type: str = "any", *tokens: str) -> Path:
    """A model directory of some type."""
    families.model(folder, text, *tokens)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parser_of_a_family(family: str, tmp_path: Path) -> None:
    """The template and the type of the model tell the parser, if the tokenizer has what that needs."""
    wanted, model_type, marks, tokens = FAMILIES[family]
    assert parser(model(tmp_path / "whole", template(*marks), model_type, *tokens)) == wanted
    if tokens:
        assert parser(model(tmp_path / "bare", template(*marks), model_type)) is None


def test_every_format_is_tried() -> None:
    """No row of the table lacks a family here."""
    assert {each.parser for each in TOOL_FORMATS} == {wanted for wanted, *_ in FAMILIES.values()}


@pytest.mark.parametrize(
    "text",
    [
        None,
        families.PLAIN,
        QWEN.replace("tools", "tolls"),
        QWEN.replace("<tool_call>", "<TOOLCALL>"),
        families.BROKEN + "<tool_call> tools arguments",
        "{{ raise_exception('no tools') }}<tool_call> arguments",
    ],
)
def test_templates_without_a_parser(text: str | None, tmp_path: Path) -> None:
    """There is none without a template, or for one that shows no tools, writes calls in other words, or fails."""
    assert parser(model(tmp_path, text)) is None


def test_the_operators_choice(tmp_path: Path) -> None:
    """`off` and a name override what the template says, `args` override both; without a directory there is none."""
    path = model(tmp_path, QWEN)
    assert parser(path, tool_calling="off") is None
    assert parser(path, tool_calling="mistral") == "mistral"
    assert parser(path, args=("--tool-call-parser=x",), tool_calling="mistral") is None
    assert parser(None) is None
    other = tmp_path / "other.jinja"
    other.write_text(template("[TOOL_CALLS]"))
    assert parser(path, args=("--chat-template", str(other))) == "mistral"


def test_mistrals_own_tokenizer(tmp_path: Path) -> None:
    """It shows tools without a template."""
    (model(tmp_path, None) / "tekken.json").write_text("{}")
    assert parser(tmp_path) == "mistral"


def test_an_engine_without_the_parser(tmp_path: Path) -> None:
    """A parser that the installed vLLM lacks would keep the server from starting, so it is left out."""
    path = model(tmp_path, QWEN)
    assert parser(path, frozenset({"mistral"})) is None
    assert parser(path, frozenset({"hermes"})) == "hermes"


def test_replicas_without_tools_are_described(tmp_path: Path) -> None:
    """`auto` that finds no parser is described once for each variant; `off`, a name, and `args` are choices."""
    plain, tools = model(tmp_path / "plain", families.PLAIN), model(tmp_path / "tools", QWEN)
    launches = [
        launch(plain),
        replace(launch(plain), replica_id="a-2"),
        launch(plain, tool_calling="off"),
        launch(plain, tool_calling="hermes"),
        launch(plain, args=("--enable-auto-tool-choice", "--tool-call-parser=x")),
        launch(tools),
        launch(None),
    ]
    (notice,) = without_tools(with_tool_calling(launches))
    assert notice.startswith("a-1, a-2: tool_calling: auto found no tool parser in the chat template of a; ")


def test_which_replicas_take_tools(tmp_path: Path) -> None:
    """Own ones that are started with a parser, by us or by `args`; external ones if the configuration says so."""
    path = model(tmp_path, QWEN)
    (planned,) = with_tool_calling([launch(path)])
    assert takes_tools(planned)
    assert takes_tools(launch(path, args=("--enable-auto-tool-choice", "--tool-call-parser", "x")))
    assert not takes_tools(launch(path))
    told = [ReplicaSettings(variant="a", url="http://x", tool_calling=choice) for choice in ("auto", "off", "hermes")]
    far = external_replicas(tuple(told), {"a": planned.variant})
    assert [each.tools for each in far] == [None, False, True]


@pytest.mark.skipif(not installed_tool_parsers(), reason="vLLM is not installed")
def test_the_installed_vllm_has_every_parser() -> None:
    """Each parser of the table is one that vLLM registers."""
    assert {each.parser for each in TOOL_FORMATS} <= installed_tool_parsers()


def test_the_documents_count_the_formats() -> None:
    """gateway/README.md says how many formats `auto` knows."""
    assert f"[{len(TOOL_FORMATS)} formats]" in (ROOT / "gateway" / "README.md").read_text()


@pytest.mark.skipif(not installed_tool_parsers(), reason="vLLM is not installed")
@pytest.mark.timeout(300)  # vLLM takes half a minute to import where no byte-code is kept
def test_the_parsers_read_calls_of_their_families() -> None:
    """vLLM's parsers find a call as their families write it, behind a thought, too, where these think."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.templates.vllm_calls"],
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    # Harmony, the format of gpt-oss, is read from token ids, whatever the parser.
    assert {*told, "openai"} == {each.parser for each in TOOL_FORMATS}
    call = [["look_up_weather", {"city": "Paris"}]]
    expected = {name: [call, [] if name == "llama4_pythonic" else call] for name in told}
    assert told == expected
