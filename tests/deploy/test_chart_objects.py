"""The objects of the chart fit together: selectors, ports, probes, names, permissions, network policies."""

import re
from pathlib import Path

import pytest

from config.schema import GatewaySettings
from tests.deploy.chart import CHART, EXAMPLES, WORKER_INDEX, Chart, Object, Pod, Rendered
from tests.deploy.network_policy import Peer, permits
from tests.fakes.running import ROOT

examples = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
FOLDER = CHART / "examples"
GROUPS, SEVERAL, POOL = (FOLDER / f"{name}.yaml" for name in ("qwen3-235b-lws", "several-gateways", "inference-pool"))
# Labels by which objects select pods may not change with a version: selectors are immutable.
STABLE_LABELS = {
    *("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"),
    *("quantgate.io/variant", WORKER_INDEX),
}
MONITORING = Peer({}, {"kubernetes.io/metadata.name": "monitoring"}, same_namespace=False)
STRANGER = Peer({"app": "anything"})


# Pods


@examples
def test_no_container_has_privileges(chart: Chart, values: Path) -> None:
    """The restricted profile of the Pod Security Standards, and a read-only root file system."""
    for pod in chart.rendered(values).pods():
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}


@examples
def test_every_container_has_resources_and_probes(chart: Chart, values: Path) -> None:
    """The workers of a group have no port, so the probes of their leader stand for them."""
    for pod in chart.rendered(values).pods():
        resources = pod.container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert "memory" in resources["limits"]
        probes = [pod.container.get(f"{kind}Probe") for kind in ("startup", "liveness", "readiness")]
        if pod.labels.get(WORKER_INDEX, "0") == "0":
            assert all(probe["httpGet"]["port"] in pod.ports() for probe in probes if probe)
            assert all(probes)
        else:
            assert "--headless" in pod.arguments()
            assert probes == [None] * 3


@examples
def test_images_are_pinned(chart: Chart, values: Path) -> None:
    """Each has a version or a digest, and none is `latest`."""
    for pod in chart.rendered(values).pods():
        assert re.fullmatch(r"[a-z0-9/._-]+(:v?\d[\w.-]*|@sha256:[0-9a-f]{64})", pod.container["image"])


def test_pods_run_as_the_user_of_the_images(chart: Chart) -> None:
    """So that they own what they write, and torch finds a name for the user."""
    (number,) = set(
        re.findall(r"^USER (\d+):\1$", (ROOT / "deploy" / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    )
    rendered = chart.rendered()
    assert {pod.spec["securityContext"]["runAsUser"] for pod in rendered.pods()} == {int(number)}
    assert rendered.gateway().spec["securityContext"]["fsGroup"] == int(number)


def test_the_certificate_is_mounted(chart: Chart) -> None:
    """As a directory, so that a renewed one arrives; the port for probes is another one."""
    rendered = chart.rendered(SEVERAL)
    tls = rendered.config()["gateway"]["tls"]
    (mount,) = [each for each in rendered.gateway().container["volumeMounts"] if each["name"] == "tls"]
    assert [tls["certificate"], tls["key_file"]] == [f"{mount['mountPath']}/tls.{name}" for name in ("crt", "key")]
    assert "subPath" not in mount
    assert "tls" not in chart.rendered().config()["gateway"]


def test_a_digest_takes_precedence(chart: Chart) -> None:
    """The tag is ignored then."""
    digest = f"sha256:{'0' * 64}"
    rendered = chart.rendered(changes={"gateway.image": {"tag": "1.2", "digest": digest}})
    assert rendered.gateway().container["image"] == f"quantgate-gateway@{digest}"


@examples
def test_pods_have_time_to_drain(chart: Chart, values: Path) -> None:
    """Kubernetes kills a pod after the pause before SIGTERM and the time for its running requests."""
    rendered = chart.rendered(values)
    drain = GatewaySettings.model_validate(
        {key: value for key, value in rendered.config()["gateway"].items() if key == "drain_seconds"}
    ).drain_seconds
    assert rendered.gateway().spec["terminationGracePeriodSeconds"] >= pause(rendered.gateway()) + drain + 10
    for pod in rendered.engines():
        until_killed = pod.spec["terminationGracePeriodSeconds"] - pause(pod)
        arguments = pod.arguments()
        shutdown_timeout = int(arguments[arguments.index("--shutdown-timeout") + 1])
        # vLLM hangs when its own time ends with requests running; 30 s of it are beyond `drain_seconds`.
        assert shutdown_timeout - 30 < until_killed < shutdown_timeout


def pause(pod: Pod) -> int:
    """Seconds before SIGTERM."""
    seconds: int = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert seconds > 0
    return seconds


@examples
def test_only_gateways_talk_to_kubernetes(chart: Chart, values: Path) -> None:
    """The pods that run models have no token."""
    rendered = chart.rendered(values)
    assert all(pod.spec["automountServiceAccountToken"] is False for pod in rendered.engines())
    assert rendered.gateway().spec["serviceAccountName"] in rendered.of("ServiceAccount")


@examples
def test_mounts_are_volumes(chart: Chart, values: Path) -> None:
    """Each mount has its volume and the other way round; models and configuration are read-only."""
    rendered = chart.rendered(values)
    for pod in rendered.pods():
        mounts = {mount["name"]: mount for mount in pod.container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod.spec["volumes"]}
        assert all(mounts[name].get("readOnly") for name in mounts.keys() & {"config", "models", "model"})
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.spec["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert all(claim in rendered.of("PersistentVolumeClaim") or claim == "models" for claim in claims)


@examples
def test_a_new_version_restarts_no_engine(chart: Chart, values: Path) -> None:
    """Pod templates and selectors have no label that changes with the chart."""
    rendered = chart.rendered(values)
    assert all(pod.labels.keys() <= STABLE_LABELS for pod in rendered.pods())
    assert all(selector.keys() <= STABLE_LABELS for selector in selectors(rendered))


def selectors(rendered: Rendered) -> list[dict[str, str]]:
    """The labels by which objects select pods."""
    found = [service["spec"]["selector"] for service in rendered.of("Service").values()]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
        found += [each["spec"]["selector"]["matchLabels"] for each in rendered.of(kind).values()]
    return found


# Objects


@examples
def test_every_selector_finds_pods(chart: Chart, values: Path) -> None:
    """Of Services, budgets, monitors and pools; a Deployment selects its own pods and no others."""
    rendered = chart.rendered(values)
    assert all(rendered.selected(selector) for selector in selectors(rendered))
    for name, deployment in rendered.of("Deployment").items():
        (pod,) = rendered.selected(deployment["spec"]["selector"]["matchLabels"])
        assert pod.workload == f"deployment/{name}"


@examples
def test_a_budget_covers_all_pods_of_a_variant(chart: Chart, values: Path) -> None:
    """Those of a group, too: it is gone with any of its pods."""
    rendered = chart.rendered(values)
    budgets = [each["spec"] for each in rendered.of("PodDisruptionBudget").values()]
    covered = [pod for each in budgets for pod in rendered.selected(each["selector"]["matchLabels"])]
    assert sorted(covered, key=repr) == sorted(rendered.pods(), key=repr)
    assert {each["maxUnavailable"] for each in budgets} == {1}


@examples
def test_services_lead_to_ports(chart: Chart, values: Path) -> None:
    """The target of each is a port of every pod that it selects."""
    rendered = chart.rendered(values)
    for service in rendered.of("Service").values():
        for port, pod in (
            (port, pod) for port in service["spec"]["ports"] for pod in rendered.selected(service["spec"]["selector"])
        ):
            assert port["targetPort"] in pod.ports()


@examples
def test_each_variant_is_discovered(chart: Chart, values: Path) -> None:
    """Its entry in quantgate.yaml names a Service with its label and pods, that port, and the workload of the pods."""
    rendered = chart.rendered(values)
    pods = {pod.variant for pod in rendered.engines()}
    entries = [entry for entry in rendered.config()["replicas"] if "kubernetes" in entry]
    assert {entry["variant"] for entry in entries} == pods
    for entry in entries:
        found = entry["kubernetes"]
        service = rendered.of("Service")[found["service"]]
        assert service["metadata"]["labels"]["quantgate.io/variant"] == entry["variant"]
        assert service["metadata"]["namespace"] == found["namespace"]
        assert found["port"] in [port["name"] for port in service["spec"]["ports"]]
        (pod,) = rendered.selected(service["spec"]["selector"])
        assert pod.variant == entry["variant"]
        assert found.get("workload") == (pod.workload if rendered.of("Role")["qg-quantgate"]["rules"][1:] else None)


def test_leaders_alone_answer(chart: Chart) -> None:
    """A group has a leader that listens and workers that do not; variables of the controller lead them together."""
    rendered = chart.rendered(GROUPS)
    (group,) = rendered.of("LeaderWorkerSet").values()
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 2
    assert group["metadata"]["name"] not in rendered.of("Service"), "the controller creates a Service of this name"
    leader, worker = (pod for pod in rendered.pods() if pod.workload.startswith("leaderworkerset/"))
    assert [each for each in worker.arguments() if each not in leader.arguments()] == ["--headless"]
    arguments = leader.arguments()
    assert arguments[arguments.index("--nnodes") :][:6] == [
        *("--nnodes", "2", "--node-rank", "$(LWS_WORKER_INDEX)"),
        *("--master-addr", "$(LWS_LEADER_ADDRESS)"),
    ]
    assert leader.container["resources"]["limits"]["nvidia.com/gpu"] == 16 // 2


@examples
def test_names_are_unique_and_short(chart: Chart, values: Path) -> None:
    """Also with a long name of the release: controllers append to names, and pods have them in labels of 63."""
    for changes in ({}, {"fullnameOverride": "a-release-with-a-very-long-name-of-forty"}):
        rendered = chart.rendered(values, changes)
        names = [(each["kind"], each["metadata"]["name"]) for each in rendered.objects]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name) for _, name in names)
        workloads = [*rendered.of("Deployment"), *rendered.of("LeaderWorkerSet")]
        assert max(map(len, workloads)) <= 52


def test_long_names_of_variants_stay_apart(chart: Chart) -> None:
    """Two names that are equal in their first characters."""
    begin = "qwen3-235b-a22b-instruct-2507-finetuned-on-our-data"
    rendered = chart.rendered(changes={f"variants.{begin}-{scheme}": {} for scheme in ("fp8", "int4")})
    assert len([name for name in rendered.of("Deployment") if name.startswith("qg-quantgate-qwen3")]) == 2


def test_autoscaled_workloads_have_no_number_of_replicas(chart: Chart) -> None:
    """An upgrade of the release leaves it to the autoscaler, or to the rollout."""
    rendered = chart.rendered(SEVERAL)
    numbers = {name: each["spec"].get("replicas") for name, each in rendered.of("Deployment").items()}
    assert numbers == {"qg-quantgate": None, "qg-quantgate-qwq-int8": None, "qg-quantgate-qwq-int4": 4}
    (scaler,) = rendered.of("HorizontalPodAutoscaler").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] in rendered.of("Deployment")
    assert [metric["type"] for metric in scaler["spec"]["metrics"]] == ["Pods", "Resource"]


def test_gateways_share_a_database_or_have_a_volume(chart: Chart) -> None:
    """SQLite: one process at a time. PostgreSQL: a new pod is ready before an old one stops."""
    alone, several = chart.rendered(), chart.rendered(SEVERAL)
    assert alone.of("Deployment")["qg-quantgate"]["spec"]["strategy"] == {"type": "Recreate"}
    assert "qg-quantgate-state" in alone.of("PersistentVolumeClaim")
    assert several.of("Deployment")["qg-quantgate"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert not several.of("PersistentVolumeClaim")


@pytest.mark.parametrize("values", [GROUPS, SEVERAL], ids=lambda path: path.stem)
def test_permissions(chart: Chart, values: Path) -> None:
    """Gateways read EndpointSlices; with `rollouts.scale` they scale the workloads of the chart, and no others."""
    rendered = chart.rendered(values)
    (role,) = rendered.of("Role").values()
    rules = {resource: rule for rule in role["rules"] for resource in rule["resources"]}
    assert rules["endpointslices"]["verbs"] == ["get", "list", "watch"]
    if values is SEVERAL:
        assert rules.keys() == {"endpointslices"}
        return
    named = {kind: rules[f"{kind}s/scale"]["resourceNames"] for kind in ("deployment", "leaderworkerset")}
    scaled = {f"{kind}/{name}" for kind, names in named.items() for name in names}
    assert scaled == {entry["kubernetes"]["workload"] for entry in rendered.config()["replicas"]}
    assert all(rules[f"{kind}s/scale"]["verbs"] == ["get", "patch"] for kind in named)
    assert rules["horizontalpodautoscalers"]["verbs"] == ["list"]


def test_monitors_find_ports(chart: Chart) -> None:
    """Gateways are scraped as job quantgate with the admin key, engines as job vllm: as rules and dashboards expect."""
    rendered = chart.rendered(SEVERAL)
    (gateways,) = rendered.of("ServiceMonitor").values()
    selected = gateways["spec"]["selector"]["matchLabels"].items()
    (service,) = [each for each in rendered.of("Service").values() if selected <= each["metadata"]["labels"].items()]
    (endpoint,) = gateways["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    secret = environment(rendered.gateway())["QUANTGATE_ADMIN_KEY"]["valueFrom"]["secretKeyRef"]
    assert endpoint["authorization"]["credentials"] == secret
    (engines,) = rendered.of("PodMonitor").values()
    pods = rendered.selected(engines["spec"]["selector"]["matchLabels"])
    assert {pod.variant for pod in pods} == {"qwq-int8", "qwq-int4"}
    (scraped,) = engines["spec"]["podMetricsEndpoints"]
    assert all(scraped["port"] in pod.ports() for pod in pods)
    jobs = [each["relabelings"][0]["replacement"] for each in (endpoint, scraped)]
    assert jobs == ["quantgate", "vllm"]


def environment(pod: Pod) -> dict[str, Object]:
    """Environment variables of a pod by name."""
    return {each["name"]: each for each in pod.container["env"]}


def test_a_pool_selects_the_pods_of_the_service(chart: Chart) -> None:
    """An InferencePool per variant, over the same pods and port, also for groups."""
    pooled = {"inferencePool": {"enabled": True, "endpointPickerRef": {"name": "epp"}}}
    for rendered in (chart.rendered(POOL), chart.rendered(GROUPS, pooled)):
        pools = rendered.of("InferencePool")
        assert pools.keys() == {entry["kubernetes"]["service"] for entry in rendered.config()["replicas"]}
        for name, pool in pools.items():
            pods = rendered.selected(pool["spec"]["selector"]["matchLabels"])
            assert pods == rendered.selected(rendered.of("Service")[name]["spec"]["selector"])
            assert [port["number"] for port in pool["spec"]["targetPorts"]] == [*pods[0].ports().values()]


# Network policies


@examples
def test_only_gateways_reach_engines(chart: Chart, values: Path) -> None:
    """Besides the pods of one replica among themselves, Prometheus if it is to scrape, and endpoint pickers."""
    rendered = chart.rendered(values)
    policies = list(rendered.of("NetworkPolicy").values())
    for pod in rendered.engines():
        assert permits(policies, pod.labels, 8000, Peer(rendered.gateway().labels))
        assert not permits(policies, pod.labels, 8000, STRANGER)
        assert not permits(policies, pod.labels, 29500, Peer(rendered.gateway().labels))
        elsewhere = Peer(rendered.gateway().labels, {"kubernetes.io/metadata.name": "other"}, same_namespace=False)
        assert not permits(policies, pod.labels, 8000, elsewhere)
        assert permits(policies, pod.labels, 8000, MONITORING) == bool(rendered.of("PodMonitor"))
        pickers = Peer({}, {"kubernetes.io/metadata.name": "gateways"}, same_namespace=False)
        assert permits(policies, pod.labels, 8000, pickers) == bool(rendered.of("InferencePool"))
    variants = {pod.variant for pod in rendered.engines()}
    together = {pod.variant for pod in rendered.engines() if WORKER_INDEX in pod.labels}
    for variant, other in ((one, two) for one in variants for two in variants):
        one, two = (next(pod for pod in rendered.engines() if pod.variant == name) for name in (variant, other))
        assert permits(policies, one.labels, 29500, Peer(two.labels)) == (variant == other and variant in together)


@examples
def test_who_reaches_gateways(chart: Chart, values: Path) -> None:
    """The port for clients is open to the configured peers, the admin port to Prometheus."""
    rendered = chart.rendered(values)
    policies = list(rendered.of("NetworkPolicy").values())
    labels = rendered.gateway().labels
    apps = Peer({}, {"kubernetes.io/metadata.name": "apps"}, same_namespace=False)
    assert permits(policies, labels, 8000, apps)
    assert permits(policies, labels, 8000, STRANGER) == (values != SEVERAL)
    assert permits(policies, labels, 8001, MONITORING)
    assert not permits(policies, labels, 8001, apps)
    assert not permits(policies, labels, 8001, STRANGER)


def test_administrators_can_be_peers(chart: Chart) -> None:
    """`networkPolicy.admin`; with `enabled: false` there are no policies."""
    peer = {"podSelector": {"matchLabels": {"app": "anything"}}}
    rendered = chart.rendered(changes={"networkPolicy.admin": [peer]})
    assert permits(list(rendered.of("NetworkPolicy").values()), rendered.gateway().labels, 8001, STRANGER)
    assert not chart.rendered(changes={"networkPolicy.enabled": False}).of("NetworkPolicy")


def test_egress_can_be_closed(chart: Chart) -> None:
    """Only with rules of its own: what a gateway calls is not known to the chart."""
    types = {name: each["spec"]["policyTypes"] for name, each in chart.rendered(SEVERAL).of("NetworkPolicy").items()}
    assert types == {"qg-quantgate-gateway": ["Ingress"], "qg-quantgate-engine": ["Ingress", "Egress"]}


@examples
def test_secrets_stay_in_secrets(chart: Chart, values: Path) -> None:
    """Each variable that quantgate.yaml reads is set from a Secret, and no Secret is rendered."""
    rendered = chart.rendered(values)
    wanted = set(re.findall(r"\$\{env:(\w+)\}", rendered.config_text()))
    given = environment(rendered.gateway())
    assert "QUANTGATE_ADMIN_KEY" in wanted
    assert all("secretKeyRef" in given[name]["valueFrom"] for name in wanted)
    assert not rendered.of("Secret")


def test_options_that_are_off_leave_nothing(chart: Chart) -> None:
    """Objects of extensions that a cluster may not have are rendered on demand only."""
    kinds = {each["kind"] for each in chart.rendered().objects}
    assert not kinds & {"ServiceMonitor", "PodMonitor", "PrometheusRule", "LeaderWorkerSet", "InferencePool"}
