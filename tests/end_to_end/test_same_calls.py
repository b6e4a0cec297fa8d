"""The same calls to real vLLM itself and through the gateway: only the documented bytes differ.

The alias has one replica of `quantgate up`. vLLM derives its ids from the request id, which both calls send.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.end_to_end.running_demo import Running, until
from tests.end_to_end.running_up import ALONE, ALONE_VARIANT, Up
from tests.end_to_end.same_calls import ANSWERED, QUESTION, REFUSED, TOOL_CALLS, Call

anthropic = pytest.importorskip("anthropic")

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(600)]

ALIAS = ALONE
STOPPED_SECONDS = 5  # of the minute that the generation would take
ENDLESS: dict[str, Any] = {"messages": QUESTION, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}

# What differs between two requests, besides ids derived from the request id.
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
        """Base URL and model name: of vLLM, and of the gateway."""
        return (self.engine, self.served), (self.gateway, ALIAS)

    def asked(self, name: str, call: Call) -> list[httpx.Response]:
        """Make a call to both."""
        path, body = call
        headers = {"x-request-id": re.sub(r"\W+", "-", name)}
        return [
            httpx.post(url + path, json={**body, "model": model}, headers=headers, timeout=60)
            for url, model in self.sides
        ]

    def idle(self) -> bool:
        """Whether vLLM has neither running nor waiting requests."""
        return self._gauge("running") == self._gauge("waiting") == 0

    def generating(self) -> bool:
        """Whether vLLM runs a request."""
        return self._gauge("running") > 0

    def _gauge(self, state: str) -> float:
        lines = httpx.get(f"{self.engine}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:num_requests_{state}{{"))


@pytest.fixture(scope="module")
def both(up: Up) -> Both:
    """The replica of the alias, and the gateway in front of it."""
    (replica,) = [each for each in up.replicas() if each["variant"] == ALONE_VARIANT]
    return Both(up.running, replica["url"], replica["id"], up.addresses[0])


def comparable(answer: bytes, served: str) -> list[bytes]:
    """Split an answer into events, with the alias as model and without times and random ids.

    Events of several choices are sorted by choice: only those of one choice have an order. The fingerprint is removed
    from them: vLLM sends it with the choices that end last.
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
    """Every byte is vLLM's, except the model's name."""
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
    """A chat model has no embeddings endpoint: 404 with a code of its own."""
    direct, through = both.asked("embeddings", ("/v1/embeddings", {"input": "x"}))
    assert (through.status_code, direct.status_code) == (404, 404)
    assert through.json()["error"]["code"] == "endpoint_not_supported"


@pytest.mark.parametrize("name", TOOL_CALLS)
def test_a_tool_is_called(both: Both, name: str) -> None:
    """A call that the engine has sampled arrives in the form of each API, with arguments that fit the schema."""
    path, body = TOOL_CALLS[name]
    answer = httpx.post(f"{both.gateway}{path}", json={**body, "model": ALIAS}, timeout=60).json()
    function, arguments = called(name, answer)
    assert function == "weather"
    assert arguments in ({"city": "Paris"}, {"city": "Rome"})


def called(name: str, answer: dict[str, Any]) -> tuple[str, Any]:
    """The function and the arguments of the only call in an answer."""
    if name == "messages":
        (block,) = [each for each in answer["content"] if each["type"] == "tool_use"]
        return block["name"], block["input"]
    if name == "responses":
        (item,) = [each for each in answer["output"] if each["type"] == "function_call"]
        return item["name"], json.loads(item["arguments"])
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_models(both: Both) -> None:
    """/v1/models describes the alias as vLLM describes the model."""
    theirs = httpx.get(f"{both.engine}/v1/models").json()["data"][0]
    ours = httpx.get(f"{both.gateway}/v1/models/{ALIAS}").json()
    assert {key: ours[key] for key in ("object", "max_model_len")} == {
        key: theirs[key] for key in ("object", "max_model_len")
    }


class City(pydantic.BaseModel):
    """The response format of `chat_parse`."""

    city: str


def chat_whole(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.create`."""
    return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=6, temperature=0).model_dump()


def chat_stream(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.stream`, which assembles the chunks."""
    with client.chat.completions.stream(model=model, messages=QUESTION, stop=".", temperature=0) as stream:
        events = [event.type for event in stream]
        return {"events": events, **stream.get_final_completion().model_dump()}


def chat_parse(client: openai.OpenAI, model: str) -> Any:
    """`chat.completions.parse`, which returns an object."""
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
    """The SDK returns the same objects and events."""
    got = []
    for url, model in both.sides:
        headers = {"x-request-id": call.__name__}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", default_headers=headers) as client:
            result = call(client, model)
        got.append(comparable(json.dumps(result, separators=(",", ":")).encode(), model))
    assert got[0] == got[1]


def test_anthropic_sdk(both: Both) -> None:
    """`messages.stream` gives the same events and the same message."""
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
    """The client closes the stream after three chunks: vLLM stops generating."""
    with openai.OpenAI(base_url=f"{both.gateway}/v1", api_key="EMPTY") as client:
        stream = client.chat.completions.create(model=ALIAS, stream=True, **ENDLESS)
        for _ in range(3):
            next(iter(stream))
        assert both.generating()
        stream.close()
        until(both.idle, STOPPED_SECONDS)


async def test_a_whole_answer_that_is_cancelled(both: Both) -> None:
    """The client cancels a request that does not stream: vLLM stops generating."""
    async with openai.AsyncOpenAI(base_url=f"{both.gateway}/v1", api_key="EMPTY") as client:
        asked = asyncio.create_task(client.chat.completions.create(model=ALIAS, **ENDLESS))
        await asyncio.to_thread(until, both.generating, 30)
        asked.cancel()
        await asyncio.to_thread(until, both.idle, STOPPED_SECONDS)
        assert asked.cancelled()


def test_nothing_was_taken_for_a_failure(both: Both) -> None:
    """None of the calls above was logged as a replica's failure, and none was retried."""
    assert "failed:" not in both.running.stderr
    assert re.findall(r"attempts=(?!1 )\d+", both.running.stderr) == []
