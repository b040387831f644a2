"""The parts of starting an endpoint that need no Ray."""

import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.core.errors import ConfigError
from rayllm.models.weight_version import weight_version
from rayllm.serve.config import ServeConfig
from rayllm.serve.local import _cause, _check_port, _free_ports, _grpc_block

ENGINE = EngineConfig(model=ModelConfig(model="/models/Some-Model/"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"http_port": 0}, "http_port"),
        ({"grpc_port": 65536}, "grpc_port"),
        ({"http_port": 9000}, "both 9000"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"min_replicas": 0}, "max_replicas is missing"),
        ({"num_replicas": 2, "max_replicas": 3}, "leave one out"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 4, "max_replicas": 3}, "min_replicas"),
        ({"max_replicas": 3, "target_ttft_s": 0.0}, "target_ttft_s"),
        ({"max_replicas": 3, "downscale_delay_s": -1.0}, "downscale_delay_s"),
        ({"max_request_s": 0.0}, "max_request_s"),
        ({"max_request_s": float("nan")}, "max_request_s"),
        ({"max_request_s": float("inf")}, "max_request_s"),
        ({"drain_timeout_s": -1.0}, "drain_timeout_s"),
    ],
)
def test_config_is_checked(options, problem):
    with pytest.raises(ConfigError, match=problem):
        ServeConfig(engine=ENGINE, **options)


@pytest.mark.parametrize(
    ("model", "name"),
    [("/models/Some-Model/", "Some-Model"), ("org/name", "name"), ("x/y.gguf", "y"), ("smollm2-135m", "smollm2-135m")],
)
def test_served_model_name(model, name):
    assert ServeConfig(engine=EngineConfig(model=ModelConfig(model=model))).served_model == name


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"grpc_port: port {port} cannot be used: address already in use"):
            _check_port("grpc_port", port)
    _check_port("grpc_port", port)
    assert len(set(_free_ports(4))) == 4


def test_the_cause_out_of_rays_report():
    ours = (
        "Traceback:\n  File x\nrayllm.core.errors.ConfigError: tensor: 4 does not divide 6\n\nDuring:\nRuntimeError: x"
    )
    assert _cause(ours) == "tensor: 4 does not divide 6"
    assert _cause("Traceback\n  File y\nMemoryError: too much\n\n") == "MemoryError: too much"
    assert _cause("") == "no reason was given"


def test_weight_version_follows_the_weights(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert weight_version(copy) == weight_version(tiny_model)
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name] += torch.full_like(weights[name], 1e-3)
    save_file(weights, copy / "model.safetensors")
    assert weight_version(copy) != weight_version(tiny_model)


def test_endpoints_of_one_machine_share_no_grpc_port():
    with _grpc_block() as one, _grpc_block() as two:
        assert len(one) == len(two) == 99
        assert not set(one) & set(two)
        for port in (one.start - 1, two.start - 1):
            with pytest.raises(ConfigError, match="cannot be used"):
                _check_port("claim", port)
    _check_port("claim", one.start - 1)
