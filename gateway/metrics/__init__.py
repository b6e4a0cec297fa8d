"""What Prometheus is told: the series of the gateway, and the fleet as it is when asked."""

from gateway.metrics.catalogue import (
    FIRST_TOKEN_SECONDS,
    INTER_TOKEN_SECONDS,
    OVERHEAD_SECONDS,
    REQUEST_SECONDS,
    UNKNOWN,
    Metrics,
    Served,
)
from gateway.metrics.engines import EngineCollector
from gateway.metrics.fleet import FleetCollector
from gateway.metrics.instruments import Count, Distribution, Level
from gateway.metrics.ladders import LadderCollector
from gateway.metrics.loop_lag import LoopLag

__all__ = [
    "FIRST_TOKEN_SECONDS",
    "INTER_TOKEN_SECONDS",
    "OVERHEAD_SECONDS",
    "REQUEST_SECONDS",
    "UNKNOWN",
    "Count",
    "Distribution",
    "EngineCollector",
    "FleetCollector",
    "LadderCollector",
    "Level",
    "LoopLag",
    "Metrics",
    "Served",
]
