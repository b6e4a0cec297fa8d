"""The smoke test of a new variant: a fixed set of prompts, each answer judged by itself or beside the old variant's."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from gateway.rollout.content import Content, is_looping, read_content
from serving.clients import Clients, root_of
from serving.errors import ProbeFailed
from serving.probe import Probe
from serving.replica import Replica

TIMEOUT_SECONDS = 180.0
# Client errors that another attempt may not get.
TRANSIENT = (408, 409, 425, 429)
# Of an answer; at most half of the engine's context.
MAX_TOKENS = 512
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, slots=True)
class SmokePrompt:
    """A prompt; with `tools`, the answer should call one where the old variant's does."""

    name: str
    text: str
    tools: bool = False


PROMPTS = (
    SmokePrompt("greeting", "Hello! Answer in one short sentence."),
    SmokePrompt("arithmetic", "What is 17 + 25? Answer with the number."),
    SmokePrompt("other language", "Wie heißt die Hauptstadt von Frankreich? Antworte kurz."),
    SmokePrompt("code", "Write a Python function that returns the larger of two numbers. Only code."),
    SmokePrompt("long prompt", "Summarize in one sentence: " + "The river rose, and the town moved uphill. " * 60),
    SmokePrompt("tool", "What is the weather in Paris? Use the tool.", tools=True),
)


@dataclass(frozen=True, slots=True)
class SmokeAnswer:
    """An answer of a variant: its content, whether it stopped by itself, and whether log-probabilities are finite."""

    content: Content | None = None
    stopped: bool = False
    finite: bool = True
    error: str = ""
    refused: bool = False  # the error is the engine's answer to the request: a repetition would change nothing
    max_tokens: int = MAX_TOKENS

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with it."""
        content = self.content
        return not self.error and self.finite and self.stopped and content is not None and not content.events


Answers = Mapping[str, SmokeAnswer]  # by the name of a prompt


def in_question(new: Answers) -> tuple[SmokePrompt, ...]:
    """Return the prompts that only the old variant's answers decide about: what it cannot do either is no problem."""
    return tuple([prompt for prompt in PROMPTS if _problem_of(prompt, new[prompt.name])[0]])


def judge(new: Answers, old: Answers) -> tuple[str, ...]:
    """Return the problems of the new variant's answers; what the old one cannot do either is none.

    `old` has answers to the prompts that are `in_question`, or to none: then every answer is judged by itself, and
    nobody can say whether a tool should be called. An old variant that is away or overloaded excuses nothing.
    Without any answer of the new variant nothing is shown.
    """
    if all(answer.error for answer in new.values()):
        return (f"smoke test: no prompt was answered; the first one: {new[PROMPTS[0].name].error}",)
    problems = []
    for prompt in in_question(new):
        kind, problem = _problem_of(prompt, new[prompt.name])
        if (other := old.get(prompt.name)) is None:
            if not prompt.tools:
                problems.append(f"smoke test {prompt.name!r}: {problem}")
        elif other.error and not other.refused:
            problems.append(f"smoke test {prompt.name!r}: {problem}; the old variant did not answer: {other.error}")
        elif _problem_of(prompt, other)[0] != kind:
            problems.append(f"smoke test {prompt.name!r}: {problem}")
    return tuple(problems)


def _problem_of(prompt: SmokePrompt, answer: SmokeAnswer) -> tuple[str, str]:
    """The kind of an answer's problem, and a description; both are empty if there is none."""
    if not prompt.tools:
        return _problem(answer)
    calls = answer.content is not None and bool(answer.content.calls) and answer.is_sound
    return ("", "") if calls else ("no call", "no valid call of a tool, where the old variant makes one")


def _problem(answer: SmokeAnswer) -> tuple[str, str]:
    if answer.error:
        return "refused" if answer.refused else "error", answer.error
    if not answer.finite:
        return "not finite", "a log-probability is not finite"
    content = answer.content
    if content is None or content.is_empty:
        return "empty", "the answer is empty"
    if is_looping(content.text) or is_looping(content.reasoning):
        return "looping", "the answer repeats itself"
    if content.has_open_thinking:
        return "open thinking", "<think> is not closed"
    return ("", "") if answer.stopped else ("endless", f"the answer does not stop within {answer.max_tokens} tokens")


class SmokeClient:
    """Sends the prompts to replicas; an async context manager."""

    def __init__(self) -> None:
        self._clients = Clients(httpx.Timeout(TIMEOUT_SECONDS))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._clients.aclose()

    async def problems(self, new: Replica, old: Replica | None) -> tuple[str, ...]:
        """Run the smoke test of a replica; one of the old variant answers what the test leaves in question."""
        answers = await self.answers(new, PROMPTS)
        return judge(answers, {} if old is None else await self.answers(old, in_question(answers)))

    async def answers(self, replica: Replica, prompts: Sequence[SmokePrompt]) -> dict[str, SmokeAnswer]:
        """Answer prompts, all at once: an engine batches them."""
        if not prompts:
            return {}
        max_tokens = await self._max_tokens(replica)
        answers = await asyncio.gather(*[self._answer(replica, prompt, max_tokens) for prompt in prompts])
        return {
            prompt.name: replace(answer, max_tokens=max_tokens) for prompt, answer in zip(prompts, answers, strict=True)
        }

    async def _max_tokens(self, replica: Replica) -> int:
        """How long answers may be, so that they fit an engine's context beside the prompt."""
        try:
            async with Probe() as probe:
                context = (await probe.served_model(replica)).max_model_len_tokens
        except ProbeFailed:
            context = None
        return MAX_TOKENS if context is None else min(MAX_TOKENS, context // 2)

    async def _answer(self, replica: Replica, prompt: SmokePrompt, max_tokens: int) -> SmokeAnswer:
        body: dict[str, Any] = {
            "model": replica.served_name,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
        }
        if prompt.tools:
            body |= {"tools": [TOOL]}
        headers = {"authorization": f"Bearer {replica.api_key}"} if replica.api_key else {}
        client = self._clients.reaching(replica.url, replica.tls)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reply = await client.post(f"{root_of(replica.url)}/v1/chat/completions", json=body, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            return SmokeAnswer(error=f"no answer: {error or type(error).__name__}")
        if reply.is_error:
            refused = reply.is_client_error and reply.status_code not in TRANSIENT
            return SmokeAnswer(error=f"answered {reply.status_code}: {reply.text[:200]}", refused=refused)
        return read_answer(reply.content)


def read_answer(body: bytes) -> SmokeAnswer:
    """Read a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        entries = (choice.get("logprobs") or {}).get("content") or []
        finite = all(math.isfinite(float(entry["logprob"])) for entry in entries)
        return SmokeAnswer(read_content(body), choice["finish_reason"] != "length", finite)
    except (ValueError, LookupError, TypeError, AttributeError):
        return SmokeAnswer(error="the answer is not a chat completion")
