"""PromQL from the table of metrics: a metric or a label that the gateway does not expose is an error here.

Each gateway worker is scraped by itself, so every query aggregates over workers: a gauge is summed, or its maximum is
taken, as its help says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gateway.observability.metrics import table
from gateway.observability.metrics.spec import MetricSpec

# Of prometheus_client's ProcessCollector, beside the table.
PROCESS_METRICS = (
    *("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds"),
    "process_start_time_seconds",
)
# Of vLLM, which has to be scraped as well; tests/contract compares them with the installed version.
ENGINE_METRICS = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:num_preemptions_total"),
    *("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "vllm:request_success_total"),
)
RANGE = "$__rate_interval"
JOB = 'job=~"$job"'
# As in deploy/prometheus/rules/recording.yml.
ERROR_CODES = 'code=~"5..|[a-z].*"'
CAPACITY_REASONS = 'reason=~"queue_full|queue_timeout"'
# Labels that variables of a dashboard select. A label is here if it means the same in every metric that has it.
VARIABLES = MappingProxyType({name: f'{name}=~"${name}"' for name in ("alias", "variant", "replica", "instance")})
# Labels that Prometheus adds to every series.
TARGET_LABELS = frozenset({"job", "instance"})


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries of one dashboard; `variables` are its variables beside `job`, as names of labels."""

    variables: tuple[str, ...] = ()

    def select(self, spec: MetricSpec, *matchers: str, suffix: str = "") -> str:
        """Select series by matchers such as `kind="prompt"`, and by the variables of the dashboard."""
        own = [re.split(r"[=!]", matcher)[0] for matcher in matchers]
        _check(spec, own)
        known = TARGET_LABELS.union(spec.labels)
        chosen = [VARIABLES[name] for name in self.variables if name in known and name not in own]
        selection = ", ".join([JOB, *chosen, *matchers])
        return f"{spec.name}{suffix}{{{selection}}}"

    def rate(self, spec: MetricSpec, *by: str, where: Sequence[str] = (), suffix: str = "") -> str:
        """Per-second rate of a counter."""
        _check(spec, by)
        return f"sum{_by(by)}(rate({self.select(spec, *where, suffix=suffix)}[{RANGE}]))"

    def increase(self, spec: MetricSpec, *by: str, where: Sequence[str] = (), over: str = "$__range") -> str:
        """Increase of a counter over a time; by default, over the time shown."""
        _check(spec, by)
        return f"sum{_by(by)}(increase({self.select(spec, *where)}[{over}]))"

    def quantile(self, share: float, spec: MetricSpec, *by: str, where: Sequence[str] = ()) -> str:
        """Quantile of a histogram."""
        return f"histogram_quantile({share}, {self.rate(spec, 'le', *by, where=where, suffix='_bucket')})"

    def total(self, spec: MetricSpec, *by: str, where: Sequence[str] = ()) -> str:
        """Sum of a gauge."""
        _check(spec, by)
        return f"sum{_by(by)}({self.select(spec, *where)})"

    def largest(self, spec: MetricSpec, *by: str, where: Sequence[str] = ()) -> str:
        """Maximum of a gauge."""
        _check(spec, by)
        return f"max{_by(by)}({self.select(spec, *where)})"

    def state(self, spec: MetricSpec, states: Sequence[str], *by: str) -> str:
        """Position, from 1, of the current state of a gauge that has one series per state."""
        _check(spec, by)
        selected = [self.select(spec, f'state="{state}"') for state in states]
        numbered = [f"{number} * {series}" for number, series in enumerate(selected, 1)]
        return f"max{_by(by)}({' or '.join(numbered)})"

    def errors(self, *by: str) -> str:
        """Rate of requests that failed, or for which no replica was free in time."""
        _check(table.REJECTIONS, by)
        failed = f"rate({self.select(table.REQUESTS, ERROR_CODES)}[{RANGE}])"
        refused = f"rate({self.select(table.REJECTIONS, CAPACITY_REASONS)}[{RANGE}])"
        return f"sum{_by(by)}({failed} or {refused})"

    def served_quality(self, measure: str, *by: str) -> str:
        """Mean quality of the answering variants, weighted by output tokens; unknown quality is left out."""
        tokens = self.rate(table.TOKENS, "variant", *by, where=['kind="completion"'])
        quality = self.largest(table.VARIANT_QUALITY, "variant", where=[f'measure="{measure}"'])
        weighted = f"sum{_by(by)}({tokens} * on (variant) group_left () {quality})"
        return ratio(weighted, f"sum{_by(by)}({tokens} and on (variant) {quality})")

    def process(self, name: str, function: str = "") -> str:
        """A metric of the gateway's process, by worker; `function` is `rate` or nothing."""
        assert name in PROCESS_METRICS, name
        selected = f"{name}{{{JOB}, {VARIABLES['instance']}}}"
        return f"{function}({selected}[{RANGE}])" if function else selected


def engine(name: str, aggregation: str = "sum", *by: str, rate: bool = False) -> str:
    """A metric of the engines themselves."""
    assert name in ENGINE_METRICS, name
    return f"{aggregation}{_by(by)}({f'rate({name}[{RANGE}])' if rate else name})"


def ratio(dividend: str, divisor: str) -> str:
    """One query divided by another; without a value where the divisor is 0."""
    return f"{dividend} / ({divisor} > 0)"


def share(part: str, whole: str) -> str:
    """Return each series of a query by one number; without a value where that is 0."""
    return f"{part} / on () group_left () ({whole} > 0)"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else " "


def _check(spec: MetricSpec, labels: Sequence[str]) -> None:
    unknown = set(labels) - {*spec.labels, *TARGET_LABELS, *(("le",) if spec.buckets else ())}
    assert not unknown, f"{spec.name} has no label {', '.join(sorted(unknown))}"
