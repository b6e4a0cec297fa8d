"""How gateways share limits: sums that hold whatever happens, and shares that follow demand."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import RateLimited
from gateway.keys import Caller
from gateway.quota import Quota, RunningRequest
from gateway.quota_shares import MIN_SHARE, Claim, KeyQuota, Limits, Use, changes, decoded, renewed
from serving.state.quotas import QuotaRecords

NAMES = "abcde"
USES = st.builds(
    Use, st.integers(0, 50), st.integers(0, 50), st.integers(0, 500), st.integers(0, 3), st.integers(0, 20)
)
REPORTS = st.lists(st.tuples(st.sampled_from(NAMES), USES, st.floats(0, 5)), max_size=40)
LIMITS = st.builds(Limits, st.integers(1, 600), st.integers(1, 10_000), st.integers(1, 12))


@given(LIMITS, REPORTS, st.sets(st.sampled_from(NAMES), min_size=1))
def test_shares_add_up_to_at_most_one(limits: Limits, reports: list[tuple[str, Use, float]], first: set[str]) -> None:
    """Whoever reports what and when, comes and dies; slots exceed the limit by no more than what runs anyway."""
    quota: KeyQuota | None = None
    now, live, last = 1e9, set(first), dict.fromkeys(NAMES, Use())
    for number, (worker, use, seconds) in enumerate(reports):
        now += seconds
        live = live | {worker} if number % 7 else {worker}  # now and then all others are dead
        quota, last[worker] = renewed(quota, limits, worker, use, sorted(live), now), use
        if quota is None:
            continue
        claims = quota.claims
        assert set(claims) <= live
        assert sum(claim.share for claim in claims.values()) <= 1 + 1e-9
        assert min(claim.share for claim in claims.values()) >= 0
        assert limits.concurrency is not None
        running = sum(last[name].running for name in claims)
        assert sum(claim.slots for claim in claims.values()) <= limits.concurrency + running


@dataclass
class Cluster:
    """Gateways in virtual time, which share one key; each reports once a second, at a moment of its own.

    Each answer has so many `tokens`.
    """

    count: int
    caller: Caller
    tokens: int = 0
    now: float = 1e6
    documents: dict[str, str] = field(default_factory=dict)
    quotas: list[Quota] = field(init=False)
    reported: dict[int, float] = field(default_factory=dict)
    away: bool = False
    admitted: list[float] = field(default_factory=list)
    shares: list[dict[str, Claim]] = field(default_factory=list)
    ticks: int = 0

    def __post_init__(self) -> None:
        self.quotas = [Quota(1 / self.count) for _ in range(self.count)]

    def report(self, index: int) -> None:
        """Report what a gateway has used, as `QuotaLeases` does."""
        names = tuple(NAMES[: self.count])
        records = QuotaRecords(self.now + 5e8, names, self.documents)  # the clock of the database is another one
        age_seconds = self.now - self.reported.get(index, self.now)
        found = changes(records, NAMES[index], self.quotas[index].take_report(), age_seconds)
        self.reported[index] = self.now
        self.documents = {name: document for name, document in found.items() if document is not None}
        held = {name: quota for name, document in self.documents.items() if (quota := decoded(document))}
        self.quotas[index].hold(NAMES[index], held, 1 / self.count, self.now)

    def ask(self, index: int) -> RunningRequest | None:
        """Send a request; None if it is refused."""
        try:
            running = self.quotas[index].start(self.caller)
        except RateLimited:
            return None
        try:
            counts = self.quotas[index].admit(self.caller, self.now)
        except RateLimited:
            if running is not None:
                running.release()
            return None
        if counts is not None:
            counts.charge(self.tokens, self.now)
        self.admitted.append(self.now)
        return running

    def run(self, seconds: float, requests: Callable[[int, int], int]) -> None:
        """Let time pass: in each tenth of a second, gateway `index` gets `requests(tick, index)` requests."""
        for tick in range(int(seconds * 10)):
            for index in range(self.count):
                if self.ticks % 10 == (3 * index) % 10 and not self.away:
                    self.report(index)
                for _ in range(requests(tick, index)):
                    if (running := self.ask(index)) is not None:
                        running.release()
            if (document := self.documents.get("key")) and (quota := decoded(document)):
                self.shares.append(dict(quota.claims))
            self.ticks += 1
            self.now += 0.1

    def excess(self, per_minute: int) -> float:
        """The most that was admitted, over any time, above a bucket and its refill."""
        most, full = 0.0, -1e18  # one bucket for all, which may be overdrawn
        for moment in self.admitted:
            full = max(full, moment) + 60 / per_minute
            most = max(most, (full - moment) * per_minute / 60 - max(per_minute, 1))
        return most


@given(
    st.integers(1, 5),
    st.integers(1, 600),
    st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=8),
)
def test_the_sum_over_gateways_stays_within_the_limit(count: int, per_minute: int, phases: list[list[int]]) -> None:
    """Demand that moves, bursts and pauses: at most what one bucket for all would admit, and a second's refill."""
    cluster = Cluster(count, Caller("key", requests_per_minute=per_minute))
    for phase in phases:
        cluster.run(3, lambda tick, index, phase=phase: phase[index] if tick % 3 == 0 else 0)  # type: ignore[misc]
    # After a pause, each of more gateways than requests per minute may admit one.
    assert cluster.excess(per_minute) <= per_minute / 60 + (count if per_minute < count else 1e-6)


@pytest.mark.parametrize("per_minute", [60, 600])
def test_the_limit_is_used(per_minute: int) -> None:
    """Whether requests come to one gateway or to all, about as many are admitted as one gateway alone would admit."""
    for busy in ({0}, {0, 1, 2}):
        cluster = Cluster(3, Caller("key", requests_per_minute=per_minute))
        cluster.run(120, lambda _, index, busy=busy: 3 * (index in busy))  # type: ignore[misc]
        assert len(cluster.admitted) >= 0.95 * 3 * per_minute - 3


def test_what_is_refilled_during_an_outage_counts() -> None:
    """A key that stays below its limit is not refused when the database is back."""
    cluster = Cluster(2, Caller("key", requests_per_minute=600))
    cluster.run(20, lambda *_: 0)
    cluster.away = True
    for quota in cluster.quotas:
        quota.hold_share()
    cluster.run(600, lambda tick, index: int(tick % 10 < 4))  # 480 a minute over both
    cluster.away = False
    before = len(cluster.admitted)
    cluster.run(60, lambda tick, index: int(tick % 10 < 4))
    assert len(cluster.admitted) - before == 480


@pytest.mark.parametrize("count, per_minute", [(2, 6), (2, 60), (5, 30), (5, 600)])
def test_retry_after_is_of_the_whole_limit(count: int, per_minute: int) -> None:
    """A gateway whose part is small says when the key may send again, not when its part would be refilled."""
    cluster = Cluster(count, Caller("key", requests_per_minute=per_minute))
    cluster.run(90, lambda tick, index: 5 * (index == 0 and tick % 2 == 0))
    quota = cluster.quotas[1]
    with pytest.raises(RateLimited) as caught:
        for _ in range(per_minute):
            quota.admit(cluster.caller, cluster.now)
    assert caught.value.retry_after_seconds <= max(1.0, 60 / per_minute)


def test_retry_after_of_a_gateway_that_has_nothing() -> None:
    """After a crash, another process holds nothing until the dead one is removed; it does not say: for days."""
    caller, quota = Caller("key", requests_per_minute=600, tokens_per_minute=6000), Quota()
    limits = Limits(600, 6000)
    quota.hold("a", {"key": KeyQuota(limits, claims={"a": Claim(0.0, 1e9)})}, 0.5, 1.0)
    with pytest.raises(RateLimited) as caught:
        for _ in range(2):
            quota.admit(caller, 1.0)
    assert caught.value.retry_after_seconds == 1.0


def test_retry_after_counts_a_debt() -> None:
    """One that was reported is divided like the rate; an answer since then counts with the whole rate."""
    caller, quota = Caller("key", tokens_per_minute=600), Quota()
    claim = Claim(0.1, 1e9, tokens=-30.0)  # a tenth of a debt of 300
    quota.hold("a", {"key": KeyQuota(Limits(None, 600), claims={"a": claim})}, 0.5, 1.0)
    for tokens, seconds in ((0, 30), (100, 40)):
        if tokens:
            quota._counts["key"].charge(tokens, 1.0)  # an answer of a request before
        with pytest.raises(RateLimited) as caught:
            quota.admit(caller, 1.0)
        assert caught.value.retry_after_seconds == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 10, 500])
def test_tokens_are_shared(tokens: int) -> None:
    """Each gateway may overdraw its balance by one answer; what is overdrawn is waited for."""
    cluster = Cluster(3, Caller("key", tokens_per_minute=600), tokens)
    cluster.run(180, lambda _, index: 2 * (index < 2))
    charged = len(cluster.admitted) * tokens
    assert 0.95 * 3 * 600 <= charged <= 4 * 600 + 3 * tokens + 10


def test_unused_share_flows_to_demand() -> None:
    """Within 5 s after demand moves from one gateway to another."""
    cluster = Cluster(4, Caller("key", requests_per_minute=600, concurrency=8))
    cluster.run(20, lambda _, index: int(index == 0))
    assert cluster.shares[-1]["a"].share == pytest.approx(1 - MIN_SHARE * 3 / 4, abs=0.01)
    cluster.run(5, lambda _, index: int(index == 1))
    claims = cluster.shares[-1]
    assert claims["b"].share >= 0.7
    assert claims["a"].share <= 0.3


def test_every_gateway_keeps_a_least_share() -> None:
    """For its next request, however much the others want."""
    cluster = Cluster(5, Caller("key", requests_per_minute=600, concurrency=10))
    cluster.run(20, lambda _, index: 10 * (index == 0))
    for claim in cluster.shares[-1].values():
        assert claim.share >= MIN_SHARE / 5 - 1e-9
        assert claim.slots >= 1


def test_shares_do_not_oscillate() -> None:
    """Under steady demand, refused or not, they come to rest."""
    for rate in (1, 10):
        cluster = Cluster(3, Caller("key", requests_per_minute=300))
        cluster.run(60, lambda tick, index, rate=rate: rate * (index + 1) if tick % 5 == 0 else 0)  # type: ignore[misc]
        for name in NAMES[:3]:
            shares = [claims[name].share for claims in cluster.shares[-200:]]
            assert max(shares) - min(shares) < 0.02


def test_slots_follow_what_is_wanted() -> None:
    """A gateway whose requests run long gets the slots that others do not want, and gives them back."""
    cluster = Cluster(2, Caller("key", concurrency=10))

    def fill(index: int, count: int) -> list[RunningRequest]:
        running: list[RunningRequest] = []
        for _ in range(8):
            running += [request for _ in range(count - len(running)) if (request := cluster.ask(index)) is not None]
            cluster.run(1, lambda *_: 0)
        return running

    first = fill(0, 10)
    assert len(first) == 9  # the other one keeps one
    assert len(fill(1, 5)) == 1
    for request in first:
        request.release()
    assert len(fill(1, 8)) == 8  # and one from before


def test_a_key_that_nobody_uses_is_forgotten() -> None:
    """Then each gateway holds an equal share of full buckets again."""
    cluster = Cluster(2, Caller("key", requests_per_minute=60, tokens_per_minute=100, concurrency=4))
    cluster.run(5, lambda _, index: 3 * (index == 0))
    assert cluster.documents
    cluster.run(120, lambda *_: 0)
    assert not cluster.documents
    admitted = len(cluster.admitted)
    cluster.run(0.1, lambda *_: 40)
    assert len(cluster.admitted) - admitted == 60


def test_a_worker_that_died_is_charged_with_what_it_held() -> None:
    """Nobody else admits what it may have admitted."""
    limits = Limits(60.0, None, 4)
    quota = renewed(None, limits, "a", Use(asked=10, requests=10, running=1, wanted=1), ("a", "b"), 1e9)
    assert quota is not None
    assert quota.claims["b"].requests == 30
    quota = renewed(quota, limits, "a", Use(asked=1), ("a",), 1e9 + 1)
    assert quota is not None
    assert set(quota.claims) == {"a"}
    assert quota.claims["a"].requests == pytest.approx(60 - 10 - 30 + 1)
    assert quota.claims["a"].slots >= 2


def test_a_worker_that_was_removed_and_comes_back() -> None:
    """It is charged with one bucket for what it used meanwhile, as one minute of everybody, not with hours."""
    report = {"key": (Limits(60.0, 100.0), Use(asked=9000, requests=9000, tokens=9000))}
    quota = decoded(changes(QuotaRecords(1e9, ("a", "b"), {}, known=False), "b", report, 3600)["key"])
    assert quota is not None
    assert quota.requests_full_at <= 1e9 + 60
    assert quota.tokens_full_at <= 1e9 + 60


def test_a_clock_that_was_set_back() -> None:
    """What is held, and when buckets are full, is as before by the new clock."""
    report = {"key": (Limits(60.0), Use(asked=30, requests=30))}
    first = changes(QuotaRecords(1e9, ("a", "b"), {}), "a", report)
    documents = {name: document for name, document in first.items() if document}
    found = []
    for step in (0, -3600):
        records = QuotaRecords(1e9 + 2 + step, ("a", "b"), documents, step_seconds=step)
        quota = decoded(changes(records, "a", {})["key"])
        assert quota is not None
        found.append((quota.requests_full_at - step, quota.claims["a"].requests, quota.claims["b"].at - step))
    assert found[0] == pytest.approx(found[1])


def test_a_repeated_report_is_not_charged_again() -> None:
    """Its answer was lost, not the report."""
    report = {"key": (Limits(60.0), Use(asked=10, requests=10))}
    first = changes(QuotaRecords(1e9, ("a",), {}), "a", report)
    documents = {name: document for name, document in first.items() if document}
    again = changes(QuotaRecords(1e9 + 1, ("a",), documents, repeated=True), "a", report)
    quota = decoded(again["key"])
    assert quota is not None
    assert quota.claims["a"].requests == pytest.approx(51)


def test_a_document_of_another_version_is_replaced() -> None:
    """As if nobody had used the key."""
    found = changes(QuotaRecords(1e9, ("a",), {"key": '{"other": 1}'}), "a", {"key": (Limits(60.0), Use(asked=1))})
    quota = decoded(found["key"])
    assert quota is not None
    assert quota.claims["a"].requests == 60
