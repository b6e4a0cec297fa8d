"""The smoke test of a new variant: what is a problem, what the old variant is asked, and what real answers give."""

import json

import pytest

from gateway.rollout.content import Content
from gateway.rollout.smoke import PROMPTS, Answers, SmokeAnswer, SmokeClient, in_question, judge, read_answer
from serving.replica import Replica
from tests.fakes.running import running_fake

TOOL = PROMPTS[-1]


GOOD = SmokeAnswer(Content("Fine."), stopped=True)
CALL = SmokeAnswer(Content("", "", ('{"city": "Paris"}',)), stopped=True)
NO_CALL = SmokeAnswer(Content("Sunny."), stopped=True)
SOUND = {prompt.name: CALL if prompt.tools else GOOD for prompt in PROMPTS}


def with_answer(name: str, answer: SmokeAnswer) -> Answers:
    """Sound answers, but for one."""
    return {**SOUND, name: answer}


@pytest.mark.parametrize(
    "answer, problem",
    [
        (SmokeAnswer(Content("Fine."), stopped=False), "does not stop within"),
        (SmokeAnswer(Content("Fine."), stopped=True, finite=False), "is not finite"),
        (SmokeAnswer(Content(" "), stopped=True), "is empty"),
        (SmokeAnswer(Content("", "Hm."), stopped=True), "<think> is not closed"),
        (SmokeAnswer(Content("no " * 200), stopped=True), "repeats itself"),
        (SmokeAnswer(error="answered 500"), "answered 500"),
        (SmokeAnswer(error="answered 400", refused=True), "answered 400"),
    ],
)
def test_a_bad_answer(answer: SmokeAnswer, problem: str) -> None:
    """It is a problem, unless the old variant has the same; only that one prompt is in question."""
    new = with_answer("greeting", answer)
    (told,) = judge(new, SOUND)
    assert problem in told
    assert [prompt.name for prompt in in_question(new)] == ["greeting"]
    assert (judge(new, new) == ()) is (not answer.error or answer.refused)
    assert len(judge(new, {})) == 1


async def test_a_smoke_test_of_a_small_context() -> None:
    """Answers may take half of it; a prompt that does not fit is not answered by either variant."""
    client = SmokeClient()
    async with running_fake("--max-model-len", "400", "--fake-tokens", "1000") as fake:
        answers = await client.answers(Replica("new-1", "new", "int4", fake.url, "m1"), PROMPTS)
    await client.aclose()
    assert {answer.max_tokens for answer in answers.values()} == {200}
    assert [name for name, answer in answers.items() if answer.error] == ["long prompt"]
    assert not answers["greeting"].stopped


async def test_the_old_variant_is_asked_only_what_is_in_question() -> None:
    """A new variant that calls no tool: whether it should, the old one says; nothing else costs it a token."""
    client = SmokeClient()
    async with running_fake("--fake-tokens", "8") as new, running_fake("--fake-tokens", "8") as old:
        told = await client.problems(
            Replica("new-1", "new", "int4", new.url, "m1"), Replica("old-1", "old", "int4", old.url, "m1")
        )
        asked = [line["body"]["messages"][0]["content"] for line in old.requests("/v1/chat/completions")]
        assert len(new.requests("/v1/chat/completions")) == len(PROMPTS)
    await client.aclose()
    assert told == ()
    assert asked == [TOOL.text]


def test_a_smoke_test_without_answers() -> None:
    """It shows nothing, whatever the old variant does: it does not pass."""
    nothing = dict.fromkeys(SOUND, SmokeAnswer(error="answered 400"))
    assert judge(nothing, nothing) == ("smoke test: no prompt was answered; the first one: answered 400",)


def test_a_call_that_the_old_variant_makes() -> None:
    """A new variant has to make it, too; one that the old one does not make is not wanted."""
    without = with_answer(TOOL.name, NO_CALL)
    assert judge(SOUND, SOUND) == ()
    assert "no valid call of a tool" in judge(without, SOUND)[0]
    assert judge(without, without) == judge(without, {}) == ()


def test_an_old_variant_that_does_not_answer() -> None:
    """It excuses nothing: the new one may be worse."""
    away = SmokeAnswer(error="answered 503")
    (told,) = judge(with_answer(TOOL.name, NO_CALL), with_answer(TOOL.name, away))
    assert told.endswith("; the old variant did not answer: answered 503")


async def test_an_old_variant_without_tools() -> None:
    """It refuses them, as the new one does: nobody loses anything."""
    client = SmokeClient()
    async with running_fake("--fake-tokens", "8", tools=False) as fake:
        replica = Replica("new-1", "new", "int4", fake.url, "m1")
        answers = await client.answers(replica, [TOOL])
        assert answers[TOOL.name].refused
        assert await client.problems(replica, replica) == ()
    await client.aclose()


def test_another_context() -> None:
    """Two answers that do not stop are alike, whatever the limit of each was."""
    short, long = (SmokeAnswer(Content("Fine."), max_tokens=tokens) for tokens in (200, 512))
    assert judge(with_answer("greeting", short), with_answer("greeting", long)) == ()


def test_reading_an_answer() -> None:
    """NaN in log-probabilities is found; what is no chat completion is an error."""
    choice = {"message": {"content": "Hi"}, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -0.5}]}}
    assert read_answer(json.dumps({"choices": [choice]}).encode()) == SmokeAnswer(Content("Hi"), stopped=True)
    broken = json.dumps({"choices": [choice]}).replace("-0.5", "NaN")
    assert not read_answer(broken.encode()).finite
    assert read_answer(b"[]").error
