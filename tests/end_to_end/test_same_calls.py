"""The same calls of real vLLM itself and through the gateway: what differs is what it says it changes, no other byte.

One replica of the demo's base model; vLLM's own ids go by the request's, which both are given.
"""

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import yaml

from gateway.demo.cli import BASE_FILE, BASE_NAME, BASE_PACKAGE
from tests.end_to_end.running_demo import ROOT, Running, environment, listens, start, until
from tests.end_to_end.same_calls import ANSWERED, QUESTION, REFUSED, Call

anthropic = pytest.importorskip("anthropic")

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(600)]

ALIAS = "smol"
READY_SECONDS = 300
STOPPED_SECONDS = 5  # of the minute that the generation would take
ENDLESS: dict[str, Any] = {"messages": QUESTION, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}

# What the engine makes anew for each request, besides the ids that are the request's.
_ANEW = re.compile(
    rb'(?P<time>"(?:created|created_at|completed_at)":)[\d.]+|(?P<id>chatcmpl-tool-|\b(?:call|fc|msg|resp)_)[0-9a-f]{8,}'
)
_INDEX = re.compile(rb'"choices":\[\{"index":(\d+)')


@dataclass(frozen=True, slots=True)
class Both:
    """Real vLLM, and a gateway in front of it."""

    running: Running
    engine: str
    served: str
    gateway: str

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Where to ask, and for which model: directly, and through the gateway."""
        return (self.engine, self.served), (self.gateway, ALIAS)

    def asked(self, name: str, call: Call) -> list[httpx.Response]:
        """Make a call of both."""
        path, body = call
        headers = {"x-request-id": re.sub(r"\W+", "-", name)}
        return [
            httpx.post(url + path, json={**body, "model": model}, headers=headers, timeout=60)
            for url, model in self.sides
        ]

    def idle(self) -> bool:
        """Tell whether vLLM runs no request, and none waits."""
        return self._gauge("running") == self._gauge("waiting") == 0

    def generating(self) -> bool:
        """Tell whether vLLM runs a request."""
        return self._gauge("running") > 0

    def _gauge(self, state: str) -> float:
        lines = httpx.get(f"{self.engine}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:num_requests_{state}{{"))


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """The demo's base model; made here if the demo hasn't run."""
    folder = home / "models" / BASE_NAME
    if not (folder / "config.json").exists():
        package = importlib.util.find_spec(BASE_PACKAGE)
        assert package is not None
        assert package.origin is not None
        command = [sys.executable, "-m", "quantize.gguf", str(Path(package.origin).parent / BASE_FILE), str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment(home), check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def both(base: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """`quantgate up` with one replica; no answer depends on an earlier one's cached prefix."""
    folder = tmp_path_factory.mktemp("same")
    replica = {"variant": "smol-bf16", "max_model_len": 2048, "max_num_seqs": 8, "kv_cache_bytes": "256MiB"}
    replica |= {"prefix_caching": False}
    replica |= {"args": ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]}
    document = {
        "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "state": f"sqlite:///{folder}/state.db"},
        "variants": {"smol-bf16": {"path": str(base)}},
        "replicas": [replica],
        "aliases": {ALIAS: {"ladder": ["smol-bf16"]}},
    }
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(document))
    running = start(folder / "run", home, "up", str(config))
    try:
        until(lambda: "is ready at" in running.told, READY_SECONDS, running)
        client, admin = listens(running)
        (told,) = httpx.get(f"{admin}/admin/replicas").json()
        yield Both(running, told["url"], told["id"], client)
        assert running.stop() == 0
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def comparable(answer: bytes, served: str) -> list[bytes]:
    """Events of an answer under the alias, without what is new in each; only the events of one choice have an order.

    Of several choices only those that end last are told with the fingerprint: the others don't wait for it.
    """
    renamed = answer.replace(b'"model":"%b"' % served.encode(), b'"model":"%b"' % ALIAS.encode())
    same = _ANEW.sub(lambda found: found["time"] or found["id"], renamed)
    if b'"choices":[{"index":1' not in same:
        return same.split(b"\n\n")
    return sorted(same.replace(b',"system_fingerprint":"smol-bf16"', b"").split(b"\n\n"), key=_choice)


def _choice(event: bytes) -> int:
    found = _INDEX.search(event)
    return int(found[1]) if found else sys.maxsize


@pytest.mark.parametrize("name", ANSWERED)
def test_answers(both: Both, name: str) -> None:
    """Every byte is vLLM's, but for the model's name."""
    direct, through = both.asked(name, ANSWERED[name])
    assert (through.status_code, direct.status_code) == (200, 200), through.text
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert comparable(through.content, ALIAS) == comparable(direct.content, both.served)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(both: Both, name: str) -> None:
    """Status, message and field are vLLM's; the shape is that of the endpoint, the code is text as SDKs expect it."""
    direct, through = both.asked(name, REFUSED[name])
    assert (through.status_code, direct.status_code) == (400, 400), through.text
    theirs, ours = json.loads(direct.content), json.loads(through.content)
    error = theirs.get("error") or {"message": theirs["detail"]}
    assert ours["error"]["message"] == error["message"]
    assert isinstance(ours["error"]["code"], str)
    if REFUSED[name][0].startswith("/v1/messages"):
        assert (ours["type"], ours["error"]["type"]) == ("error", "invalid_request_error")
    else:
        assert ours["error"]["param"] == error.get("param")


def test_an_endpoint_that_the_engine_has_not(both: Both) -> None:
    """A chat model makes no embeddings; to ask for some is the client's mistake."""
    direct, through = both.asked("embeddings", ("/v1/embeddings", {"input": "x"}))
    assert (through.status_code, direct.status_code) == (404, 404)
    assert through.json()["error"]["code"] == "endpoint_not_supported"


def test_models(both: Both) -> None:
    """The alias is described as vLLM describes the model."""
    theirs = httpx.get(f"{both.engine}/v1/models").json()["data"][0]
    ours = httpx.get(f"{both.gateway}/v1/models/{ALIAS}").json()
    assert {key: ours[key] for key in ("object", "max_model_len")} == {
        key: theirs[key] for key in ("object", "max_model_len")
    }


class City(pydantic.BaseModel):
    """What a model is asked to fill in."""

    city: str


def chat_whole(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.create`."""
    return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=6, temperature=0).model_dump()


def chat_stream(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.stream`, which puts the chunks together."""
    with client.chat.completions.stream(model=model, messages=QUESTION, stop=".", temperature=0) as stream:
        events = [event.type for event in stream]
        return {"events": events, **stream.get_final_completion().model_dump()}


def chat_parse(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.parse`, which gives an object."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": [{"city": "Paris"}]}}}
    asked: dict[str, Any] = {"messages": QUESTION, "max_tokens": 24, "temperature": 0}
    answer = client.chat.completions.parse(
        model=model, response_format=City, extra_body={"response_format": form}, **asked
    )
    assert answer.choices[0].message.parsed == City(city="Paris")
    return answer.model_dump(warnings=False)


def responses_stream(client: openai.OpenAI, model: str) -> Any:
    """`responses.create` with its many events."""
    stream = client.responses.create(
        model=model, input="Name three colours.", max_output_tokens=6, temperature=0, stream=True
    )
    return {"events": [event.model_dump() for event in stream]}


@pytest.mark.parametrize("call", [chat_whole, chat_stream, chat_parse, responses_stream])
def test_openai_sdk(both: Both, call: Callable[[openai.OpenAI, str], Any]) -> None:
    """What the application gets is the same."""
    got = []
    for url, model in both.sides:
        headers = {"x-request-id": call.__name__}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", default_headers=headers) as client:
            told = call(client, model)
        got.append(comparable(json.dumps(told, separators=(",", ":")).encode(), model))
    assert got[0] == got[1]


def test_anthropic_sdk(both: Both) -> None:
    """`messages.stream` puts the same message together from the same events."""
    got = []
    for url, model in both.sides:
        with (
            anthropic.Anthropic(base_url=url, api_key="EMPTY", default_headers={"x-request-id": "m"}) as client,
            client.messages.stream(
                model=model, messages=QUESTION, max_tokens=6, extra_body={"temperature": 0}
            ) as stream,
        ):
            events = [event.type for event in stream]
            message = stream.get_final_message().model_dump()
        got.append(comparable(json.dumps([events, message], separators=(",", ":"), default=str).encode(), model))
    assert got[0] == got[1]


def test_a_stream_that_is_closed(both: Both) -> None:
    """Three chunks are enough for this client: vLLM stops."""
    with openai.OpenAI(base_url=f"{both.gateway}/v1", api_key="EMPTY") as client:
        stream = client.chat.completions.create(model=ALIAS, stream=True, **ENDLESS)
        for _ in range(3):
            next(iter(stream))
        assert both.generating()
        stream.close()
        until(both.idle, STOPPED_SECONDS)


async def test_a_whole_answer_that_is_cancelled(both: Both) -> None:
    """Nobody waits for it any more: vLLM stops."""
    async with openai.AsyncOpenAI(base_url=f"{both.gateway}/v1", api_key="EMPTY") as client:
        asked = asyncio.create_task(client.chat.completions.create(model=ALIAS, **ENDLESS))
        await asyncio.to_thread(until, both.generating, 30)
        asked.cancel()
        await asyncio.to_thread(until, both.idle, STOPPED_SECONDS)
        assert asked.cancelled()


def test_nothing_was_taken_for_a_failure(both: Both) -> None:
    """Of all that came before, nothing was the replica's fault, and nothing was asked twice."""
    assert "failed:" not in both.running.told
    assert re.findall(r"attempts=(?!1 )\d+", both.running.told) == []
