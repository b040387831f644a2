"""Nodes with addresses of their own, where nothing is reached by loopback and each has other ports."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.train.config_file import read_train_config
from rayllm.train.data.rows import Kind
from rayllm.train.launch import launch
from rayllm.train.progress import read_metrics
from rayllm_cluster.session import Session
from tests.packed_rows import pack_rows, seven_pairs
from tests.ray.hosts import Host, cluster_address, two_hosts, why_not

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(num_cpus=2) as both:
        yield both


GENERATE = """
import json, sys
import ray
from ray.util.placement_group import placement_group_table
from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm_cluster.session import Session

prompts, params = json.loads(sys.argv[3]), SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
with Session.start(address=sys.argv[1]):
    size = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with LLM(sys.argv[2], cache=CacheConfig(num_blocks=100), **size) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        (group,) = (group for group in placement_group_table().values() if group["state"] == "CREATED")
        print(json.dumps([tokens, sorted(address[node] for node in group["bundles_to_node_id"].values())]))
"""


def test_a_pipeline_over_two_hosts_of_two_tensor_ranks_each(
    hosts: tuple[Host, Host], make_tiny_model: Callable[..., Path]
) -> None:
    model = make_tiny_model(num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    prompts, params = ["Once upon a time", "x" * 100], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(str(model), cache=CacheConfig(num_blocks=100)) as alone:
        expected = [output.outputs[0].token_ids for output in alone.generate(prompts, params)]
    tokens, addresses = json.loads(hosts[0].python(GENERATE, cluster_address(hosts[0]), model, json.dumps(prompts)))
    assert addresses == [hosts[0].address] * 2 + [hosts[1].address] * 2
    assert tokens == expected


TRAIN = """
import os, sys
from pathlib import Path
import ray
from rayllm.train.config_file import read_train_config
from rayllm.train.launch import launch

address, file, recipe, *settings = sys.argv[1:]
launch(read_train_config(Path(file), settings), recipe, address=address)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pretrain", "dpo"])
def test_training_on_two_hosts_is_as_on_one(
    recipe: str, hosts: tuple[Host, Host], tiny_model: Path, tmp_path: Path
) -> None:
    """Four workers, two on each host."""
    length = 32
    if recipe == "dpo":
        data = seven_pairs(tmp_path / "data", tiny_model, length)
    else:
        rows = [{"text": f"the cat {n % 7} sat on the mat and the dog {n % 3} sat. " * 4} for n in range(40)]
        data = pack_rows(tmp_path / "data", tiny_model, Kind.TEXT, rows, length)
    file = tmp_path / "train.toml"
    file.write_text(
        f"""
run = "{tmp_path / "one"}"
[model]
start = "{tiny_model}"
[data]
path = "{data}"
[batch]
sequence_length = {length}
tokens = {4 * length}
[optimizer]
learning_rate = 1e-3
[schedule]
steps = 3
warmup_steps = 1
[layout]
shard = 2
replicate = 2
"""
    )
    hosts[0].python(TRAIN, cluster_address(hosts[0]), file, recipe, f"run={tmp_path / 'two'}")
    with Session.start(num_cpus=5):
        launch(read_train_config(file, []), recipe)
    one, two = (
        [(row.loss, row.grad_norm, row.measures) for row in read_metrics(tmp_path / run)] for run in ("one", "two")
    )
    assert len(one) == 3
    assert one == two


def test_the_doctor_finds_two_hosts_well(hosts: tuple[Host, Host]) -> None:
    command = [Path(sys.executable).with_name("rayllm"), "doctor", "--address", cluster_address(hosts[0]), "--json"]
    run = hosts[0].popen(*command, "--pp", "4", stdout=subprocess.PIPE)
    said, _ = run.communicate(timeout=120)
    findings = json.loads(said)["findings"]
    wrong = [each for each in findings if each["problem"] is not None]
    assert {each["check"] for each in wrong} <= {"memory", "shared memory"}, "what this machine may have too little of"
    seen = Counter(each["seen"].split(" on ")[0] for each in findings if each["check"] == "address")
    assert seen == {host.address: 2 for host in hosts}
