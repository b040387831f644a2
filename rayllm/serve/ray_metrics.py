"""The metrics of a replica as Ray's: every node exports those of its replicas on one port, labelled by deployment,
application and replica, and Ray writes the list of nodes for Prometheus. Ray puts `ray_` before each name.

Made inside a replica, else the labels are missing.
"""

from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

from rayllm.serve.metrics import COUNTERS, EVENTS, GAUGES, HISTOGRAMS, SECONDS, WEIGHTS, Definition


class RaySink:
    def __init__(self) -> None:
        self._counters = {
            metric: Counter(metric.name, metric.description, metric.labels) for metric in (*EVENTS, *COUNTERS)
        }
        self._gauges = {metric: Gauge(metric.name, metric.description, metric.labels) for metric in (WEIGHTS, *GAUGES)}
        self._histograms = {
            metric: Histogram(metric.name, metric.description, list(SECONDS), metric.labels) for metric in HISTOGRAMS
        }

    def count(self, metric: Definition, labels: Mapping[str, str], amount: float) -> None:
        self._counters[metric].inc(amount, dict(labels))

    def observe(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        self._histograms[metric].observe(value, dict(labels))

    def set(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        self._gauges[metric].set(value, dict(labels))
