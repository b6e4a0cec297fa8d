"""Prometheus metrics: `table.py` defines them all, `Metrics` and the collectors supply the values."""

from gateway.observability.metrics.discovery import DiscoveryCollector
from gateway.observability.metrics.fleet import FleetCollector
from gateway.observability.metrics.instruments import Counter, Gauge, Histogram
from gateway.observability.metrics.loop_lag import LoopLag
from gateway.observability.metrics.metrics import UNKNOWN, Metrics, ServedMetrics

__all__ = [
    "UNKNOWN",
    "Counter",
    "DiscoveryCollector",
    "FleetCollector",
    "Gauge",
    "Histogram",
    "LoopLag",
    "Metrics",
    "ServedMetrics",
]
