"""Polls one replica that another program runs, verifies it, and writes what it finds to a registry.

==================  ==========================================================  =================================
poll                verified                                                    not verified
==================  ==========================================================  =================================
healthy             READY                                                       served model and golden prompt are
                                                                                checked: READY, or FAILED
healthy, rejected   FAILED                                                      FAILED, without another check
not healthy         FAILED, not verified any more                               FAILED, not rejected any more
a defect            FAILED                                                      FAILED
==================  ==========================================================  =================================
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from config.golden import GoldenAnswer
from serving.errors import NoSuchReplica, ProbeFailed, ReplicaConflict
from serving.golden import compare
from serving.probe import Probe
from serving.registry import Registry, ReplicaSource
from serving.replica import Replica, State
from serving.thinking import detect_thinking

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Poller:
    """Polls a replica while `run` runs. `golden` returns the expected answer of its variant, if there is one.

    Its entry in `registry` has to exist, and belongs to the source `owner`.
    """

    replica: Replica
    registry: Registry
    owner: str
    probe: Probe
    golden: Callable[[], GoldenAnswer | None]
    every_seconds: float
    _source: ReplicaSource = field(init=False)
    _verified: bool = False
    _rejected: bool = False  # only a restart can change the model, and it is unhealthy meanwhile
    _defect: str = ""

    def __post_init__(self) -> None:
        self._source = self.registry.source(self.owner)

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            try:
                await self._poll()
            except Exception as error:  # the outermost loop: a defect in one poll must not be the last
                if repr(error) != self._defect:
                    log.exception("polling replica %s at %s has a defect", self.replica.id, self.replica.url)
                self._fail(repr(error))
            else:
                self._defect = ""
            await asyncio.sleep(self.every_seconds)

    async def _poll(self) -> None:
        replica, state = self.replica, self.registry.status(self.replica.id).state
        if not await self.probe.healthy(replica.url, replica.tls):
            if state is not State.FAILED:
                log.warning("replica %s at %s is not healthy", replica.id, replica.url)
            self._source.move(replica.id, State.FAILED, f"{replica.url} is not healthy")
            self._verified = self._rejected = False
        elif not self._rejected and not (self._verified and state is State.READY):
            await self._verify()

    async def _verify(self) -> None:
        """Read the served model's name, which may have changed, and check the golden prompt; then it is ready."""
        replica = self.replica
        try:
            served = await self.probe.served_model(replica)
        except ProbeFailed as error:
            self._source.move(replica.id, State.FAILED, str(error))
            return
        seen = replace(
            replica,
            served_name=served.name,
            max_model_len_tokens=served.max_model_len_tokens,
            adapters=tuple([adapter for adapter in replica.adapters if adapter in served.adapters]),
        )
        if missing := [adapter for adapter in replica.adapters if adapter not in seen.adapters]:
            log.warning("replica %s at %s does not serve its adapters %s", replica.id, replica.url, ", ".join(missing))
        if reason := await self._golden_mismatch(seen):
            self._rejected = True
            log.error("replica %s at %s is not %s: %s", replica.id, replica.url, replica.variant, reason)
            self._source.move(replica.id, State.FAILED, f"is not {replica.variant}: golden prompt {reason}")
            return
        if seen.tools is None:
            seen = replace(seen, tools=await self.probe.takes_tools(seen))
        self._source.put(await detect_thinking(self.probe, seen), State.READY)
        self._verified = True
        log.info("replica %s at %s is ready", replica.id, replica.url)

    async def _golden_mismatch(self, replica: Replica) -> str | None:
        """Return how the golden answer differs; None if it matches, is not recorded, or is not supported."""
        golden = self.golden()
        if golden is None:
            return None
        try:
            golden = golden.shortened(replica.max_model_len_tokens)
            result = compare(await self.probe.prompt_logprobs(replica, golden.ids), golden)
        except ProbeFailed as error:
            log.info("replica %s does not support the golden prompt check: %s", replica.id, error)
            return None
        if result.verdict == "indistinguishable":
            log.info("replica %s: golden prompt: %s", replica.id, result.reason)
        return result.reason if result.verdict == "different" else None

    def _fail(self, defect: str) -> None:
        """A poll that did not end tells nothing, so the replica gets no request."""
        self._defect, self._verified = defect, False
        with suppress(NoSuchReplica, ReplicaConflict):
            self._source.move(self.replica.id, State.FAILED, f"its poll has a defect: {defect}")
