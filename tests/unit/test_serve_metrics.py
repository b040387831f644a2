"""Every name, in the code and on the dashboard; and what the sinks are told."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from rayllm.engine.async_engine import EngineStats
from rayllm.serve.metrics import (
    COUNTERS,
    EVENTS,
    GAUGES,
    HISTOGRAMS,
    PEER_FAILURES,
    QUEUE,
    ROUTED,
    WEIGHTS,
    Definition,
    Metrics,
)

DASHBOARD = Path(__file__).parents[2] / "k8s/grafana/rayllm.json"
STATS = EngineStats(
    running=3,
    waiting=2,
    waiting_tokens=70,
    free_blocks=25,
    total_blocks=100,
    prefix_hit_tokens=48,
    prefix_query_tokens=96,
    preemptions=1,
    steps=10,
    step_s=1.5,
    framework_s=0.25,
    prompt_tokens=500,
    generated_tokens=40,
    last_step_age_s=0.1,
    recoveries=1,
    last_detection_s=0.02,
    last_recovery_s=4.0,
)


class Recorder:
    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[str, ...]], float] = {}

    def count(self, metric: Definition, labels: Mapping[str, str], amount: float) -> None:
        key = (metric.name, tuple(labels.values()))
        self.values[key] = self.values.get(key, 0.0) + amount

    def observe(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        self.set(metric, labels, value)

    def set(self, metric: Definition, labels: Mapping[str, str], value: float) -> None:
        self.values[metric.name, tuple(labels.values())] = value


def exported_names() -> set[str]:
    """As Prometheus sees them, without Ray's prefix."""
    names = {metric.name for metric in (*GAUGES, WEIGHTS)}
    names |= {f"{metric.name}_total" for metric in (*COUNTERS, *EVENTS)}
    return names | {f"{metric.name}_{suffix}" for metric in HISTOGRAMS for suffix in ("bucket", "count", "sum")}


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it():
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"ray_(rayllm_\w+)", expression)}
    assert asked <= exported_names(), asked - exported_names()
    shown = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in asked}
    defined = {metric.name for metric in (*GAUGES, *COUNTERS, *HISTOGRAMS, *EVENTS, WEIGHTS)}
    assert shown == defined
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        labels = {label for selector in re.findall(r"{(.*?)}", expression) for label in re.findall(r"(\w+)=", selector)}
        assert labels <= {"application", "replica", "face", "target"}


def test_text_has_every_metric_and_the_replica():
    metrics = Metrics(lambda: STATS, lambda: "v1", replica="r1")
    metrics.ended("http", "ok")
    metrics.count(ROUTED, {"reason": "prefix", "target": "peer"})
    metrics.count(PEER_FAILURES, {"kind": "lost"})
    for metric in HISTOGRAMS:
        metrics.observe(metric, "grpc", 0.02)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = {sample.name for family in families.values() for sample in family.samples}
    assert exported_names() <= samples
    assert all(
        sample.labels["replica"] == "r1"
        for family in families.values()
        for sample in family.samples
        if not sample.name.endswith("_created")
    )
    value = {name: family.samples[0].value for name, family in families.items() if family.type in ("gauge", "counter")}
    assert value["rayllm_kv_cache_usage"] == 0.75
    assert (value["rayllm_step_seconds"], value["rayllm_framework_seconds"]) == (1.5, 0.25)
    assert families["rayllm_weights_info"].samples[0].labels["version"] == "v1"


def test_without_a_replica_there_is_no_such_label():
    text = Metrics(lambda: STATS, lambda: "v1").render().decode()
    assert "\nrayllm_running 3.0\n" in text


def test_exports_get_increments_and_one_version_of_the_weights():
    stats, version, recorder = STATS, "v1", Recorder()
    metrics = Metrics(lambda: stats, lambda: version)
    metrics.export_to(recorder)
    metrics.publish()
    stats, version = replace(STATS, generated_tokens=47, running=0), "v2"
    metrics.publish()
    metrics.ended("http", "ok")
    metrics.ended("http", "ok")
    metrics.count(ROUTED, {"reason": "load", "target": "peer"})
    metrics.observe(QUEUE, "http", 0.5)
    assert recorder.values["rayllm_generated_tokens", ()] == 47, "40 and 7 more"
    assert recorder.values["rayllm_preemptions", ()] == 1
    assert recorder.values["rayllm_running", ()] == 0
    assert recorder.values["rayllm_weights_info", ("v1",)] == 0
    assert recorder.values["rayllm_weights_info", ("v2",)] == 1
    assert recorder.values["rayllm_requests", ("http", "ok")] == 2
    assert recorder.values["rayllm_routed_requests", ("load", "peer")] == 1
    assert recorder.values["rayllm_queue_seconds", ("http",)] == 0.5
