"""What an operator watches: every metric by name, and where its values go.

Values go to sinks: Prometheus text for this process's `/metrics`, and inside a replica Ray's own metrics too
(`ray_metrics`), which each node exports with a label for the replica. What happens to requests is told to the sinks as
it happens; the engine's figures are read from `stats()`. Knows nothing else of the engine.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from rayllm.engine.async_engine import EngineStats

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Definition:
    name: str
    description: str
    labels: tuple[str, ...] = ()


REQUESTS: Final = Definition("rayllm_requests", "Requests by how they ended", ("face", "outcome"))
ROUTED: Final = Definition(
    "rayllm_routed_requests",
    "Requests by why their replica was chosen, and whether they were there",
    ("reason", "target"),
)
PEER_FAILURES: Final = Definition(
    "rayllm_peer_failures", "Requests that were sent on to a replica which refused them or was lost", ("kind",)
)
EVENTS: Final = (REQUESTS, ROUTED, PEER_FAILURES)
TIME_TO_FIRST_TOKEN: Final = Definition(
    "rayllm_time_to_first_token_seconds", "From a request's arrival to its first token", ("face",)
)
QUEUE: Final = Definition("rayllm_queue_seconds", "From a request's entry into the queue to its admission", ("face",))
INTER_TOKEN: Final = Definition("rayllm_inter_token_seconds", "Between two pieces of an answer", ("face",))
DURATION: Final = Definition("rayllm_request_seconds", "From a request's arrival to its end", ("face",))
HISTOGRAMS: Final = (TIME_TO_FIRST_TOKEN, QUEUE, INTER_TOKEN, DURATION)
WEIGHTS: Final = Definition("rayllm_weights_info", "1 for the version of the weights that answer", ("version",))

GAUGES: Final[dict[Definition, Callable[[EngineStats], float]]] = {
    Definition("rayllm_running", "Sequences in the running batch"): lambda stats: stats.running,
    Definition("rayllm_waiting", "Sequences in the queue"): lambda stats: stats.waiting,
    Definition("rayllm_waiting_tokens", "Prompt tokens in the queue"): lambda stats: stats.waiting_tokens,
    Definition("rayllm_free_blocks", "KV cache blocks that can be handed out"): lambda stats: stats.free_blocks,
    Definition("rayllm_total_blocks", "KV cache blocks"): lambda stats: stats.total_blocks,
    Definition("rayllm_kv_cache_usage", "Share of the KV cache that is in use"): lambda stats: _usage(stats),
    Definition(
        "rayllm_last_step_age_seconds",
        "Seconds since the engine last completed a step, 0 while it has nothing to do",
    ): lambda stats: stats.last_step_age_s,
    Definition(
        "rayllm_last_detection_seconds", "Seconds that the last loss of a shard went unnoticed, at most"
    ): lambda stats: stats.last_detection_s,
    Definition(
        "rayllm_last_recovery_seconds", "Seconds that it took to replace the shards, the last time"
    ): lambda stats: stats.last_recovery_s,
}
COUNTERS: Final[dict[Definition, Callable[[EngineStats], float]]] = {
    Definition("rayllm_prefix_hit_tokens", "Prompt tokens found in the prefix cache"): lambda stats: (
        stats.prefix_hit_tokens
    ),
    Definition("rayllm_prefix_query_tokens", "Prompt tokens looked up in the prefix cache"): lambda stats: (
        stats.prefix_query_tokens
    ),
    Definition("rayllm_preemptions", "Sequences sent back to the queue for want of blocks"): lambda stats: (
        stats.preemptions
    ),
    Definition("rayllm_recoveries", "Times that the shards were replaced because one was lost"): lambda stats: (
        stats.recoveries
    ),
    Definition("rayllm_steps", "Engine steps completed"): lambda stats: stats.steps,
    Definition("rayllm_step_seconds", "Seconds in which the ranks had a batch"): lambda stats: stats.step_s,
    Definition(
        "rayllm_framework_seconds", "Seconds in which there was work and the ranks had no batch"
    ): lambda stats: stats.framework_s,
    Definition("rayllm_prompt_tokens", "Prompt tokens accepted"): lambda stats: stats.prompt_tokens,
    Definition("rayllm_generated_tokens", "Tokens generated"): lambda stats: stats.generated_tokens,
}


def _usage(stats: EngineStats) -> float:
    return 1.0 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0


class Sink(Protocol):
    """`labels`: a value for each of the definition's labels."""

    def count(self, metric: Definition, labels: Mapping[str, str], amount: float) -> None: ...

    def observe(self, metric: Definition, labels: Mapping[str, str], value: float) -> None: ...

    def set(self, metric: Definition, labels: Mapping[str, str], value: float) -> None: ...


class Metrics:
    """`replica` labels all that `/metrics` says: behind a proxy each scrape may reach another replica, and two counters
    must never look like one. None outside a replica."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self, stats: Callable[[], EngineStats], weight_version: Callable[[], str], *, replica: str | None = None
    ) -> None:
        self._stats = stats
        self._weight_version = weight_version
        self._registry = CollectorRegistry()
        extra = {} if replica is None else {"replica": replica}
        self._registry.register(_EngineCollector(stats, weight_version, extra))
        self._sinks: list[Sink] = [_PrometheusSink(self._registry, extra)]
        self._exports: list[_Export] = []

    def export_to(self, sink: Sink) -> None:
        """Everything goes there from now on; the engine's figures whenever `publish` is called."""
        self._sinks.append(sink)
        self._exports.append(_Export(sink))

    def ended(self, face: str, outcome: str) -> None:
        self.count(REQUESTS, {"face": face, "outcome": outcome})

    def count(self, metric: Definition, labels: Mapping[str, str]) -> None:
        """`metric`: one of `EVENTS`, which has happened once more."""
        for sink in self._sinks:
            sink.count(metric, labels, 1.0)

    def observe(self, metric: Definition, face: str, seconds: float) -> None:
        """`metric`: one of `HISTOGRAMS`."""
        for sink in self._sinks:
            sink.observe(metric, {"face": face}, seconds)

    def publish(self) -> None:
        stats, version = self._stats(), self._weight_version()
        for export in self._exports:
            export.publish(stats, version)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Export:
    """The engine's figures as a sink takes them: counters as what was added, and no weights but those that answer."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._counted: dict[Definition, float] = dict.fromkeys(COUNTERS, 0.0)
        self._version: str | None = None

    def publish(self, stats: EngineStats, version: str) -> None:
        for metric, value in GAUGES.items():
            self._sink.set(metric, {}, value(stats))
        for metric, value in COUNTERS.items():
            total = value(stats)
            if total > self._counted[metric]:
                self._sink.count(metric, {}, total - self._counted[metric])
                self._counted[metric] = total
        if self._version not in (None, version):
            self._sink.set(WEIGHTS, {"version": str(self._version)}, 0.0)
        self._sink.set(WEIGHTS, {"version": version}, 1.0)
        self._version = version


class _PrometheusSink:
    def __init__(self, registry: CollectorRegistry, extra: Mapping[str, str]) -> None:
        self._extra = extra
        self._events = {
            metric: prometheus_client.Counter(
                metric.name, metric.description, (*metric.labels, *extra), registry=registry
            )
            for metric in EVENTS
        }
        self._histograms = {
            metric: prometheus_client.Histogram(
                metric.name, metric.description, (*metric.labels, *extra), buckets=SECONDS, registry=registry
            )
            for metric in HISTOGRAMS
        }

    def count(self, metric: Definition, labels: Mapping[str, str], amount: float) -> None:
        assert metric in self._events, "the engine's counters are read when they are scraped"
        self._events[metric].labels(**labels, **self._extra).inc(amount)

    def observe(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        self._histograms[metric].labels(**labels, **self._extra).observe(value)

    def set(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        raise AssertionError("the engine's gauges are read when they are scraped")


class _EngineCollector(Collector):
    def __init__(
        self, stats: Callable[[], EngineStats], weight_version: Callable[[], str], extra: Mapping[str, str]
    ) -> None:
        self._stats = stats
        self._weight_version = weight_version
        self._extra = extra

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        names, values = tuple(self._extra), tuple(self._extra.values())
        for metric, value in GAUGES.items():
            gauge = GaugeMetricFamily(metric.name, metric.description, labels=names)
            gauge.add_metric(values, value(stats))
            yield gauge
        for metric, value in COUNTERS.items():
            counter = CounterMetricFamily(metric.name, metric.description, labels=names)
            counter.add_metric(values, value(stats))
            yield counter
        weights = GaugeMetricFamily(WEIGHTS.name, WEIGHTS.description, labels=(*WEIGHTS.labels, *names))
        weights.add_metric((self._weight_version(), *values), 1.0)
        yield weights
