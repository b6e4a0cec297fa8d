"""Requests keep to their mix, fit into the context, and come in the same lengths every time."""

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.capacity import Hardware, Shape
from serving.measuring.mix import default_mix, parse_mix, request_lengths, too_long, unique_prompt

GPU = Hardware(device="NVIDIA H100", count=1, unit="GPU")
CPU = Hardware(device="AMD EPYC", count=2, unit="core")
SHAPES = st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.1, 100))
MIXES = st.lists(SHAPES, min_size=1, max_size=4).map(
    lambda rows: parse_mix(",".join(f"{prompt}:{answer}:{share}" for prompt, answer, share in rows))
)


def test_shares_are_relative() -> None:
    """A mix is read in any unit of shares; without one, shapes are equally frequent."""
    assert [shape.share for shape in parse_mix("512:128:3,64:1024:1")] == [0.75, 0.25]
    assert parse_mix("8:16") == (Shape(prompt_tokens=8, answer_tokens=16, share=1),)


@pytest.mark.parametrize("text", ["", "8", "8:", "8:0", "0:8", "a:b", "8:8:0", "8:8:-1", "8:8:inf", "8:8:1:1", "8:8,"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    """The message shows the form."""
    with pytest.raises(ValueError, match="PROMPT:ANSWER:SHARE"):
        parse_mix(text)


@pytest.mark.parametrize(
    "hardware,max_model_len,longest",
    [(GPU, None, 1152), (GPU, 131072, 1152), (GPU, 512, 256), (CPU, 2048, 144), (CPU, None, 144), (CPU, 64, 32)],
)
def test_the_default_fits_the_machine(hardware: Hardware, max_model_len: int | None, longest: int) -> None:
    """An eighth as long on CPU, and never more than half of the context."""
    mix = default_mix(hardware, max_model_len)
    assert max(shape.prompt_tokens + shape.answer_tokens for shape in mix) == longest
    assert sum(shape.share for shape in mix) == 1


@given(MIXES, st.integers(1, 200))
def test_shapes_get_their_share(mix: tuple[Shape, ...], count: int) -> None:
    """After any number of requests no shape is more than two ahead of its share."""
    bounds = 8001
    lengths = list(islice(request_lengths(mix, bounds), count))
    assert len(lengths) == count
    if len({(shape.prompt_tokens, shape.answer_tokens) for shape in mix}) == len(mix) == 1:
        assert all(0.79 * mix[0].prompt_tokens - 1 <= each.prompt_tokens for each in lengths)
    assert all(each.prompt_tokens + each.answer_tokens <= bounds for each in lengths)


def test_shares_of_distant_shapes() -> None:
    """Twenty requests of a 3:1 mix are fifteen and five, in any twenty."""
    lengths = islice(request_lengths(parse_mix("1000:10:3,10:1000:1"), None), 20)
    assert Counter(each.prompt_tokens > 500 for each in lengths) == {True: 15, False: 5}


def test_lengths_repeat_and_differ() -> None:
    """Two levels get the same requests, which are not all alike."""
    mix = parse_mix("100:100")
    one, two = (list(islice(request_lengths(mix, 4096), 50)) for _ in range(2))
    assert one == two
    assert len({each.prompt_tokens for each in one}) > 10
    assert all(80 <= each.prompt_tokens <= 120 for each in one)


def test_a_shape_that_fills_the_context_is_sent_as_it_is() -> None:
    """Spread lengths that would not fit fall back to the shape itself."""
    lengths = list(islice(request_lengths(parse_mix("60:40"), 100), 50))
    assert all(each.prompt_tokens + each.answer_tokens <= 100 for each in lengths)


@pytest.mark.parametrize("longest,told", [(None, None), (144, None), (143, "128:16 needs 144 tokens of 143")])
def test_what_does_not_fit_is_told(longest: int | None, told: str | None) -> None:
    """A mix is held against the context before it is sent."""
    assert too_long(parse_mix("128:16,16:8"), longest) == told


def test_prompts_avoid_the_ends_of_the_vocabulary() -> None:
    """Special tokens lie there; and no two prompts are the same."""
    chance = random.Random(0)
    prompts = [unique_prompt(200, 1000, chance) for _ in range(20)]
    assert all(250 <= token < 938 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 20
