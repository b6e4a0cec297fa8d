"""What engines of each precision are like: one GPU and a model of 32B or of 14B weights.

The figures are arithmetic, not a measurement. A decode step reads all weights, so its base is their bytes by 3.35 TB/s
(H100) and 2 ms of overhead; what int8 and int4 gain there is 1.6 and 2.3 times the speed. A prompt is bound by compute:
2 FLOP for each weight and token at about 600 TFLOP/s, and little changes with the precision. What the weights leave of
76 GB holds KV, 262 kB a token for 32B and 197 kB for 14B.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine: a step takes its base, and something for each token read, each answer continued, each token kept."""

    precision: str
    base_seconds: float
    read_token_seconds: float
    answer_seconds: float
    kept_token_seconds: float
    kv_blocks: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError("every place must have its token in each step")

    @property
    def kv_capacity_tokens(self) -> int:
        """How many tokens fit into its KV memory."""
        return self.kv_blocks * self.block_tokens

    def step_seconds(self, read_tokens: int, answers: int, kept_tokens: int) -> float:
        """How long one step takes."""
        return (
            self.base_seconds
            + read_tokens * self.read_token_seconds
            + answers * self.answer_seconds
            + kept_tokens * self.kept_token_seconds
        )

    def with_cache(self, capacity: float, reading: float) -> "Profile":
        """The same engine whose KV cache holds so many times the tokens, each read in so many times the seconds."""
        blocks = int(self.kv_blocks * capacity)
        return replace(self, kv_blocks=blocks, kept_token_seconds=self.kept_token_seconds * reading)

    def slowed(self, factor: float) -> "Profile":
        """The same engine where everything takes so many times as long."""
        return replace(
            self,
            base_seconds=self.base_seconds * factor,
            read_token_seconds=self.read_token_seconds * factor,
            answer_seconds=self.answer_seconds * factor,
            kept_token_seconds=self.kept_token_seconds * factor,
        )


def _profile(precision: str, base_ms: float, read_us: float, kept_ns: float, kv_tokens: int) -> Profile:
    return Profile(
        precision=precision,
        base_seconds=base_ms / 1e3,
        read_token_seconds=read_us / 1e6,
        answer_seconds=60e-6,
        kept_token_seconds=kept_ns / 1e9,
        kv_blocks=kv_tokens // BLOCK_TOKENS,
    )


MODELS: Mapping[str, Mapping[str, Profile]] = {
    "32b": {
        "bf16": _profile("bf16", 22.0, 107, 78, 34_000),
        "int8": _profile("int8", 13.7, 110, 78, 156_000),
        "int4": _profile("int4", 9.6, 116, 78, 213_000),
        # A provider's: as far as we can tell, it never fills up.
        "external": _profile("external", 15.0, 2, 1, 10_000_000),
    },
    "14b": {
        "bf16": _profile("bf16", 10.7, 47, 59, 220_000),
        "int8": _profile("int8", 6.7, 48, 59, 300_000),
        "int4": _profile("int4", 4.7, 51, 59, 335_000),
    },
}

# top1_agreement of each precision, as a ladder would have it measured.
QUALITY: Mapping[str, float] = {"bf16": 1.0, "int8": 0.985, "int4": 0.93, "external": 0.9}


@dataclass(frozen=True, slots=True)
class Member:
    """One replica of the fleet that is simulated; `alias` is the number of the only alias that it answers."""

    id: str
    profile: Profile
    agreement: float
    alias: int = 0

    @property
    def precision(self) -> str:
        """Its variant's precision."""
        return self.profile.precision

    @property
    def variant(self) -> str:
        """Its variant's name: the precision, where there is one alias only."""
        return f"{self.precision}.{self.alias}" if self.alias else self.precision


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas of one alias, or of several that are alike; rungs are precisions, the best first."""

    members: tuple[Member, ...]

    @property
    def aliases(self) -> int:
        """How many aliases it has."""
        return 1 + max(member.alias for member in self.members)

    @property
    def rungs(self) -> tuple[str, ...]:
        """Its precisions, the best first."""
        best_first = sorted(self.members, key=lambda member: -member.agreement)
        return tuple(dict.fromkeys(member.precision for member in best_first))

    def only(self, precision: str) -> "Fleet":
        """The replicas of one rung."""
        return Fleet(tuple(member for member in self.members if member.precision == precision))

    def of(self, precision: str, alias: int) -> tuple[Member, ...]:
        """The replicas of one rung of one alias."""
        return tuple(member for member in self.members if (member.precision, member.alias) == (precision, alias))

    def with_cache(self, capacity: float, reading: float) -> "Fleet":
        """The same fleet with another KV cache in every engine."""
        changed = (replace(each, profile=each.profile.with_cache(capacity, reading)) for each in self.members)
        return Fleet(tuple(changed))

    def named(self, replica: str) -> Member:
        """One of its replicas."""
        return next(member for member in self.members if member.id == replica)

    def __str__(self) -> str:
        return ", ".join(f"{rung} x{len(self.only(rung).members)}" for rung in self.rungs)


def fleet_of(model: str, counts: Mapping[str, int], aliases: int = 1) -> Fleet:
    """Make a fleet of so many replicas of each precision for each alias."""
    return Fleet(
        tuple(
            Member(
                f"{precision}.{alias}-{number + 1}" if alias else f"{precision}-{number + 1}",
                MODELS[model][precision],
                QUALITY[precision],
                alias,
            )
            for alias in range(aliases)
            for precision, count in counts.items()
            for number in range(count)
        )
    )
