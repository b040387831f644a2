"""The embedded model in float32 against transformers, token for token, however a step is cut and wherever it runs.

The short form (4 prompts, 24 tokens) runs in `make test`, the whole one (16 prompts, 64 tokens) in `make verify`.
"""

from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayllm.client import Client
from rayllm.core.config import CacheConfig, SchedulerConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.hub import resolve_model
from tests.e2e.demo import MODEL, server
from tests.ports import free_ports

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "한국의 수도는 서울이며, 부산은",
    "1, 2, 3, 5, 8, 13,",
    "A",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "In 1969, the first human being walked on the Moon. " * 3 + "His name was",
    "Water boils at",
    "List three fruits:\n1.",
    "Dear Sir or Madam,\n\nI am writing to you because",
    "Q: What is 12 times 12?\nA:",
    "The theory of relativity, published by Albert Einstein, says that " * 4,
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which plants " * 8,
    "🙂🙃🚀 are",
]


@dataclass(frozen=True)
class Reference:
    directory: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    params: SamplingParams


def reference(num_prompts: int, num_tokens: int) -> Reference:
    directory = resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS[:num_prompts]]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(generated[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return Reference(directory, prompts, answers, params)


@pytest.fixture(
    scope="module", params=[(4, 24), pytest.param((16, 64), marks=pytest.mark.slow)], ids=["short", "whole"]
)
def smollm2(request: pytest.FixtureRequest) -> Reference:
    return reference(*request.param)


def answers(llm: LLM, reference: Reference) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(reference.prompts, reference.params)]


def test_one_batch_one_by_one_and_prefix_hits(smollm2):
    with LLM(str(smollm2.directory), dtype="float32") as llm:
        assert answers(llm, smollm2) == smollm2.answers
        again = llm.generate(smollm2.prompts, smollm2.params)
        assert [output.outputs[0].token_ids for output in again] == smollm2.answers
        assert any(output.num_cached_tokens for output in again)
    with LLM(str(smollm2.directory), dtype="float32") as llm:
        one_by_one = [llm.generate([prompt], smollm2.params)[0].outputs[0].token_ids for prompt in smollm2.prompts]
        assert one_by_one == smollm2.answers


def test_chunked_prefill_of_16(smollm2):
    scheduler = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=16)
    with LLM(str(smollm2.directory), dtype="float32", scheduler=scheduler) as llm:
        assert answers(llm, smollm2) == smollm2.answers


def test_preemption(smollm2):
    longest = max(map(len, smollm2.prompts)) + smollm2.params.max_tokens
    with LLM(str(smollm2.directory), dtype="float32", cache=CacheConfig(num_blocks=longest // 16 + 2)) as llm:
        assert answers(llm, smollm2) == smollm2.answers
        if len(smollm2.prompts) == 16:
            assert llm._engine.scheduler.preemptions > 0


@pytest.mark.ray
@pytest.mark.parametrize(
    ("tp", "pp"),
    [(3, 1), (1, 2), pytest.param(3, 3, marks=pytest.mark.slow)],
)
def test_parallel(smollm2, tp, pp):
    with LLM(str(smollm2.directory), dtype="float32", tensor_parallel_size=tp, pipeline_parallel_size=pp) as llm:
        assert answers(llm, smollm2) == smollm2.answers


@pytest.mark.ray
@pytest.mark.slow
def test_over_http_and_grpc(smollm2):
    http_port, grpc_port = free_ports(2)
    with (
        server(http_port, grpc_port, "--dtype", "float32"),
        openai.OpenAI(base_url=f"http://localhost:{http_port}/v1", api_key="none", max_retries=0) as http,
        Client(f"localhost:{grpc_port}", timeout_s=300) as grpc,
    ):
        batch = http.completions.create(
            model=MODEL,
            prompt=smollm2.prompts,
            temperature=0,
            max_tokens=smollm2.params.max_tokens,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert [choice.model_extra["token_ids"] for choice in batch.choices] == smollm2.answers
        for prompt, answer in zip(smollm2.prompts, smollm2.answers, strict=True):
            chunks = grpc.stream(prompt, smollm2.params)
            assert [token_id for chunk in chunks for token_id in chunk.token_ids] == answer


@pytest.mark.slow
def test_bfloat16_answers_the_question():
    with LLM("smollm2-135m", dtype="bfloat16") as llm:
        output = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=32),
        )
        assert "Paris" in output.outputs[0].text
