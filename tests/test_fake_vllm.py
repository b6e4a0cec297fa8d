"""The fake vLLM, asked over its socket and killed as a process."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.asking_fakes import CHAT, HELLO, ask, client_of, events_in, events_until_end
from tests.fakes.running import DEADLINE_SECONDS, ROOT, eventually, fake_argv, running_fake

BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def text_of(events: list[Any]) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    page = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    assert {sample.labels["model_name"] for sample in samples} == {"m1"}
    return {sample.name: sample.value for sample in samples if sample.labels.keys() == {"engine", "model_name"}}


async def test_control_endpoints() -> None:
    """Health is empty, the version is vLLM's, all names are listed with root and length, other paths are unknown."""
    async with running_fake("--max-model-len", "4k", served="m1 alias") as replica, client_of(replica) as client:
        health = await client.get("/health")
        assert (health.status_code, health.content) == (200, b"")
        assert (await client.get("/ping")).status_code == 200
        assert (await client.get("/version")).json() == {"version": "0.32.0"}
        assert (await client.get("/load")).json() == {"server_load": 0}
        models = (await client.get("/v1/models")).json()["data"]
        assert [(m["id"], m["owned_by"], m["root"], m["max_model_len"]) for m in models] == [
            ("m1", "vllm", "/models/m1", 4000),
            ("alias", "vllm", "/models/m1", 4000),
        ]
        unknown, method = await client.get("/nowhere"), await client.get(CHAT)
        assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})
        assert (method.status_code, method.json()) == (405, {"detail": "Method Not Allowed"})


async def test_a_whole_answer_comes_from_the_first_name() -> None:
    """Whatever name was asked, the first one answers; the text echoes the prompt and the id is the caller's."""
    async with running_fake("--unknown-flag", "7", served="m1 alias") as replica, client_of(replica) as client:
        answer = await client.post(CHAT, json={**HELLO, "model": "alias"}, headers={"X-Request-Id": "r-7"})
        body = answer.json()
        assert (body["id"], body["model"], body["object"]) == ("chatcmpl-r-7", "m1", "chat.completion")
        choice = body["choices"][0]
        assert choice["message"]["content"].startswith("m1 heard hello there café 汉字")
        assert choice["finish_reason"] == "stop"
        prompt_tokens = body["usage"]["prompt_tokens"]
        assert body["usage"]["completion_tokens"] == 16
        assert body["usage"]["total_tokens"] == prompt_tokens + 16
        assert replica.endings() == [{"event": "finished", "tokens": 16}]
        noted = replica.requests(CHAT)[0]
        assert noted["method"] == "POST"
        assert noted["headers"]["x-request-id"] == "r-7"
        assert noted["body"] == {**HELLO, "model": "alias"}


async def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    """A stream is a role without text, a chunk per token, the reason with the last, usage without choices, DONE."""
    async with running_fake("--fake-tokens", "9") as replica:
        whole = (await ask(replica)).json()
        events = await events_until_end(replica, stream_options={"include_usage": True})
        assert len(events) == 1 + 9 + 1 + 1
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(events) == whole["choices"][0]["message"]["content"]
        assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == [None] * 9 + ["stop"]
        assert events[-2]["choices"] == []
        assert events[-2]["usage"] == {key: whole["usage"][key] for key in events[-2]["usage"]}
        assert events[-1] == "[DONE]"
        assert all("usage" not in event for event in events[:-2])


async def test_limits_and_choices() -> None:
    """`max_tokens` cuts with reason `length`; `n` gives that many choices, distinct in their text."""
    async with running_fake() as replica:
        body = (await ask(replica, max_tokens=3, n=2)).json()
        texts = [(choice["message"]["content"], choice["finish_reason"]) for choice in body["choices"]]
        assert texts == [("m1 heard hello", "length"), ("m1#1 heard hello", "length")]
        assert body["usage"]["completion_tokens"] == 6
        newer = (await ask(replica, max_tokens=9, max_completion_tokens=4)).json()
        assert newer["usage"]["completion_tokens"] == 4
        longer = (await ask(replica, max_tokens=40, ignore_eos=True)).json()
        assert longer["usage"]["completion_tokens"] == 40


async def test_completions() -> None:
    """The older endpoint answers text with its own shape and id, for several prompts too."""
    async with running_fake() as replica, client_of(replica) as client:
        body = (await client.post("/v1/completions", json={"prompt": ["a b", "c"], "max_tokens": 3})).json()
        assert body["object"] == "text_completion"
        assert body["id"].startswith("cmpl-")
        assert [choice["text"] for choice in body["choices"]] == ["m1 heard a", "m1 heard c"]
        streamed = await client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 3, "stream": True})
        *chunks, done = events_in(streamed.content)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "m1 heard a"
        assert done == "[DONE]"


async def test_reasoning_and_the_think_prefix() -> None:
    """The first tokens can be reasoning, counted in usage; the template can leave a `<think>` open."""
    flags = ("--fake-tokens", "5", "--fake-reasoning-tokens", "2", "--fake-think-prefix")
    async with running_fake(*flags) as replica, client_of(replica) as client:
        body = (await ask(replica)).json()
        message = body["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("m1 heard", " hello there café")
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
        events = await events_until_end(replica)
        deltas = [event["choices"][0]["delta"] for event in events[1:-1]]
        assert deltas[:3] == [{"reasoning": "m1"}, {"reasoning": " heard"}, {"content": " hello"}]
        tokens = (await client.post("/tokenize", json=HELLO)).json()["tokens"]
        prompt = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
        assert prompt == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n<think>\n"


REFUSED: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({"model": "nope"}, 404, "NotFoundError", "model", "The model `nope` does not exist. Valid aliases: m1."),
    ({"messages": None}, 400, "Bad Request", "body.messages", "Field required"),
    ({"max_tokens": 101}, 400, "BadRequestError", "max_tokens", "max_model_len=100"),
    ({"max_tokens": "x"}, 400, "Bad Request", "body.max_tokens", "valid integer"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, 400, "BadRequestError", "input_tokens", "length is 100"),
    ({"stream_options": {"include_usage": True}}, 400, "Bad Request", "stream_options", "`stream=True`"),
]


async def test_refusals_have_the_shape_of_vllm() -> None:
    """What is wrong with a request is said in vLLM's error object; a bad body is a 400, never a 422."""
    async with running_fake("--max-model-len", "100") as replica, client_of(replica) as client:
        for changes, status, kind, param, words in REFUSED:
            answer = await client.post(CHAT, json={**HELLO, **changes})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, param)
            assert words in error["message"]
        typed = {"content-type": "application/json"}
        broken = await client.post(CHAT, content=b'{"messages"', headers=typed)
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "body.11")
        plain = await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 400
        assert "Only 'application/json' is allowed" in plain.json()["error"]["message"]
        assert replica.endings() == [], "nothing was generated"


async def test_the_api_key_guards_v1_only() -> None:
    """With VLLM_API_KEY set, /v1 wants it as a bearer token; health and /tokenize stay open."""
    async with running_fake(env={"VLLM_API_KEY": "secret"}) as replica, client_of(replica) as client:
        refused = await client.get("/v1/models")
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        assert (await client.post(CHAT, json=HELLO)).status_code == 401
        assert (await client.post("/tokenize", json={"prompt": "é"})).json()["tokens"] == [233]
        assert (await client.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200


async def test_metrics_and_load_count_who_runs_and_who_waits() -> None:
    """One place and two clients: one runs, one waits; leaving aborts both and frees the place."""
    flags = ("--max-num-seqs", "1", "--fake-stall-after-tokens", "2", "--enable-server-load-tracking")
    async with running_fake(*flags) as replica, client_of(replica) as client:
        asking = [asyncio.create_task(ask(replica, stream=stream)) for stream in (True, False)]
        await replica.requested(CHAT, 2)
        assert (await client.get("/load")).json() == {"server_load": 2}

        async def stalled() -> dict[str, float] | None:
            counted = await gauges(client)
            return counted if counted["vllm:generation_tokens_total"] >= 2 else None

        counted = await eventually(stalled)
        assert (counted["vllm:num_requests_running"], counted["vllm:num_requests_waiting"]) == (1, 1)
        assert counted["vllm:kv_cache_usage_perc"] == 1
        for each in asking:
            each.cancel()
        await asyncio.wait(asking)
        endings = await replica.ended(2)
        assert {ending["event"] for ending in endings} == {"aborted"}
        assert (await gauges(client))["vllm:num_requests_running"] == 0


async def test_a_client_who_leaves_mid_stream_stops_the_generation() -> None:
    """Closing the connection ends a paced generation long before its last token."""
    flags = ("--fake-tokens", "100000", "--fake-tokens-per-second", "500", "--max-model-len", "200000")
    async with running_fake(*flags) as replica, client_of(replica) as client:
        async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if "heard" in line:
                    break
        (ending,) = await replica.ended()
        assert ending["event"] == "aborted"
        assert 2 <= ending["tokens"] < 100000


async def test_the_first_requests_fail_and_the_next_succeed() -> None:
    """`--fake-fail-first` answers vLLM's busy body, or a plain 500, or closes without a byte."""
    async with running_fake("--fake-fail-first", "2") as replica:
        first, second, third = [await ask(replica) for _ in range(3)]
        assert [first.status_code, second.status_code, third.status_code] == [503, 503, 200]
        assert first.json()["error"] == {"message": BUSY, "type": "Service Unavailable", "param": None, "code": 503}
    async with running_fake("--fake-fail-first", "1", "--fake-fail-status", "500") as replica:
        assert (await ask(replica)).json()["error"]["type"] == "InternalServerError"
    async with running_fake("--fake-fail-first", "1", "--fake-fail-status", "0") as replica:
        with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
            await ask(replica)
        assert (await ask(replica)).status_code == 200


async def test_the_queue_limit_refuses_and_forgets() -> None:
    """Above the limit the engine is busy; a place that is given up can be taken again."""
    flags = ("--fake-queue-limit", "1", "--fake-stall-before-first-byte")
    async with running_fake(*flags) as replica:
        stalled = asyncio.create_task(ask(replica))
        await replica.requested(CHAT)
        assert (await ask(replica)).status_code == 503
        stalled.cancel()
        await asyncio.wait([stalled])
        assert await replica.ended() == [{"event": "aborted", "tokens": 0}]
        again = asyncio.create_task(ask(replica))
        await replica.requested(CHAT, 3)
        assert not again.done()
        again.cancel()
        await asyncio.wait([again])
        assert len(await replica.ended(2)) == 2


async def test_a_draining_replica_is_healthy_and_refuses() -> None:
    """While draining, health is 200 and a generation is a 500 with vLLM's words."""
    async with running_fake("--fake-draining") as replica, client_of(replica) as client:
        assert (await client.get("/health")).status_code == 200
        refused = await ask(replica)
        assert refused.status_code == 500
        assert refused.json()["error"]["message"] == "cannot schedule new futures after shutdown"


async def test_a_stream_that_is_dropped_ends_without_an_end() -> None:
    """`--fake-drop-after-tokens` sends that many tokens and closes in the middle of the body."""
    async with running_fake("--fake-drop-after-tokens", "3") as replica, client_of(replica) as client:
        parts: list[bytes] = []
        async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                await _read(answer, parts)
        assert text_of(events_in(b"".join(parts))) == "m1 heard hello"
        assert await replica.ended() == [{"event": "aborted", "tokens": 3}]


async def _read(answer: httpx.Response, parts: list[bytes]) -> None:
    async for part in answer.aiter_raw():
        parts.append(part)  # noqa: PERF401 - what came before an error is wanted


async def test_events_can_be_split_anywhere() -> None:
    """`--fake-split-bytes` cuts events, and characters, into pieces that readers get one by one."""
    async with running_fake("--fake-split-bytes", "2") as replica, client_of(replica) as client:
        async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            parts = [part async for part in answer.aiter_raw()]
        assert max(map(len, parts)) == 2
        with pytest.raises(UnicodeDecodeError):
            _ = [part.decode() for part in parts]
        assert "café 汉字" in text_of(events_in(b"".join(parts)))


async def test_the_death_of_the_engine() -> None:
    """After N requests the next one is cut by an error event and DONE, whole answers get a 500, and the rc is 0."""
    async with running_fake("--fake-crash-after-requests", "2") as replica:
        assert (await ask(replica)).status_code == 200
        assert (await ask(replica)).status_code == 200
        *_, error, done = await events_until_end(replica)
        assert error == {"error": {"message": DEAD, "type": "InternalServerError", "param": None, "code": 500}}
        assert done == "[DONE]"
        assert await replica.exited() == 0


async def test_everybody_in_the_engine_dies_with_it() -> None:
    """A whole answer that runs beside the fatal request is a 500, and the exit code is the one asked for."""
    flags = ("--fake-crash-after-requests", "1", "--fake-exit-code", "3", "--fake-tokens-per-second", "100")
    async with running_fake(*flags) as replica:
        beside = asyncio.create_task(ask(replica, max_tokens=10000, ignore_eos=True))
        await replica.requested(CHAT)
        events = await events_until_end(replica, max_tokens=4)
        assert text_of(events) == "m1 heard"
        assert events[-2]["error"]["code"] == 500
        answer = await beside
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, DEAD)
        assert await replica.exited() == 3


async def test_connections_are_refused_until_it_is_ready() -> None:
    """The port is taken early and listens late; the log says when."""
    async with running_fake("--fake-start-delay", "30", wait=False) as replica:
        with pytest.raises(httpx.ConnectError):
            await ask(replica)
        assert "startup complete" not in replica.output()
        os.kill(replica.pid, signal.SIGTERM)
        assert await replica.exited() == -signal.SIGTERM
    async with running_fake("--fake-start-delay", "0.05") as replica:
        assert "Application startup complete." in replica.output()


@pytest.mark.parametrize(
    "flags, code, last_words",
    [
        (["--fake-exit-while-starting", "1"], 1, "ValueError: Unsupported quantization config: bits=4, sym=False"),
        (["--fake-exit-while-starting", "4", "--fake-last-words", "KeyError: 'x'"], 4, "KeyError: 'x'"),
    ],
)
async def test_a_failure_to_start(flags: list[str], code: int, last_words: str) -> None:
    """It exits before it listens, with the code asked for and an error as its last line."""
    assert await _run(fake_argv(*flags)) == (code, last_words)


async def test_a_taken_port() -> None:
    """A port in use is a failure to start, with exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, last_words = await _run(fake_argv(port=taken.getsockname()[1]))
    assert (code, last_words) == (1, "OSError: [Errno 98] Address already in use")


async def _run(argv: list[str]) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(DEADLINE_SECONDS):
        _, said = await process.communicate()
    return process.returncode, said.decode().splitlines()[-1]


async def _first_event(lines: AsyncIterator[str]) -> None:
    async for line in lines:
        assert line.startswith("data: {")
        return


async def test_sigterm_drains_within_the_shutdown_timeout() -> None:
    """Streams in flight end, new generations are refused, health stays 200, and the rc is 0."""
    flags = ("--shutdown-timeout", "60", "--fake-stall-after-tokens", "2")
    async with running_fake(*flags) as replica, client_of(replica) as client:
        async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            lines = answer.aiter_lines()
            await _first_event(lines)
            os.kill(replica.pid, signal.SIGTERM)
            await eventually(lambda: "shutdown triggered" in replica.output() or None)
            assert (await client.get("/health")).status_code == 200
            assert (await ask(replica)).status_code == 500
            replica.resume()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await replica.exited() == 0
        assert replica.endings() == [{"event": "finished", "tokens": 16}]


async def test_sigterm_without_a_timeout_cuts_streams() -> None:
    """The default timeout is zero: a stream in flight ends without an end, and the rc is 0."""
    async with running_fake("--fake-stall-after-tokens", "1") as replica, client_of(replica) as client:
        async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            lines = answer.aiter_lines()
            await _first_event(lines)
            os.kill(replica.pid, signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                _ = [line async for line in lines]
        assert await replica.exited() == 0
        assert replica.endings() == [{"event": "aborted", "tokens": 1}]


async def test_a_replica_that_ignores_sigterm() -> None:
    """It goes on answering and only SIGKILL ends it."""
    async with running_fake("--fake-ignore-sigterm") as replica:
        os.kill(replica.pid, signal.SIGTERM)
        assert (await ask(replica)).status_code == 200
        os.kill(replica.pid, signal.SIGKILL)
        assert await replica.exited() == -signal.SIGKILL


async def test_the_child_outlives_a_kill_but_not_an_orderly_end() -> None:
    """SIGKILL orphans the child in the fake's group; SIGTERM takes it along; leaving the context kills the group."""
    async with running_fake("--fake-spawn-child") as killed:
        os.kill(killed.pid, signal.SIGKILL)
        await killed.exited()
        assert len(killed.members()) == 1
    await eventually(lambda: not killed.members() or None)
    async with running_fake("--fake-spawn-child") as ended:
        assert len(ended.members()) == 2
        os.kill(ended.pid, signal.SIGTERM)
        assert await ended.exited() == 0
        assert ended.members() == []


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
