"""The manifests as kustomize renders them: KubeRay's schemas, its operator's rules, what drain and ports ask for."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayllm.cli.config_file import read_config, serve_config
from rayllm.core.errors import ConfigError
from rayllm.serve.config import ServeConfig
from tests import kuberay_schemas
from tests.e2e.replicas import ask
from tests.ports import free_ports

K8S = Path(__file__).parents[2] / "k8s"
KUSTOMIZATIONS = ("base", "overlays/cpu-demo")
CRDS = kuberay_schemas.directory()

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders them, is not here")
needs_crds = pytest.mark.skipif(CRDS is None, reason="KubeRay's CRDs are not here; name their folder in KUBERAY_CRDS")


def rendered(name: str) -> dict[str, dict[str, Any]]:
    """By kind; of config maps, by name."""
    output = subprocess.run(["kubectl", "kustomize", K8S / name], check=True, capture_output=True, text=True).stdout
    documents = list(yaml.safe_load_all(output))
    return {each["metadata"]["name"] if each["kind"] == "ConfigMap" else each["kind"]: each for each in documents}


def clusters(name: str) -> list[dict[str, Any]]:
    objects = rendered(name)
    specs = [objects["RayService"]["spec"]["rayClusterConfig"]]
    return specs + ([objects["RayJob"]["spec"]["rayClusterSpec"]] if "RayJob" in objects else [])


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_schemas(name):
    kinds = [each for each in rendered(name).values() if each["apiVersion"].startswith("ray.io/")]
    assert kinds
    for document in kinds:
        assert kuberay_schemas.problems(document, CRDS) == []


@needs_kubectl
@needs_crds
def test_a_typo_is_found():
    service = rendered("base")["RayService"]
    for path in (("rayClusterConfig", "workerGroupSpecs", 0), ("rayClusterConfig", "autoscalerOptions"), ()):
        broken = copy.deepcopy(service)
        target = broken["spec"]
        for key in path:
            target = target[key]
        target["minReplica"] = 1
        assert any("minReplica" in problem for problem in kuberay_schemas.problems(broken, CRDS))
    broken = copy.deepcopy(service)
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "one"
    assert kuberay_schemas.problems(broken, CRDS)


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_operator_s_rules(name):
    """What KubeRay checks in Go, beyond its schemas."""
    for cluster in clusters(name):
        assert cluster["rayVersion"] == "2.60.0"
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert all(pod["restartPolicy"] == "Never" for pod in pods(cluster)), "autoscaler v2"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for pod in pods(cluster):
            names = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= names
                assert not container["image"].endswith(":latest")
    objects = rendered(name)
    claims = {each["metadata"]["name"] for each in objects.values() if each["kind"] == "PersistentVolumeClaim"}
    text = json.dumps(objects)
    assert set(re.findall(r'"claimName": "([^"]+)"', text)) == claims
    maps = {each["metadata"]["name"] for each in objects.values() if each["kind"] == "ConfigMap"}
    assert set(re.findall(r'"configMap": {"(?:defaultMode": \d+, ")?name": "([^"]+)"', text)) <= maps


def test_its_haproxy_is_haproxy(tmp_path):
    """As Serve starts it on a node: the variable names the script itself."""
    script = tmp_path / "haproxy"
    shutil.copy(K8S / "base" / "haproxy", script)
    script.chmod(493)  # what the volume gives it
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script), "PATH": path}
    shown = subprocess.run([script, "-v"], env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert shown.stdout.startswith("HAProxy version")


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_ports_drain_and_probes(name, tmp_path):
    config = configuration(name, tmp_path)
    service = rendered(name)["RayService"]["spec"]
    cluster = service["rayClusterConfig"]
    for pod in pods(cluster):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert (ports["serve"], ports["serve-grpc"]) == (config.http_port, config.grpc_port)
        assert pod["terminationGracePeriodSeconds"] > config.drain_timeout_s
        environment = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert float(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= config.drain_timeout_s
        assert 0 < float(environment["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) <= 120
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > config.drain_timeout_s
    assert service["rayClusterDeletionDelaySeconds"] > config.drain_timeout_s
    (workers,) = cluster["workerGroupSpecs"]
    container = workers["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "serve"}
    assert config.min_replicas >= 1, "the probe would wake an endpoint that may sleep"
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus == (config.engine.parallel.tensor if name == "base" else 0)
    assert workers["maxReplicas"] >= config.most_replicas, "each replica on a node of its own"


@needs_kubectl
def test_one_configuration_for_cluster_and_laptop(tmp_path):
    for name in KUSTOMIZATIONS:
        assert configuration(name, tmp_path) == serve_config(read_config(K8S / name / "serve.yaml"))


@needs_kubectl
def test_training_reads_what_is_mounted():
    objects = rendered("base")
    job = objects["RayJob"]["spec"]
    command, path = job["entrypoint"].split(" --config ")
    assert command == "rayllm train sft"
    container = pods(job["rayClusterSpec"])[0]["containers"][0]
    mount = next(mount for mount in container["volumeMounts"] if mount["name"] == "train")
    assert path == f"{mount['mountPath']}/{next(iter(objects['rayllm-train']['data']))}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("model_name", "model_nam", "nearest is serve.model_name"),
        ("grpc_options", "grpc_option", "nearest is grpc_options"),
        ("  port: 8000", "  prot: 8000", "nearest is port"),
        ("from_settings", "from_setings", "import_path"),
        ("args:", "arg:", "nearest is args"),
    ],
)
def test_a_typo_in_serve_s_file_is_refused(tmp_path, old, new, problem):
    """Ray Serve itself ignores keys that it does not know."""
    text = (K8S / "base/serve.yaml").read_text()
    assert old in text
    path = tmp_path / "serve.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=problem):
        read_config(path)


@pytest.mark.ray
@needs_kubectl
def test_serve_config_v2_starts_here(tmp_path, tiny_model):
    """As it is in the rendered RayService, with a tiny model for the one it names."""
    path = tmp_path / "serve.yaml"
    path.write_text(rendered("overlays/cpu-demo")["RayService"]["spec"]["serveConfigV2"])
    http_port, grpc_port = map(str, free_ports(2))
    command = [sys.executable, "-m", "rayllm", "serve", tiny_model, "--config", path, "--model-name", "tiny", "--json"]
    process = subprocess.Popen(
        [*map(str, command), "--http-port", http_port, "--grpc-port", grpc_port],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert ask(started["http_url"], "hello")["usage"]["completion_tokens"] == 4
    finally:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=90) == 0


DEPLOY = """
import sys
from pathlib import Path
import httpx
import yaml
from rayllm.cli.config_file import read_config, serve_config
from rayllm.serve.local import _await_answers, _ray

path = Path(sys.argv[1])
config = serve_config(read_config(path))
with _ray(config):
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())), _blocking=True)
    url = f"http://127.0.0.1:{config.http_port}"
    _await_answers(url, f"127.0.0.1:{config.grpc_port}")
    print("answer:", httpx.get(f"{url}/v1/models").json()["data"][0]["id"])
"""


@pytest.mark.ray
@needs_kubectl
def test_ray_serve_deploys_it(tmp_path, tiny_model):
    """As Serve's controller does for KubeRay: by import path and `args`, in a process of its own."""
    document = yaml.safe_load(rendered("overlays/cpu-demo")["RayService"]["spec"]["serveConfigV2"])
    http_port, grpc_port = free_ports(2)
    document["http_options"]["port"], document["grpc_options"]["port"] = http_port, grpc_port
    document["applications"][0]["args"]["model"]["model"] = str(tiny_model)
    document["applications"][0]["args"]["serve"]["model_name"] = "deployed"
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-c", DEPLOY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answer: deployed" in done.stdout


def configuration(name: str, folder: Path) -> ServeConfig:
    path = folder / "serve.yaml"
    path.write_text(rendered(name)["RayService"]["spec"]["serveConfigV2"])
    return serve_config(read_config(path))
