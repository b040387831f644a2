"""int8 weights give SmolLM2's log-likelihoods within the bounds that README.md states, of float32's."""

from pathlib import Path

import numpy as np
import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.eval.data import Data, Table
from rayllm.eval.local_backend import LocalBackend
from tests.eval_documents import ANATOMY, PIQA
from tests.eval_runs import rows, run, write_table

pytestmark = pytest.mark.slow

TASKS = (("mmlu_anatomy", 2), ("piqa", 0))


def likelihoods(quantize: str | None, data: Data, output: Path) -> np.ndarray:
    """Nats a token, one for each choice of each document."""
    backend = LocalBackend.open(
        EngineConfig(
            model=ModelConfig(model="smollm2-135m", dtype="float32", quantize=quantize),
            cache=CacheConfig(cpu_memory_bytes=1 << 29),
        )
    )
    try:
        for task, shots in TASKS:
            run(task, backend, data, output, num_fewshot=shots)
    finally:
        backend.close()
    responses = [each for task, _ in TASKS for row in rows(output, task) for each in row["responses"]]
    return np.array([each["logprob"] / each["num_tokens"] for each in responses])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    for split, some in ANATOMY.items():
        write_table(folder, Table(name="cais/mmlu", config="anatomy", split=split, columns=()), some)
    write_table(folder, Table(name="baber/piqa", split="validation", columns=()), PIQA["validation"])
    return Data(folder)


@pytest.fixture(scope="module")
def plain(data: Data, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return likelihoods(None, data, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("quantize", "mean_bound", "worst_bound"), [("w8a16", 0.1, 0.2), ("w8a8", 0.3, 0.6)])
def test_int8_is_close(
    quantize: str, mean_bound: float, worst_bound: float, data: Data, plain: np.ndarray, tmp_path: Path
) -> None:
    gaps = np.abs(likelihoods(quantize, data, tmp_path) - plain)
    print(f"{quantize}: {gaps.size} choices, mean {gaps.mean():.4f}, worst {gaps.max():.4f} nats a token")
    assert 0 < gaps.mean() < mean_bound
    assert gaps.max() < worst_bound
