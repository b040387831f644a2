"""What an operator watches, as Prometheus text.

Engine gauges are read when they are scraped; the rest is counted as requests go by. Knows the engine's `stats()` and
nothing else of it.
"""

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from rayllm.engine.async_engine import EngineStats

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES: Final = {
    "running": "Sequences in the running batch",
    "waiting": "Sequences in the queue",
    "waiting_tokens": "Prompt tokens in the queue",
    "free_blocks": "KV cache blocks that can be handed out",
    "total_blocks": "KV cache blocks",
    "last_step_age_s": "Seconds since the engine last completed a step, 0 while it has nothing to do",
    "last_detection_s": "Seconds that the last loss of a shard went unnoticed, at most",
    "last_recovery_s": "Seconds that it took to replace the shards, the last time",
}
_COUNTERS: Final = {
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache",
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache",
    "preemptions": "Sequences sent back to the queue for want of blocks",
    "recoveries": "Times that the shards were replaced because one was lost",
    "steps": "Engine steps completed",
    "prompt_tokens": "Prompt tokens accepted",
    "generated_tokens": "Tokens generated",
}


class Metrics:
    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        labels = ("face",)
        self.requests = Counter(
            "rayllm_requests", "Requests by how they ended", ("face", "outcome"), registry=self._registry
        )
        self.time_to_first_token = Histogram(
            "rayllm_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "rayllm_inter_token_seconds",
            "Between two pieces of an answer",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "rayllm_request_seconds",
            "From a request's arrival to its end",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, help_text in _GAUGES.items():
            unit = name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
            yield GaugeMetricFamily(f"rayllm_{unit}", help_text, value=getattr(stats, name))
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"rayllm_{name}", help_text, value=getattr(stats, name))
        used = 1.0 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
        yield GaugeMetricFamily("rayllm_kv_cache_usage", "Share of the KV cache that is in use", value=used)
