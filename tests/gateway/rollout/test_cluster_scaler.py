"""Rollouts that scale the workloads of a cluster: a driver and a scaler, on a clock of the test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from config.schema import Settings
from gateway.rollout.administration import GatewayOperator
from gateway.rollout.machine import Event, Phase
from gateway.rollout.revision import use_of
from gateway.rollout.scaler import RETRY_SECONDS, Scaler
from gateway.rollout.scaling import SCALE_FAILED, SCALED, SCALING
from serving.kubernetes.access import ClusterAccess
from serving.state.database import StateDatabase
from serving.state.link import Link
from tests.fakes.kubernetes.running import FakeCluster, WorkloadKind, running_cluster
from tests.fakes.running import HOST
from tests.gateway.rollout.driving import RolloutFixture, rollout_fixture

PLACES = {"hi": [(HOST, port) for port in range(8001, 8005)], "odd": [(HOST, port) for port in range(8011, 8015)]}


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """One kind of state database, where the kind does not matter."""
    return f"sqlite:///{tmp_path}/state.db"


def replicas(kind: WorkloadKind) -> list[dict[str, Any]]:
    return [
        {"variant": name, "kubernetes": {"service": name, "workload": f"{kind}/{name}"}} for name in ("hi", "odd", "lo")
    ]


@dataclass
class ClusterFixture:
    """A rollout of `odd` in place of `hi`, whose workloads are in a cluster; the scaler may be killed and replaced."""

    scene: RolloutFixture
    cluster: FakeCluster
    kind: WorkloadKind
    scalers: int = 0

    def __post_init__(self) -> None:
        self.replace()

    def replace(self) -> None:
        """Another process, which knows what is recorded only."""
        scene = self.scene
        self.scalers += 1
        self.scaler = Scaler(
            Link(StateDatabase.at(scene.state)),
            lambda: ClusterAccess(self.cluster.url, token_file=self.cluster.token_file),
            lambda: scene.configured.settings.replicas,
            scene.snapshot,
            lambda snapshot: use_of(scene.configured, snapshot),
            f"scaler-{self.scalers}",
            wall_clock=lambda: scene.now,
        )
        scene.driver.context = _with_problems(scene, self.scaler)

    async def kill(self) -> None:
        """The process dies: it gives no lease back."""
        self.scaler._is_holder = False
        await self.scaler.__aexit__(None, None, None)
        self.scene.now += 20
        self.replace()

    async def sizes(self) -> tuple[int, int]:
        """The replicas of the old workload and the new one."""
        return await self.cluster.replicas("hi", self.kind), await self.cluster.replicas("odd", self.kind)

    async def follow(self) -> None:
        """Scale; the pods of the new variant are ready at once, as many as there are."""
        await self.scaler.follow()
        if (await self.sizes())[1]:
            self.scene.put("odd")

    async def until(self, phase: Phase, **evidence: Any) -> None:
        """Go on until a phase, scaling after each step."""
        for _ in range(300):
            await self.follow()
            if self.scene.phase() is phase:
                return
            if self.scene.phase() is Phase.CANARY:
                self.scene.see(**evidence)
            await self.scene.step(5.0)
        raise AssertionError(f"not reached: {self.scene.rollout}")

    def told(self) -> list[tuple[str, str]]:
        """The entries of the log about workloads: event and reason."""
        about = (SCALING, SCALED, SCALE_FAILED)
        entries = self.scene.database.entries("smol", limit=1000)
        return [(entry.event, entry.why) for entry in entries if entry.event in about]


def _with_problems(scene: RolloutFixture, scaler: Scaler) -> Any:
    return replace(scene.driver.context, workload_problems=scaler.problems)


@asynccontextmanager
async def cluster_fixture(
    state: str,
    *,
    old: int = 3,
    new: int = 0,
    kind: WorkloadKind = "deployment",
    entries: list[dict[str, Any]] | None = None,
    **tables: Any,
) -> AsyncIterator[ClusterFixture]:
    """Workloads with these numbers of replicas; `entries` are the configured replicas, instead of `replicas(kind)`."""
    configured = {"replicas": replicas(kind) if entries is None else entries, **tables}
    async with running_cluster() as cluster, rollout_fixture(state, "hi", "lo", **configured) as scene:
        for name, count in (("hi", old), ("odd", new)):
            await cluster.add_workload(name, count, PLACES[name], kind=kind)
        made = ClusterFixture(scene, cluster, kind)
        try:
            yield made
        finally:
            await made.scaler.__aexit__(None, None, None)


@pytest.mark.parametrize("kind", ["deployment", "leaderworkerset"])
async def test_a_whole_rollout(state: str, kind: WorkloadKind) -> None:
    """The new workload gets as many replicas as the old one has, which loses them after `keep`; the log says so."""
    async with cluster_fixture(state, kind=kind) as made:
        made.scene.start()
        await made.until(Phase.STARTING)
        assert await made.sizes() == (3, 3)
        await made.until(Phase.KEEPING)
        assert await made.sizes() == (3, 3)
        await made.until(Phase.DONE)
        assert await made.sizes() == (0, 3)
        rollout = made.scene.record.id
        assert made.told() == [
            ("scaling", f"{kind}/odd from 0 to 3 replicas, for {rollout}"),
            ("scaled", f"{kind}/odd has 3 replicas"),
            ("scaling", f"{kind}/hi from 3 to 0 replicas, for {rollout}"),
            ("scaled", f"{kind}/hi has 0 replicas"),
        ]


async def test_what_an_operator_scales_afterwards_stays(sqlite: str) -> None:
    """A demand is carried out once, whoever looks at it later."""
    async with cluster_fixture(sqlite) as made:
        made.scene.start()
        await made.until(Phase.DONE)
        await made.cluster.scale("hi", 2)
        await made.cluster.scale("odd", 1)
        await made.follow()
        await made.kill()
        await made.follow()
        assert await made.sizes() == (2, 1)


@pytest.mark.parametrize("new", [0, 2])
async def test_a_bad_variant(sqlite: str, new: int) -> None:
    """After the rollback its workload has what it had before, and the old one never lost any."""
    async with cluster_fixture(sqlite, new=new) as made:
        made.scene.smoke.result = ("the answer is empty",)
        made.scene.start()
        await made.until(Phase.SMOKE)
        assert await made.sizes() == (3, 3)
        await made.until(Phase.ROLLED_BACK)
        assert await made.sizes() == (3, new)


async def test_undo_while_the_old_variant_is_kept(sqlite: str) -> None:
    """Back at once: the old workload still has its replicas, and the new one loses what it got."""
    async with cluster_fixture(sqlite, new=1) as made:
        made.scene.start()
        await made.until(Phase.KEEPING)
        made.scene.operator = _seeing_all(made.scene)
        made.scene.steer(Event.UNDO, "complaints")
        await made.until(Phase.ROLLED_BACK)
        assert await made.sizes() == (3, 1)


async def test_undo_after_the_rollout(sqlite: str) -> None:
    """The old workload gets back what the rollout took from it."""
    async with cluster_fixture(sqlite) as made:
        made.scene.start()
        await made.until(Phase.DONE)
        made.scene.operator = _seeing_all(made.scene)
        made.scene.operator.undo("smol", None, "complaints")
        await made.follow()
        assert await made.sizes() == (3, 3)


def _seeing_all(scene: RolloutFixture) -> Any:
    """An operator that sees every variant ready, as a gateway's does."""
    return GatewayOperator(
        scene.configured, scene.database, "anna", lambda: scene.now, frozenset(scene.configured.variants)
    )


@pytest.mark.parametrize("applied", [False, True])
async def test_a_process_killed_between_two_steps(state: str, applied: bool) -> None:
    """The number is recorded, but not set; or set, but not known to be: the next one goes on, and back is as before."""
    async with cluster_fixture(state, new=1) as made:
        made.scene.smoke.result = ("the answer is empty",)
        made.scene.start()
        await made.scene.step(5.0, count=2)
        await (made.cluster.lose_answers("patch") if applied else made.cluster.refuse(500, verbs=["patch"]))
        await made.scaler.follow()
        assert await made.sizes() == (3, 3 if applied else 1)
        assert [event for event, _ in made.told()] == [SCALING, SCALE_FAILED]
        await made.cluster.accept()
        await made.kill()
        await made.follow()
        assert await made.sizes() == (3, 3)
        await made.until(Phase.ROLLED_BACK)
        assert await made.sizes() == (3, 1)


async def test_one_process_at_a_time(state: str) -> None:
    """A second one does nothing while the first holds the lease; when that has expired, it does."""
    async with cluster_fixture(state) as made:
        made.scene.start()
        await made.scene.step(5.0, count=2)
        await made.cluster.refuse(500, verbs=["patch"])
        await made.scaler.follow()
        await made.cluster.accept()
        first = made.scaler
        made.replace()
        await made.scaler.follow()
        assert await made.sizes() == (3, 0)
        made.scene.now += 20
        await made.scaler.follow()
        assert await made.sizes() == (3, 3)
        await first.__aexit__(None, None, None)


async def test_somebody_else_changes_the_workload(sqlite: str) -> None:
    """A conflict is read again; what an operator has added stays."""
    async with cluster_fixture(sqlite) as made:
        made.scene.start()
        await made.scene.step(5.0, count=2)
        await made.cluster.refuse(409, times=2, verbs=["patch"])
        await made.scaler.follow()
        assert await made.sizes() == (3, 3)
        patches = [each for each in made.cluster.requests("/scale") if each["method"] == "PATCH"]
        assert len(patches) == 3
        assert all(patch["body"]["metadata"]["resourceVersion"] for patch in patches)


async def test_the_api_server_is_away(sqlite: str) -> None:
    """A rollout waits until its workload can be scaled; the log says so once."""
    async with cluster_fixture(sqlite) as made:
        made.scene.start()
        await made.scene.step(5.0)
        await made.cluster.kill()
        await made.scene.step(5.0)
        for _ in range(2):
            made.scene.now += RETRY_SECONDS
            await made.scaler.follow()
        assert [event for event, _ in made.told()] == [SCALE_FAILED]
        await made.cluster.start()
        await made.scaler.follow()
        assert await made.sizes() == (3, 0)
        made.scene.now += RETRY_SECONDS
        await made.scaler.follow()
        assert await made.sizes() == (3, 3)


async def test_two_rollouts_of_one_variant(sqlite: str) -> None:
    """The workload keeps its replicas while one of them needs it, and has as many as before when both went back."""
    async with cluster_fixture(sqlite) as made:
        scene = made.scene
        scene.put("mid")
        for scene.alias, old in (("smol", "hi"), ("other", "mid")):
            scene.start("odd", old)
            await made.until(Phase.CANARY)
        for scene.alias, sizes in (("smol", (3, 3)), ("other", (3, 0))):
            scene.steer(Event.ABORT)
            await made.until(Phase.ROLLED_BACK)
            assert await made.sizes() == sizes


async def test_the_second_rollout_of_a_variant_ends_first(sqlite: str) -> None:
    """What the first one waits for is still brought up, although the second one wanted it last."""
    async with cluster_fixture(sqlite) as made:
        scene = made.scene
        scene.put("mid")
        for scene.alias, old in (("smol", "hi"), ("other", "mid")):
            scene.start("odd", old)
            await scene.step(5.0, count=2)
            assert scene.phase() is Phase.STARTING
        scene.steer(Event.ABORT)
        await scene.reach(Phase.ROLLED_BACK)
        await made.scaler.follow()
        assert (await made.sizes())[1] > 0
        scene.alias = "smol"
        assert scene.phase() is Phase.STARTING


@pytest.mark.parametrize("new, meanwhile, after", [(0, 3, 0), (2, 3, 2), (2, 1, 1)])
async def test_a_retry_before_the_workload_was_scaled_down(sqlite: str, new: int, meanwhile: int, after: int) -> None:
    """The second rollback has the number before the first rollout, or that of an operator who took more."""
    async with cluster_fixture(sqlite, new=new) as made:
        scene = made.scene
        scene.start()
        await made.until(Phase.CANARY)
        scene.steer(Event.ABORT)
        await scene.reach(Phase.ROLLED_BACK)
        await made.cluster.scale("odd", meanwhile)
        scene.retry()
        await scene.step(count=2)
        assert (scene.phase(), await made.sizes()) == (Phase.STARTING, (3, meanwhile))
        await made.follow()
        scene.steer(Event.ABORT)
        await made.until(Phase.ROLLED_BACK)
        assert await made.sizes() == (3, after)


async def test_a_promotion_keeps_what_it_brought_up(sqlite: str) -> None:
    """A later rollout of the variant goes back to the number at its own start."""
    async with cluster_fixture(sqlite) as made:
        scene = made.scene
        scene.put("mid")
        scene.start()
        await made.until(Phase.DONE)
        scene.configured = replace(scene.configured, settings=_without(scene, "smol"))
        scene.operator = replace(scene.operator, deployment=scene.configured)
        await made.cluster.scale("odd", 2)
        scene.alias = "other"
        scene.start("odd", "mid")
        await made.until(Phase.CANARY)
        scene.steer(Event.ABORT)
        await made.until(Phase.ROLLED_BACK)
        assert (await made.sizes())[1] == 2


def _without(scene: RolloutFixture, alias: str) -> Settings:
    settings = scene.configured.settings
    return settings.model_copy(update={"aliases": {k: v for k, v in settings.aliases.items() if k != alias}})


async def test_a_workload_of_two_variants(sqlite: str) -> None:
    """It is not scaled down for the one that leaves, because it serves the other one."""
    entries = [
        {"variant": name, "kubernetes": {"service": name, "workload": "deployment/hi"}} for name in ("hi", "odd")
    ]
    async with cluster_fixture(sqlite, entries=entries) as made:
        made.scene.put("odd")
        made.scene.start()
        await made.until(Phase.DONE)
        assert await made.sizes() == (3, 0)


@pytest.mark.parametrize("status", [302, 400, 429, 500])
async def test_a_workload_that_fails_keeps_no_other_waiting(sqlite: str, status: int) -> None:
    """The other rollout's workload is scaled; without an answer for this one (302 is none) in the next round."""
    workloads = {"hi": "deployment/hi", "odd": "deployment/odd", "lo": "leaderworkerset/lo"}
    entries = [{"variant": name, "kubernetes": {"service": name, "workload": each}} for name, each in workloads.items()]
    aliases = {"smol": {"ladder": ["hi"]}, "other": {"ladder": ["mid"]}}
    async with cluster_fixture(sqlite, entries=entries, aliases=aliases) as made:
        scene = made.scene
        await made.cluster.add_workload("lo", 0, [(HOST, 8021)], kind="leaderworkerset")
        scene.registry.remove("lo-1")
        scene.start()
        scene.alias = "other"
        scene.start("lo", "mid")
        await scene.step(count=3)
        failing = ["leaderworkersets.leaderworkerset.x-k8s.io/scale"]
        await made.cluster.refuse(status, resources=failing, retry_after="9" * 400)
        await made.scaler.follow()
        if status == 302:
            scene.now += RETRY_SECONDS
            await made.scaler.follow()
        assert await made.sizes() == (3, 3)
        await made.cluster.accept()
        scene.now += 300.0
        await made.scaler.follow()
        assert await made.cluster.replicas("lo", "leaderworkerset") == 1


def autoscaler(target: str) -> dict[str, Any]:
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}
    return {"metadata": {"name": f"{target}-load"}, "spec": {"scaleTargetRef": reference}}


@pytest.mark.parametrize("target", ["hi", "odd"])
async def test_an_autoscaler_is_found_before_the_rollout_begins(sqlite: str, target: str) -> None:
    """Preflight names it; nothing is scaled."""
    async with cluster_fixture(sqlite) as made:
        await made.cluster.create("horizontalpodautoscalers", autoscaler(target))
        made.scene.start()
        await made.until(Phase.FAILED)
        expected = (
            f"deployment/{target} in the namespace default is scaled by the HorizontalPodAutoscaler {target}-load"
        )
        assert expected in made.scene.rollout.failure
        assert await made.sizes() == (3, 0)


async def test_an_autoscaler_that_comes_later(sqlite: str) -> None:
    """The workload is left to it, which the log says once; when it is gone, the rollout takes the replicas."""
    async with cluster_fixture(sqlite) as made:
        made.scene.start()
        await made.until(Phase.KEEPING)
        await made.cluster.create("horizontalpodautoscalers", autoscaler("hi"))
        await made.until(Phase.DONE)
        for _ in range(3):
            made.scene.now += RETRY_SECONDS
            await made.follow()
        assert await made.sizes() == (3, 3)
        failed = [why for event, why in made.told() if event == SCALE_FAILED]
        assert len(failed) == 1
        assert "the HorizontalPodAutoscaler hi-load; delete it for the rollout" in failed[0]
        await made.cluster.delete("horizontalpodautoscalers", "hi-load")
        made.scene.now += RETRY_SECONDS
        await made.follow()
        assert await made.sizes() == (0, 3)


@pytest.mark.parametrize(
    "missing, message",
    [(True, 'deployments.apps "odd" not found'), (False, "get deployments/scale of apps in the namespace default")],
)
async def test_a_workload_that_is_missing_or_forbidden(sqlite: str, missing: bool, message: str) -> None:
    """Preflight says which, with the verb that the role lacks."""
    async with cluster_fixture(sqlite) as made:
        if missing:
            await made.cluster.delete("deployments", "odd")
        else:
            await made.cluster.refuse(403, verbs=["get"], resources=["deployments.apps/scale"])
        made.scene.start()
        await made.scene.step(count=2)
        assert made.scene.phase() is Phase.FAILED
        assert message in made.scene.rollout.failure
