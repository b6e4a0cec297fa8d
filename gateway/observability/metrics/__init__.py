"""What Prometheus is told: the series of the gateway, and the fleet as it is when asked."""

from gateway.observability.metrics.catalogue import (
    FIRST_TOKEN_SECONDS,
    INTER_TOKEN_SECONDS,
    OVERHEAD_SECONDS,
    REQUEST_SECONDS,
    UNKNOWN,
    Metrics,
    Served,
)
from gateway.observability.metrics.fleet import FleetCollector
from gateway.observability.metrics.instruments import Counter, Gauge, Histogram
from gateway.observability.metrics.loop_lag import LoopLag

__all__ = [
    "FIRST_TOKEN_SECONDS",
    "INTER_TOKEN_SECONDS",
    "OVERHEAD_SECONDS",
    "REQUEST_SECONDS",
    "UNKNOWN",
    "Counter",
    "FleetCollector",
    "Gauge",
    "Histogram",
    "LoopLag",
    "Metrics",
    "Served",
]
