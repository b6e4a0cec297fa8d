"""Every family, however it thinks, in all three shapes, whole and streamed: vLLM's own parsers, then our shapes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import pytest
from msgspec.structs import replace as changed

from config.schema import Floor, LimitSettings
from gateway.openai.endpoints import CHAT
from gateway.openai.reasoning import ReasoningFormat, Shape
from gateway.openai.request import parse_request
from gateway.proxy.exchange import reasoning_format
from gateway.routing.target import Target
from serving.replica import Replica, ThinkTag
from serving.templates.derive import TemplateRequirements, derived
from serving.templates.render import renderer
from serving.templates.source import ChatTemplate
from tests.fakes.running import ROOT
from tests.reasoning.clients import Read, read_stream, read_whole
from tests.serving.templates import families

pytestmark = [
    # vLLM takes half a minute to import where no byte-code is kept.
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# `<think>` in the tokenizer of the program below: behind 256 bytes and two marks of a turn.
THINK_TOKEN = 258
THOUGHT, ANSWER = 'Okay.\n<b>One</b> \\ "one" 汉 é.\n', "\n\nIt is 2."
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@dataclass(frozen=True, slots=True)
class Family:
    """A template, who writes the tag with it, and whether the tags are tokens of the model."""

    template: str
    think: ThinkTag
    tags: bool = True

    @property
    def replica(self) -> Replica:
        """A replica as it is after it was looked at."""
        token = THINK_TOKEN if self.think == "model" else None
        return Replica("r", "v", "int4", "http://r", "m1", think=self.think, think_token=token)


FAMILIES = {
    "qwq": Family(families.QWQ, "injected"),
    "r1": Family(families.R1, "injected"),
    "qwen3": Family(families.QWEN3, "model"),
    "qwen3 with prefix": Family(derived(ChatTemplate(families.QWEN3), TemplateRequirements(prefix=True)), "injected"),
    "smollm with prefix": Family(
        derived(ChatTemplate(families.PLAIN), TemplateRequirements(True, True)), "injected", tags=False
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What a model generates, and what clients get of it; what is raw is always what was generated.

    `streamed` is what they get where a stream can't know what a whole answer does.
    """

    family: str
    name: str
    generated: str
    parsed: Read
    restored: str
    finish: str = "stop"
    stop_reason: str | None = None
    asked: str = "{}"
    streamed: tuple[Read, str] | None = None

    def expected(self, shape: Shape, *, stream: bool) -> Read:
        """What a client gets."""
        parsed, restored = self.streamed if stream and self.streamed else (self.parsed, self.restored)
        if shape == "parsed":
            return replace(parsed, mirrored=parsed.reasoning)
        return Read(content=restored if shape == "restored" else self.generated)


def _rows() -> Iterator[Row]:
    for name, family in FAMILIES.items():
        injected = family.think == "injected"
        tag, blank = ("", "") if injected else ("<think>", "\n")
        thought, answer = blank + THOUGHT, ANSWER.strip()
        open_thought = f"<think>\n{THOUGHT}"
        thinks = f"{tag}{thought}</think>{ANSWER}"
        yield Row(name, "thinks", thinks, Read(thought, ANSWER), f"{open_thought}</think>{ANSWER}")
        yield Row(name, "truncated in the thought", tag + thought, Read(thought), open_thought, finish="length")
        yield Row(name, "stopped in the thought", tag + thought, Read(thought), open_thought, stop_reason="é")
        yield Row(
            name,
            "truncated",
            thinks[:-3],
            Read(thought, ANSWER[:-3]),
            f"{open_thought}</think>{ANSWER[:-3]}",
            finish="length",
        )
        closes = f"{tag}\n</think>{ANSWER}"
        yield Row(name, "skips by closing at once", closes, Read("\n", ANSWER), f"<think>\n</think>{ANSWER}")
        # Only the end tells that nothing else comes: a stream has called it reasoning by then, and repeats it.
        repeated = (Read(answer, answer), f"<think>\n{answer}</think>\n\n{answer}")
        skipped = Read(content=answer)
        yield Row(name, "skips", answer, skipped, answer, streamed=repeated if injected else None)
        if not injected:
            yield Row(name, "skips, truncated", answer, skipped, answer, finish="length")
            unanswered = Read(thought)
            yield Row(name, "ends in the thought", tag + thought, unanswered, open_thought)
        yield Row(name, "off", answer, skipped, answer, asked=json.dumps(OFF))
        yield Row(name, "off by effort", answer, skipped, answer, asked='{"reasoning_effort": "none"}')
        yield Row(name, "off, truncated", answer, skipped, answer, asked=json.dumps(OFF), finish="length")


ROWS = tuple(_rows())
SHAPES: tuple[Shape, ...] = get_args(Shape)
# How many tokens come in one event: one each, some, all.
STEPS = (1, 3, 1000)
Answers = dict[tuple[Row, int | None, int], tuple[bytes, ReasoningFormat]]


def manner_and_body(row: Row, step: int | None, choices: int) -> tuple[ReasoningFormat, dict[str, Any]]:
    """What the gateway sends for a client's request, and how it will tell the answer."""
    body = {"model": "alias", "messages": [{"role": "user", "content": "1+1?"}], "n": choices, **json.loads(row.asked)}
    raw = json.dumps({**body, "stream": step is not None}).encode()
    inference = parse_request(CHAT, raw, {b"content-type": b"application/json"}, LimitSettings())
    manner = reasoning_format(inference, Target("alias", (), Floor(), pinned=False), FAMILIES[row.family].replica)
    return manner, json.loads(inference.body_for("m1", token_ids=manner.hides_token_ids))


def line_for(row: Row, step: int | None, body: dict[str, Any]) -> dict[str, Any]:
    """A line for the program that answers as vLLM does; a second choice comes in other pieces."""
    family = FAMILIES[row.family]
    prompt = renderer(family.template)(body["messages"], **body.get("chat_template_kwargs", {}))
    tokens = re.findall("<think>|</think>|.", row.generated, re.DOTALL)
    sizes = [step or 1, 2 * (step or 1)][: body["n"]]
    pieces = [["".join(tokens[at : at + size]) for at in range(0, len(tokens), size)] for size in sizes]
    ending = {"finish": row.finish, "stop_reason": row.stop_reason}
    return {"tags": family.tags, "request": body, "prompt": prompt, "choices": pieces, **ending}


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Everything that vLLM answers, from one process."""
    cases = list(product(ROWS, (None, *STEPS), (1, 2)))
    sent = [manner_and_body(*case) for case in cases]
    lines = [json.dumps(line_for(row, step, body)) for (row, step, _), (_, body) in zip(cases, sent, strict=True)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.reasoning.vllm_answers"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="\n".join(lines), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads(line)["answer"].encode() for line in done.stdout.splitlines() if line.startswith('{"answer"')]
    return {case: (answer, manner) for case, answer, (manner, _) in zip(cases, told, sent, strict=True)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.family}: {row.name}")
def test_what_clients_get(answers: Answers, row: Row, shape: Shape) -> None:
    """The same in a whole answer and in a stream, however it is cut, with one choice and with two."""
    for choices in (1, 2):
        answer, manner = answers[row, None, choices]
        assert read_whole(answer, changed(manner, shape=shape)) == [row.expected(shape, stream=False)] * choices
        for step in STEPS:
            stream, manner = answers[row, step, choices]
            read = read_stream(stream, changed(manner, shape=shape))
            at_once = row.streamed is not None and step >= len(row.generated) and shape != "raw"
            assert read == [row.expected(shape, stream=not at_once)] * choices, (step, choices)
