"""Two replicas behind one address: told apart in the metrics."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.replicas import ask, running

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def endpoint(tiny_model):
    sections = {
        "model": {"model": str(tiny_model)},
        "cache": {"num_blocks": 200},
        "serve": {"num_replicas": 2},
    }
    tracing = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "ray.serve._private.tracing_utils:default_tracing_exporter",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
    }
    with running(sections, **tracing) as replicas:
        yield replicas


def test_a_node_exports_each_replica_s_metrics_apart(endpoint):
    for i in range(20):
        ask(endpoint.url, f"question {i}")
    values: dict[tuple[str, str], float] = {}
    give_up = time.monotonic() + 45  # Ray's processes report every few seconds
    while sum(value for (name, _), value in values.items() if name == "ray_rayllm_requests_total") < 20:
        assert time.monotonic() < give_up, values
        time.sleep(1)
        values.clear()
        for family in text_string_to_metric_families(httpx.get(endpoint.metrics_url).text):
            for sample in family.samples:
                if sample.name.startswith("ray_rayllm_") and "le" not in sample.labels:
                    values[sample.name, sample.labels["replica"]] = sample.value
    replicas = {replica for _, replica in values}
    assert len(replicas) == 2
    for replica in replicas:
        assert values["ray_rayllm_total_blocks", replica] == 200
        assert values["ray_rayllm_weights_info", replica] == 1
        assert values["ray_rayllm_step_seconds_total", replica] > 0
        assert values["ray_rayllm_time_to_first_token_seconds_count", replica] >= 1
    scraped = {httpx.get(f"{endpoint.url}/metrics").text.split('rayllm_running{replica="')[1][:8] for _ in range(10)}
    assert scraped <= {replica[:8] for replica in replicas}
