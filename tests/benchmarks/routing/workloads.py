"""What clients ask, and when: drawn from a seed, so that every policy meets the very same requests.

Arrivals are open: conversations begin whether or not earlier ones were answered. Within one, the next turn comes when
the answer is there and has been read.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.routing.profiles import BLOCK_TOKENS

_STREAM_BLOCKS = 1 << 20  # the n-th block of the m-th text is called m * _STREAM_BLOCKS + n

Rate = Callable[[float], float]  # conversations a second, by the time since the start


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `chain` names the blocks of everything up to the end of its answer.

    `shared_tokens` of its prompt are a text that other conversations begin with, too. `think_seconds` pass between the
    end of its answer and the next turn. `floor` is the least top1_agreement that its client accepts.
    """

    key: int
    session: str
    number: int
    prompt_tokens: int
    answer_tokens: int
    shared_tokens: int
    chain: tuple[int, ...]
    think_seconds: float
    floor: float | None = None

    @property
    def prompt_blocks(self) -> tuple[int, ...]:
        """The names of the blocks that its prompt fills."""
        return self.chain[: self.prompt_tokens // BLOCK_TOKENS]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Its first turn comes at `at_seconds`, whatever happens to others."""

    at_seconds: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal: half are longer than the median, and `sigma` is the spread of the logarithm."""

    median_tokens: float
    sigma: float
    most_tokens: int

    def draw(self, chance: random.Random) -> int:
        """Draw one length."""
        drawn = chance.lognormvariate(math.log(self.median_tokens), self.sigma)
        return max(1, min(round(drawn), self.most_tokens))

    @property
    def mean_tokens(self) -> float:
        """The mean, the cut at the most left aside."""
        return self.median_tokens * math.exp(self.sigma**2 / 2)


@dataclass(frozen=True, slots=True)
class Mix:
    """Who asks: lengths of what a turn adds and of its answer, how many turns, how long people read.

    `systems` are the lengths of system prompts; a conversation begins with one of them, the first ones more often.
    """

    asked: Lengths = Lengths(260, 1.0, 6000)
    answered: Lengths = Lengths(170, 0.8, 1500)
    mean_turns: float = 2.0
    think_seconds: float = 12.0
    systems: tuple[int, ...] = (1200, 700, 350, 90)
    most_context_tokens: int = 12_000
    strict_share: float = 0.0  # of conversations whose floor is `strict_floor`
    strict_floor: float = 0.99


CHATS = Mix()
SINGLE = Mix(mean_turns=1.0, systems=(0,))


def arrivals(rate: Rate, most_per_second: float, seconds: float, chance: random.Random) -> Iterator[float]:
    """Poisson arrivals at a rate that changes: thinned from a constant one, which it must never exceed."""
    now = 0.0
    while (now := now + chance.expovariate(most_per_second)) < seconds:
        if chance.random() * most_per_second < rate(now):
            yield now


def constant(per_second: float) -> Rate:
    """The same rate all the time."""
    return lambda _: per_second


def square(low: float, high: float, period_seconds: float) -> Rate:
    """The low rate for half of each period, then the high one."""
    return lambda now: high if now % period_seconds >= period_seconds / 2 else low


def ramp(low: float, high: float, seconds: float) -> Rate:
    """Up in a straight line until half time, and down again; a tenth of the time at each end at the low rate."""

    def rate(now: float) -> float:
        way = min(max((now / seconds - 0.1) / 0.8, 0.0), 1.0)
        return low + (high - low) * (1 - abs(2 * way - 1))

    return rate


def conversations(
    rate: Rate, most_per_second: float, seconds: float, *, mix: Mix = CHATS, seed: int = 1
) -> list[Conversation]:
    """Draw everything that is asked in so many seconds; rates are of turns: conversations come the more rarely."""
    chance = random.Random(seed)
    turns, made, key = mix.mean_turns, list[Conversation](), 0
    weights = [1 / (place + 1) for place in range(len(mix.systems))]
    for number, at in enumerate(arrivals(lambda now: rate(now) / turns, most_per_second / turns, seconds, chance)):
        system = chance.choices(range(len(mix.systems)), weights)[0]
        conversation = Conversation(at, tuple(_turns(number, key, system, mix, chance)))
        made.append(conversation)
        key += len(conversation.turns)
    return made


def _turns(number: int, key: int, system: int, mix: Mix, chance: random.Random) -> Iterator[Turn]:
    shared = mix.systems[system]
    floor = mix.strict_floor if chance.random() < mix.strict_share else None
    text = len(mix.systems) + number
    context, turn = shared, 0
    while True:
        prompt = context + mix.asked.draw(chance)
        answer = mix.answered.draw(chance)
        if turn and prompt + answer > mix.most_context_tokens:
            return
        chain = _chain(system, text, shared, prompt + answer)
        think = chance.expovariate(1 / mix.think_seconds)
        yield Turn(key + turn, f"s{number}", turn, prompt, answer, shared, chain, think, floor)
        context, turn = prompt + answer, turn + 1
        if chance.random() * mix.mean_turns < 1:
            return


def _chain(system: int, text: int, shared: int, tokens: int) -> tuple[int, ...]:
    """Name the full blocks of a text that begins with a system prompt: equal names, equal text up to there."""
    common = min(shared, tokens) // BLOCK_TOKENS
    names: Sequence[int] = range(text * _STREAM_BLOCKS + common, text * _STREAM_BLOCKS + tokens // BLOCK_TOKENS)
    return (*range(system * _STREAM_BLOCKS, system * _STREAM_BLOCKS + common), *names)
