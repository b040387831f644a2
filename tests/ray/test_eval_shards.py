"""Tensor-parallel shards give the scores of one process."""

from pathlib import Path

import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from rayllm.eval.data import Data, Table
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.task import Generate, Generated, Response
from tests.eval_documents import ANATOMY, PIQA
from tests.eval_runs import answers, run, write_table

pytestmark = pytest.mark.ray


def scores(model: Path, tensor: int, data: Data, output: Path) -> list[tuple[str | None, list[float]]]:
    config = EngineConfig(
        model=ModelConfig(model=str(model)),
        parallel=ParallelConfig(tensor=tensor),
        cache=CacheConfig(num_blocks=200),
    )
    backend = LocalBackend.open(config)
    try:
        run("mmlu_anatomy", backend, data, output, num_fewshot=2)
        run("piqa", backend, data, output)
        texts = written(backend)
    finally:
        backend.close()
    return answers(output, "mmlu_anatomy") + answers(output, "piqa") + [(text, []) for text in texts]


def written(backend: LocalBackend) -> list[str]:
    """Greedy and sampled texts."""
    requests = [
        Generate(prompt=prompt, max_tokens=40, temperature=temperature)
        for prompt in ("and the", "hand", "To dry shoes quickly, use")
        for temperature in (0.0, 1.0)
    ]
    texts: dict[int, str] = {}

    def hear(index: int, response: Response) -> None:
        assert isinstance(response, Generated)
        (texts[index],) = response.texts

    backend.run(requests, range(len(requests)), hear)
    return [texts[index] for index in range(len(requests))]


def test_scores_do_not_depend_on_the_shards(session, make_tiny_model, tmp_path):
    for split, some in ANATOMY.items():
        write_table(tmp_path, Table(name="cais/mmlu", config="anatomy", split=split, columns=()), some)
    write_table(tmp_path, Table(name="baber/piqa", split="validation", columns=()), PIQA["validation"])
    model = make_tiny_model(max_position_embeddings=1024, intermediate_size=96)  # three kv heads, and 96 split by three
    one = scores(model, 1, Data(tmp_path), tmp_path / "one")
    three = scores(model, 3, Data(tmp_path), tmp_path / "three")
    assert [extracted for extracted, _ in three] == [extracted for extracted, _ in one]
    for (_, logprobs), (_, others) in zip(one, three, strict=True):
        assert others == pytest.approx(logprobs, abs=5e-5)
