"""The engine offline against transformers' own generate, under every way in which a step can be cut."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError, EngineUnavailableError, InvalidRequestError
from rayllm.core.types import FinishReason, SamplingParams
from rayllm.engine.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT_LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 5, 90]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_tokens,
            min_new_tokens=0,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs


def checked(llm: LLM) -> LLM:
    """Every block is free again and the scheduler's books balance."""
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    assert scheduler.free_blocks == scheduler.num_blocks
    assert not scheduler.has_work
    return llm


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=200)) as llm:
        yield llm
        checked(llm)


def token_ids(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_one_batch(llm, prompts, expected):
    assert token_ids(llm, prompts) == expected


def test_one_by_one(llm, prompts, expected):
    assert [token_ids(llm, [prompt])[0] for prompt in prompts] == expected


def test_prefix_hits(llm, prompts, expected):
    assert token_ids(llm, prompts) == expected
    again = llm.generate(prompts, GREEDY)
    assert [output.outputs[0].token_ids for output in again] == expected
    assert [output.num_cached_tokens for output in again] == [(n - 1) // 16 * 16 for n in PROMPT_LENGTHS]


@pytest.mark.parametrize("budget", [1, 7, 16])
def test_chunked_prefill(tiny_model, prompts, expected, budget):
    scheduler = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=budget)
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=200), scheduler=scheduler) as llm:
        assert token_ids(llm, prompts) == expected
        checked(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_preemption(tiny_model, prompts, expected, block_size):
    longest = max(PROMPT_LENGTHS) + GREEDY.max_tokens
    cache = CacheConfig(num_blocks=-(-longest // block_size) + 2, block_size=block_size)
    with LLM(str(tiny_model), cache=cache) as llm:
        assert token_ids(llm, prompts) == expected
        assert llm._engine.scheduler.preemptions > 0
        checked(llm)


def test_sampling_depends_on_the_seed_only(tiny_model, prompts):
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=20, ignore_eos=True)
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=200)) as llm:
        alone = [token_ids(llm, [prompt], params)[0] for prompt in prompts]
        assert token_ids(llm, prompts, params) == alone
        other = token_ids(llm, prompts, SamplingParams(temperature=0.8, seed=8, max_tokens=20, ignore_eos=True))
        assert other != alone
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=9)) as llm:
        assert token_ids(llm, prompts, params) == alone
        assert llm._engine.scheduler.preemptions > 0
        checked(llm)


def test_n_shares_the_prompt_and_starts_with_the_single_answer(llm, prompts):
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    single = llm.generate(prompts[7:8], SamplingParams(**params))[0]
    several = llm.generate(prompts[7:8], SamplingParams(**params, n=4))[0]
    answers = [output.token_ids for output in several.outputs]
    assert [output.index for output in several.outputs] == [0, 1, 2, 3]
    assert answers[0] == single.outputs[0].token_ids
    assert len({tuple(answer) for answer in answers}) == 4
    assert all(output.finish_reason is FinishReason.LENGTH for output in several.outputs)


def test_logprobs_are_the_models_own(llm, tiny_model, prompts):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=9, logprobs=5, prompt_logprobs=2, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        completion = output.outputs[0]
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.inference_mode():
            reference = model(ids).logits[0].double().log_softmax(-1)
        positions = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert output.prompt_logprobs[0] is None
        assert len(positions) == ids.shape[1] - 1
        for row, token, scored in zip(reference, ids[0, 1:].tolist(), positions, strict=False):
            assert scored.token_id == token
            assert scored.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert scored.rank == 1 + int((row > row[token]).sum())
        for row, scored in zip(reference[len(prompt) - 1 :], completion.logprobs, strict=False):
            top = row.topk(5)
            assert [token for token, _ in scored.top] == top.indices.tolist()
            assert [value for _, value in scored.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("warm", [False, True])
def test_scores_from_a_start_and_of_asked_tokens(llm, tiny_model, prompts, warm):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    asked = (7, 0, 200)
    for prompt in prompts:
        if warm:
            llm.generate(prompt, GREEDY)
        start = max(1, len(prompt) - 3)
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=1,
            logprob_token_ids=asked,
            prompt_logprobs=0,
            prompt_logprobs_start=start,
        )
        (output,) = llm.generate(prompt, params)
        with torch.inference_mode():
            reference = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        assert output.num_cached_tokens == ((start - 1) // 16 * 16 if warm else 0)
        assert output.prompt_logprobs[:start] == [None] * start
        scores = [position.logprob for position in output.prompt_logprobs[start:]]
        expected = [reference[i - 1, prompt[i]].item() for i in range(start, len(prompt))]
        assert scores == pytest.approx(expected, abs=1e-4)
        best, *others = output.outputs[0].logprobs[0].top
        assert best[0] == output.outputs[0].token_ids[0]
        assert [token for token, _ in others] == list(asked)
        assert [value for _, value in others] == pytest.approx(reference[-1, list(asked)].tolist(), abs=1e-4)


def test_stop_token_and_stop_string(llm, prompts, expected):
    stop = next(token for token in expected[2][3:] if token not in expected[2][:3])
    output = llm.generate(prompts[2], SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(stop,)))[0].outputs[
        0
    ]
    assert output.token_ids[-1] == stop
    assert output.token_ids == expected[2][: len(output.token_ids)]
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason == stop
    text = llm.generate(prompts[2], GREEDY)[0].outputs[0].text
    stop_string = text[6:9]
    output = llm.generate(prompts[2], SamplingParams(temperature=0, max_tokens=24, stop=(stop_string,)))[0].outputs[0]
    assert output.text == text[: text.index(stop_string)]
    assert output.stop_reason == stop_string


def test_a_cache_larger_than_memory_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"^KV cache: 1000000000000 blocks are \d+ bytes, which cannot be allocated$"):
        LLM(str(tiny_model), cache=CacheConfig(num_blocks=10**12))


@pytest.mark.parametrize("bad", [5, None, {1, 2}, b"ab"])
def test_prompts_of_a_wrong_type_are_refused(llm, bad):
    with pytest.raises(InvalidRequestError, match=r"^prompts: must be a string or a list"):
        llm.generate(bad)


def test_bad_prompts_are_refused_before_any_is_run(llm, prompts):
    for bad, field in [([], "prompt"), ([-1], "prompt"), ([10**6], "prompt"), ([1] * 600, "prompt")]:
        with pytest.raises(InvalidRequestError, match=field):
            llm.generate([prompts[0], bad], GREEDY)
    with pytest.raises(InvalidRequestError, match="prompts"):
        llm.generate([1, "two"], GREEDY)
    assert llm.generate([], GREEDY) == []


def test_a_long_context_past_one_block_table(tiny_model):
    prompt = list(range(200)) * 2
    with LLM(str(tiny_model), max_model_len=410) as llm:
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[0]
        assert len(output.token_ids) == 10
        assert output.finish_reason is FinishReason.LENGTH


def test_runs_without_ray_and_without_the_wire_formats(tiny_model):
    script = (
        "import sys\n"
        "for name in ('ray', 'fastapi', 'pydantic', 'grpc', 'triton'): sys.modules[name] = None\n"
        "from rayllm import LLM, SamplingParams\n"
        "with LLM(sys.argv[1]) as llm:\n"
        "    print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(",") == 2


def test_each_output_is_heard_of_once_with_its_prompts_index(llm, prompts):
    heard = {}
    outputs = llm.generate(prompts, GREEDY, on_output=lambda index, output: heard.setdefault(index, output))
    assert [heard[index] for index in range(len(prompts))] == outputs


def test_a_closed_llm_says_so(tiny_model, prompts):
    llm = LLM(str(tiny_model))
    llm.close()
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="closed"):
            llm.generate(prompts, GREEDY)


def test_goes_on_after_an_interrupt(llm, prompts, expected, monkeypatch):
    """Ctrl-C while a step runs, as in a notebook: what ran is forgotten, and the next call is answered."""
    result, interrupts = Future.result, iter([False, False, True])

    def interrupted(self, timeout=None):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return result(self, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY)
    assert token_ids(llm, prompts) == expected


def test_threads_take_turns(llm, prompts, expected):
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: token_ids(llm, prompts), range(3))) == [expected] * 3


def test_on_output_may_not_generate(llm, prompts, expected):
    with pytest.raises(EngineUnavailableError, match="on_output"):
        llm.generate(prompts, GREEDY, on_output=lambda index, output: llm.generate(prompts, GREEDY))
    assert token_ids(llm, prompts) == expected


def test_a_forked_process_is_told_to_make_its_own(tiny_model):
    script = f"""
import os
from rayllm import LLM, SamplingParams
llm = LLM({str(tiny_model)!r})
llm.generate([1, 2], SamplingParams(max_tokens=1))
if os.fork() == 0:
    try:
        llm.generate([1, 2], SamplingParams(max_tokens=1))
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "make another after the fork" in run.stdout


def test_from_config_takes_every_setting(tiny_model, prompts):
    scheduler = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_waiting_requests=1)
    model = ModelConfig(model=str(tiny_model), quantize="w8a16", max_model_len=200)
    with (
        LLM(str(tiny_model), quantize="w8a16") as direct,
        LLM.from_config(EngineConfig(model=model, scheduler=scheduler)) as llm,
    ):
        assert llm.limits.max_model_len == 200
        assert token_ids(llm, prompts) == token_ids(direct, prompts)  # more prompts than may wait in a server
