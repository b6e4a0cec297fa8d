"""Metrics of the client port, computed at each scrape."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.http.server import HttpServer
from gateway.observability.metrics import table


@dataclass(frozen=True, slots=True, eq=False)
class ConnectionCollector(Collector):
    """Exposes the open connections of a server, and the memory that request bodies take."""

    server: HttpServer

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        connections = table.CLIENT_CONNECTIONS.gauge_family()
        active = self.server.busy
        connections.add_metric(["active"], active)
        connections.add_metric(["idle"], self.server.connections - active)
        body_bytes = table.REQUEST_BODY_BYTES.gauge_family()
        body_bytes.add_metric([], self.server.reserved_bytes)
        yield from (connections, body_bytes)
