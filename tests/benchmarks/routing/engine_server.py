"""Engines in real time: `python -m tests.benchmarks.routing.engine_server MODEL bf16=2,int4=1 PORT...`, a port each.

Each answers OpenAI's streaming chat completions a chunk for every token, when the model of an engine says so, and what
vLLM says at /metrics, /v1/models, /health and /v1/chat/completions/render. An answer is as long as `seed` says, which
routers pass on and nobody reads for a length. `system_fingerprint` names the replica. /late tells how late steps ended,
in seconds.
"""

import asyncio
import json
import socket
import sys
from dataclasses import dataclass, field
from itertools import count

import uvloop

from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.routing.engine import Engine, Job
from tests.benchmarks.routing.profiles import Fleet, Member, fleet_of
from tests.benchmarks.routing.texts import TOKEN_BYTES, chain_of, ids_of, prompt_of, words
from tests.fakes.http_server import Reply, Request, Server

HOST = "127.0.0.1"
MODEL = "served"
CONTEXT_TOKENS = 32_768

_SAME = '"created":1700000000,"model":"served"'
_CHUNK = (
    'data: {"id":"chatcmpl-%s","object":"chat.completion.chunk",'
    + _SAME
    + ',"system_fingerprint":"%s","choices":[{"index":0,"delta":{%s},"logprobs":null,"finish_reason":%s}]}\n\n'
)
_USAGE = (
    'data: {"id":"chatcmpl-%s","object":"chat.completion.chunk",'
    + _SAME
    + ',"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
    '"prompt_tokens_details":{"cached_tokens":%d}}}\n\n'
)
_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{%(labels)s} %(running)d
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{%(labels)s} %(waiting)d
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{%(labels)s} %(kv_usage).6f
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{%(labels)s} %(prompt_tokens)d
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{%(labels)s} %(generated_tokens)d
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{%(labels)s} %(queried_tokens)d
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{%(labels)s} %(hit_tokens)d
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{%(labels)s} %(preemptions)d
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{engine="0",block_size="%(block)d",num_gpu_blocks="%(blocks)d",\
kv_cache_size_tokens="%(kv_tokens)d"} 1.0
"""


@dataclass(eq=False, slots=True)
class _Answer:
    """One answer under way: tokens made but not yet written, and how many were."""

    job: Job
    text: str
    told: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    made: int = 0


class Replica:
    """One engine, stepped by the clock; owns its answers."""

    def __init__(self, member: Member, late: list[float]) -> None:
        self.member, self.engine = member, Engine(member.profile)
        self._late = late
        self._answers: dict[Job, _Answer] = {}
        self._numbers = count()
        self._stepping = False

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        if request.path == "/v1/chat/completions":
            await self._chat(json.loads(request.body), reply)
        elif request.path == "/v1/chat/completions/render":
            # vLLM's entrypoints/scale_out/render: what vllm-router's cache_aware and kv_aware ask before they choose.
            prompt = prompt_of(json.loads(request.body)["messages"])
            await reply.send_json(200, {"request_id": "render", "model": MODEL, "token_ids": ids_of(prompt)})
        elif request.path == "/metrics":
            await reply.send(200, self._metrics().encode(), "text/plain; version=0.0.4")
        elif request.path == "/v1/models":
            card = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": CONTEXT_TOKENS}
            await reply.send_json(200, {"object": "list", "data": [card]})
        elif request.path == "/late":
            late = self._late or [0.0]
            await reply.send_json(200, {str(percent): percentile(late, percent) for percent in (50, 99, 100)})
        else:
            await reply.send_json(200, {})

    async def _chat(self, asked: dict[str, object], reply: Reply) -> None:
        answer = self._asked(asked)
        options = asked.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        try:
            await self._stream(answer, reply, wants_usage=wants_usage)
        finally:
            if self._answers.pop(answer.job, None) is not None:
                self.engine.give_up(answer.job)

    def _asked(self, asked: dict[str, object]) -> _Answer:
        messages = asked["messages"]
        assert isinstance(messages, list)
        prompt = prompt_of(messages)
        tokens, number = int(str(asked.get("seed") or 16)), next(self._numbers)
        text = words(f"{self.member.id} {number}", tokens)
        job = Job(number, max(len(prompt) // TOKEN_BYTES, 1), tokens, chain_of((prompt + text).encode()))
        answer = self._answers[job] = _Answer(job, text)
        self.engine.submit(job)
        if not self._stepping:
            self._step(asyncio.get_running_loop().time())
        return answer

    async def _stream(self, answer: _Answer, reply: Reply, *, wants_usage: bool) -> None:
        job, name, id_ = answer.job, self.member.id, f"{self.member.id}-{answer.job.key}"
        await answer.news.wait()
        await reply.start_stream("text/event-stream; charset=utf-8", {})
        chunks = [_CHUNK % (id_, name, '"role":"assistant","content":""', "null")]
        while True:
            answer.news.clear()
            for place in range(answer.told, answer.made):
                token = answer.text[place * TOKEN_BYTES : (place + 1) * TOKEN_BYTES]
                chunks.append(_CHUNK % (id_, name, f'"content":"{token}"', "null"))
            answer.told = answer.made
            if answer.told == job.answer_tokens:
                break
            await reply.write("".join(chunks).encode())
            chunks = []
            await answer.news.wait()
        chunks.append(_CHUNK % (id_, name, "", '"length"'))
        if wants_usage:
            counts = (job.prompt_tokens, job.answer_tokens, job.prompt_tokens + job.answer_tokens, job.cached_tokens)
            chunks.append(_USAGE % (id_, *counts))
        chunks.append("data: [DONE]\n\n")
        await reply.write("".join(chunks).encode())
        await reply.end_stream()

    def _step(self, begun_at: float) -> None:
        """Begin the next step when the last one should have ended, whenever this program noticed."""
        seconds = self.engine.begin()
        self._stepping = seconds is not None
        if seconds is not None:
            asyncio.get_running_loop().call_at(begun_at + seconds, self._end_step, begun_at + seconds)

    def _end_step(self, due: float) -> None:
        self._late.append(asyncio.get_running_loop().time() - due)
        made = self.engine.end()
        for job in (*made.first, *self.engine.under_way()):
            answer = self._answers.get(job)
            if answer is not None:
                answer.made = self.engine.made_of(job)
                answer.news.set()
        for job in made.ended:
            answer = self._answers.pop(job, None)
            if answer is not None:
                answer.made = job.answer_tokens
                answer.news.set()
        self._step(due)

    def _metrics(self) -> str:
        gauges, profile = self.engine.gauges, self.member.profile
        return _METRICS % {
            "labels": f'engine="0",model_name="{MODEL}"',
            **{name: getattr(gauges, name) for name in gauges.__dataclass_fields__},
            "block": profile.block_tokens,
            "blocks": profile.kv_blocks,
            "kv_tokens": profile.kv_capacity_tokens,
        }


async def serve(fleet: Fleet, ports: list[int]) -> None:
    """Serve every member at a port of its own, for ever."""
    late: list[float] = []
    for member, port in zip(fleet.members, ports, strict=True):
        bound = socket.create_server((HOST, port), backlog=2048)
        server = Server(Replica(member, late).handle, keep_alive_seconds=600, piece_bytes=None)
        await server.listen(bound)
    await asyncio.Event().wait()


def counts_of(text: str) -> dict[str, int]:
    """Read `bf16=2,int4=1`; ValueError if it is nothing of the kind."""
    return {name: int(number) for name, _, number in (part.partition("=") for part in text.split(","))}


if __name__ == "__main__":
    uvloop.run(serve(fleet_of(sys.argv[1], counts_of(sys.argv[2])), [int(port) for port in sys.argv[3:]]))
