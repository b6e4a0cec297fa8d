"""How gateways share the limits of a key: what each worker holds until its next report. Pure.

A worker reports about each second what it has used, and gets a claim: a share of the rate, a balance of each bucket,
and slots for concurrent requests. Between reports it decides by itself. Three rules keep the sum within the limit:

- The level of a bucket counts what all workers have reported. A worker gets of it what is not held by the others.
- Shares of the rate add up to at most 1: a worker gets more only after another one has reported and got less.
- A worker that died is charged with all that it held.

Shares follow demand, smoothed over seconds, refused requests included: it does not depend on what is granted, so shares
do not oscillate. A worker without demand keeps MIN_SHARE / N of the rate, for its next request.

A key without recent requests has no document. Its buckets are full, and each of N workers holds 1/N.
"""

from collections.abc import Collection, Mapping

import msgspec

from serving.state.quotas import QuotaRecords

# A worker with a lease reports so often.
RENEW_SECONDS = 1.0
MINUTE_SECONDS = 60.0
# Divided equally, whatever the demand.
MIN_SHARE = 0.1
DEMAND_HALF_LIFE_SECONDS = 1.5
# Requests a second; less is no demand.
LEAST_DEMAND = 0.01
SHORTEST_SECONDS = 0.1
# Of the slots that a worker wanted before; so many remain wanted at its next report.
KEEP_WANTED = 0.5


class Limits(msgspec.Struct, frozen=True):
    """The limits of a key; None: not limited."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None


class Use(msgspec.Struct, frozen=True):
    """What a worker has seen of a key since its last report: requests asked for, admitted, and tokens of answers.

    `running` requests run now; `wanted` is the most that ran or would have run at a time.
    """

    asked: int = 0
    requests: int = 0
    tokens: int = 0
    running: int = 0
    wanted: int = 0


class Claim(msgspec.Struct, frozen=True):
    """What a worker holds of a key: a share of the rate, balances at the time `at`, and slots.

    `demand` is in requests per second, `wanted` in slots.
    """

    share: float
    at: float
    requests: float = 0.0
    tokens: float = 0.0
    slots: int = 0
    demand: float = 0.0
    wanted: int = 0


class KeyQuota(msgspec.Struct, frozen=True):
    """A key that is used: its limits, when its buckets are full without further requests, and the claims of workers."""

    limits: Limits
    requests_full_at: float = 0.0
    tokens_full_at: float = 0.0
    claims: Mapping[str, Claim] = {}


def renewed(
    quota: KeyQuota | None,
    limits: Limits | None,
    worker: str,
    use: Use,
    workers: Collection[str],
    now: float,
    since: float | None = None,
) -> KeyQuota | None:
    """Charge the use of a worker and give it a new claim; None: the key is not used any more.

    `quota` is None for a key that was not used, `limits` if the worker has not seen the key. `workers` are those that
    live; a worker that is not among them leaves. The use is charged as if all of it was at the time `since`, the
    beginning of the report (default: now): what was refilled meanwhile counts, even after an outage.
    """
    if quota is None:
        if limits is None:
            return None
        quota = unused(limits, {*workers, worker}, now)
    quota = msgspec.structs.replace(quota, limits=limits or quota.limits)
    quota = _charged(quota, use.requests, use.tokens, now if since is None else min(since, now))
    quota = _without_dead(quota, {*workers, worker}, now)
    before = quota.claims.get(worker)
    others = {name: claim for name, claim in quota.claims.items() if name != worker}
    quota = msgspec.structs.replace(quota, claims=others)
    if worker in workers:
        claim = _claim(quota, before, use, len(workers), now)
        quota = msgspec.structs.replace(quota, claims={**others, worker: claim})
    return None if _is_unused(quota, now) else quota


# By key: its limits and its use, as a worker reports them.
Report = Mapping[str, tuple[Limits, Use]]


def changes(records: QuotaRecords, worker: str, report: Report, age_seconds: float = 0.0) -> dict[str, str | None]:
    """Return the documents after a worker's report; None for a key that is not used any more.

    `age_seconds` is the time since the beginning of the report. A repeated report is not charged again. A worker that
    comes back after it was removed is charged with at most one full bucket: others have had the whole limit meanwhile.
    """
    found: dict[str, str | None] = {}
    for name in sorted(records.documents.keys() | report.keys()):
        limits, use = report.get(name, (None, Use()))
        if records.repeated:
            use = msgspec.structs.replace(use, asked=0, requests=0, tokens=0)
        if not records.known and limits is not None:
            use = _at_most_a_bucket(use, limits)
        quota = _moved(decoded(records.documents.get(name)), records.step_seconds)
        after = renewed(quota, limits, worker, use, records.workers, records.now, records.now - age_seconds)
        found[name] = None if after is None else msgspec.json.encode(after).decode()
    return found


def _at_most_a_bucket(use: Use, limits: Limits) -> Use:
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return msgspec.structs.replace(
        use,
        requests=use.requests if requests is None else min(use.requests, int(requests)),
        tokens=use.tokens if tokens is None else min(use.tokens, int(tokens)),
    )


def _moved(quota: KeyQuota | None, seconds: float) -> KeyQuota | None:
    """Move all times of a document, to those of a clock that was set."""
    if quota is None or not seconds:
        return quota
    return msgspec.structs.replace(
        quota,
        requests_full_at=quota.requests_full_at + seconds,
        tokens_full_at=quota.tokens_full_at + seconds,
        claims={name: msgspec.structs.replace(claim, at=claim.at + seconds) for name, claim in quota.claims.items()},
    )


def decoded(document: str | None) -> KeyQuota | None:
    """Read a document; None if there is none, or another version of quantgate has written it."""
    try:
        return None if document is None else msgspec.json.decode(document, type=KeyQuota)
    except msgspec.DecodeError:
        return None


def unused(limits: Limits, workers: Collection[str], now: float) -> KeyQuota:
    """Return what workers hold of an unused key: buckets are full, and each has an equal share."""
    count = len(workers)
    share = 1 / count
    claim = Claim(
        share,
        now,
        requests=(limits.requests_per_minute or 0.0) * share,
        tokens=(limits.tokens_per_minute or 0.0) * share,
        slots=(limits.concurrency or 0) // count,
    )
    return KeyQuota(limits, claims=dict.fromkeys(workers, claim))


def level(per_minute: float | None, full_at: float, now: float) -> float:
    """Return the amount in a bucket of one minute's worth; negative after an overdraft."""
    return 0.0 if per_minute is None else per_minute - max(full_at - now, 0.0) * per_minute / MINUTE_SECONDS


def _charged(quota: KeyQuota, requests: float, tokens: float, now: float) -> KeyQuota:
    limits = quota.limits
    return msgspec.structs.replace(
        quota,
        requests_full_at=_later(quota.requests_full_at, requests, limits.requests_per_minute, now),
        tokens_full_at=_later(quota.tokens_full_at, tokens, limits.tokens_per_minute, now),
    )


def _later(full_at: float, amount: float, per_minute: float | None, now: float) -> float:
    if per_minute is None or amount <= 0:
        return full_at
    return max(full_at, now) + amount * MINUTE_SECONDS / per_minute


def _without_dead(quota: KeyQuota, live: Collection[str], now: float) -> KeyQuota:
    """Charge workers that died with all that they held."""
    for name, claim in quota.claims.items():
        if name not in live:
            requests = _held(claim, claim.requests, quota.limits.requests_per_minute, now)
            tokens = _held(claim, claim.tokens, quota.limits.tokens_per_minute, now)
            quota = _charged(quota, requests, tokens, now)
    claims = {name: claim for name, claim in quota.claims.items() if name in live}
    return msgspec.structs.replace(quota, claims=claims)


def _claim(quota: KeyQuota, before: Claim | None, use: Use, count: int, now: float) -> Claim:
    """Make the next claim of a worker; `quota` has the claims of the others."""
    limits, others = quota.limits, quota.claims.values()
    demand = _demand(before, use, now)
    free_share = max(1.0 - sum(claim.share for claim in others), 0.0)
    share = min(_fair_share(demand, sum(claim.demand for claim in others), count), free_share)
    wanted = max(use.wanted, use.running, int(before.wanted * KEEP_WANTED) if before else 0)

    def balance(per_minute: float | None, full_at: float, held: float) -> float:
        if per_minute is None:
            return 0.0
        available = level(per_minute, full_at, now) - held
        # In debt, each worker waits as long as all would.
        return min(available, _capacity(share, demand, per_minute)) if available > 0 else available * share

    claim = Claim(
        *(share, now),
        requests=balance(limits.requests_per_minute, quota.requests_full_at, _held_requests(quota, now)),
        tokens=balance(limits.tokens_per_minute, quota.tokens_full_at, _held_tokens(quota, now)),
        slots=0 if limits.concurrency is None else _slots(limits.concurrency, others, use.running, wanted, count),
        demand=demand,
        wanted=wanted,
    )
    # Without demand it stays as it is, and its document is not written again.
    return before if before and not demand and msgspec.structs.replace(claim, at=before.at) == before else claim


def _demand(before: Claim | None, use: Use, now: float) -> float:
    """Smooth the requests per second that were asked for."""
    if before is None:
        return float(use.asked)
    seconds = max(now - before.at, SHORTEST_SECONDS)
    keep = 0.5 ** (seconds / DEMAND_HALF_LIFE_SECONDS)
    demand = before.demand * keep + use.asked / seconds * (1 - keep)
    return demand if demand >= LEAST_DEMAND else 0.0


def _fair_share(demand: float, others: float, count: int) -> float:
    total = demand + others
    return MIN_SHARE / count + (1 - MIN_SHARE) * demand / total if total else 1 / count


def _capacity(share: float, demand: float, per_minute: float) -> float:
    """Return the largest balance of a worker: its part of a minute's worth, but one request if it has any to send."""
    return max(share * per_minute, 1.0) if demand else share * per_minute


def _held(claim: Claim, balance: float, per_minute: float | None, now: float) -> float:
    """Return the most that a worker may have in its bucket now: what it got, and what was refilled since."""
    if per_minute is None:
        return 0.0
    refilled = claim.share * per_minute * max(now - claim.at, 0.0) / MINUTE_SECONDS
    return max(min(balance + refilled, max(balance, _capacity(claim.share, claim.demand, per_minute))), 0.0)


def _held_requests(quota: KeyQuota, now: float) -> float:
    per_minute = quota.limits.requests_per_minute
    return sum(_held(claim, claim.requests, per_minute, now) for claim in quota.claims.values())


def _held_tokens(quota: KeyQuota, now: float) -> float:
    per_minute = quota.limits.tokens_per_minute
    return sum(_held(claim, claim.tokens, per_minute, now) for claim in quota.claims.values())


def _slots(concurrency: int, others: Collection[Claim], running: int, wanted: int, count: int) -> int:
    """Return the slots of a worker: a fair part, and what the others do not want, if they hold no more."""
    free = concurrency - sum(claim.slots for claim in others)
    total = wanted + sum(claim.wanted for claim in others)
    left = concurrency - sum(_entitled(concurrency, claim.wanted, total, count) for claim in others)
    fair = _fair_slots(concurrency, wanted, total, count)
    # Twice what is wanted: without room, more demand is not seen before a request is refused.
    return max(running, min(free, max(fair, min(max(2 * wanted, 1), left))))


def _entitled(concurrency: int, wanted: int, total: int, count: int) -> int:
    least = int(concurrency >= count)
    return max(least, min(wanted, _fair_slots(concurrency, wanted, total, count)))


def _fair_slots(concurrency: int, wanted: int, total: int, count: int) -> int:
    """Return a worker's part of all slots: one, if there are enough, and of the rest in proportion to what it wants."""
    if not total:
        return concurrency // count
    least = int(concurrency >= count)
    return least + (concurrency - least * count) * wanted // total


def _is_unused(quota: KeyQuota, now: float) -> bool:
    """Whether the key is as if it had never been used: without demand, with full buckets, and nothing running."""
    if max(quota.requests_full_at, quota.tokens_full_at) > now:
        return False
    count = len(quota.claims)
    return all(not claim.demand and not claim.wanted and claim.share * count > 0.9 for claim in quota.claims.values())
