"""The HTTP face, asked by the unmodified openai client, against the offline engine and the tokenizer."""

import json
import time
from pathlib import Path

import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM

MODEL = "tiny"
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "서울은 어디에 있나요? 🙂"}]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def llm(tiny_model: Path):
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=100)) as llm:
        yield llm


def offline(llm: LLM, prompt: str | list[int], **params):
    return llm.generate(prompt, SamplingParams(**{"temperature": 0, "ignore_eos": True, **params}))[0]


async def test_models(server):
    models = [model async for model in server.openai.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await server.openai.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await server.openai.models.retrieve("another/model")


async def test_completion_equals_the_offline_engine(server, llm):
    expected = offline(llm, "Once upon", max_tokens=24)
    response = await server.openai.completions.create(model=MODEL, prompt="Once upon", max_tokens=24, **GREEDY)
    choice = response.choices[0]
    assert choice.text == expected.outputs[0].text
    assert choice.token_ids == expected.outputs[0].token_ids
    assert choice.finish_reason == "length"
    assert response.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert response.usage.completion_tokens == 24
    assert response.system_fingerprint == server.weights
    assert response.object == "text_completion"


async def test_completion_defaults_to_16_tokens(server):
    response = await server.openai.completions.create(model=MODEL, prompt="x", **GREEDY)
    assert response.usage.completion_tokens == 16


@pytest.mark.parametrize(
    "prompt", ["text", ["one text", "another one"], [65, 66, 67], [[65, 66], [97, 98, 99], [48]]], ids=str
)
async def test_prompt_kinds_and_n(server, llm, prompt):
    response = await server.openai.completions.create(
        model=MODEL, prompt=prompt, n=2, max_tokens=8, seed=7, temperature=0.8, extra_body={"ignore_eos": True}
    )
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    params = SamplingParams(temperature=0.8, seed=7, n=2, max_tokens=8, ignore_eos=True)
    expected = [output.text for answer in llm.generate(prompts, params) for output in answer.outputs]
    assert [choice.text for choice in response.choices] == expected
    assert [choice.index for choice in response.choices] == list(range(2 * len(prompts)))


async def test_streamed_completion_equals_the_whole_one(server):
    options = {"model": MODEL, "prompt": ["한국어 🙂", "two"], "n": 2, "max_tokens": 20, "seed": 3, "logprobs": 2}
    whole = await server.openai.completions.create(**options)
    texts, tokens, offsets, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)], [None] * 4
    usage = None
    stream = await server.openai.completions.create(**options, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        assert chunk.system_fingerprint == server.weights
        if chunk.usage is not None:
            usage = chunk.usage
            assert chunk.choices == []
            continue
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        offsets[choice.index] += choice.logprobs.text_offset
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


async def test_completion_logprobs(server, llm):
    expected = offline(llm, "abc", max_tokens=6, logprobs=3).outputs[0].logprobs
    response = await server.openai.completions.create(model=MODEL, prompt="abc", max_tokens=6, logprobs=3, **GREEDY)
    logprobs = response.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([position.logprob for position in expected])
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx([p.top[0][1] for p in expected])
    assert all(len(top) == 3 for top in logprobs.top_logprobs)  # greedy: the chosen one is among them


async def test_echo_scores_the_prompt(server, llm):
    prompt = "the and the"
    expected = offline(llm, prompt, max_tokens=1, logprobs=0, prompt_logprobs=0)
    response = await server.openai.completions.create(
        model=MODEL, prompt=prompt, max_tokens=1, logprobs=0, echo=True, **GREEDY
    )
    choice = response.choices[0]
    assert choice.text == prompt + expected.outputs[0].text
    assert choice.logprobs.token_logprobs[0] is None
    scores = [position.logprob for position in expected.prompt_logprobs[1:]]
    assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(scores)
    assert "".join(choice.logprobs.tokens[:-1]) == prompt


async def test_chat_uses_the_tokenizers_template(server, llm):
    expected = offline(llm, llm.tokenizer.chat(MESSAGES), max_tokens=20)
    response = await server.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=20, **GREEDY
    )
    assert response.choices[0].message.content == expected.outputs[0].text
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].prompt_token_ids == expected.prompt_token_ids
    assert response.usage.prompt_tokens == len(expected.prompt_token_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "ab"}]
    answers = [
        await server.openai.chat.completions.create(model=MODEL, messages=each, max_tokens=5, **GREEDY)
        for each in (parts, joined)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


async def test_streamed_chat(server, llm):
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "temperature": 1.0, "seed": 11, "n": 2}
    options["extra_body"] = {"ignore_eos": True}
    whole = await server.openai.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    contents, tokens, roles = ["", ""], [[], []], [None, None]
    async for chunk in await server.openai.chat.completions.create(
        **options, logprobs=True, top_logprobs=2, stream=True
    ):
        assert chunk.usage is None
        choice = chunk.choices[0]
        roles[choice.index] = choice.delta.role or roles[choice.index]
        contents[choice.index] += choice.delta.content
        tokens[choice.index] += choice.logprobs.content
    assert contents == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert all(len(token.top_logprobs) == 2 for token in tokens[0])
    spelled = [bytes(token.bytes) for token in tokens[1] if not token.token.startswith("<|")]
    assert b"".join(spelled).decode("utf-8", "replace") == contents[1]


async def test_stop_strings(server):
    free = await server.openai.completions.create(model=MODEL, prompt="xyz", max_tokens=30, **GREEDY)
    text = free.choices[0].text
    stop = text[9:12]
    stopped = await server.openai.completions.create(model=MODEL, prompt="xyz", max_tokens=30, stop=[stop], **GREEDY)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == stop


async def test_max_completion_tokens_defaults_to_the_end_of_the_context(server):
    long = [{"role": "user", "content": "a" * 400}]
    response = await server.openai.chat.completions.create(model=MODEL, messages=long, **GREEDY)
    usage = response.usage
    assert usage.total_tokens == 512
    assert response.choices[0].finish_reason == "length"


async def test_the_stream_on_the_wire(server):
    body = {
        "model": MODEL,
        "prompt": "x",
        "max_tokens": 3,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await server.http.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-weight-version"] == server.weights
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "usage" not in chunks[0]
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 3


async def test_tokenize_and_detokenize(server, llm):
    response = (await server.http.post("/tokenize", json={"prompt": "한국어 the"})).json()
    assert response["tokens"] == llm.tokenizer.encode("한국어 the")
    assert response["count"] == len(response["tokens"])
    back = (await server.http.post("/detokenize", json={"tokens": response["tokens"]})).json()
    assert back == {"prompt": "한국어 the"}
    chat = (await server.http.post("/tokenize", json={"messages": MESSAGES})).json()
    assert chat["tokens"] == llm.tokenizer.chat(MESSAGES)


async def test_health_metrics_and_description(server):
    assert (await server.http.get("/health")).json() == {"status": "ok"}
    await server.openai.completions.create(model=MODEL, prompt="x" * 40, **GREEDY)
    metrics = (await server.http.get("/metrics")).text
    for name in ("running", "waiting", "kv_cache_usage", "prefix_hit_tokens_total", "preemptions_total"):
        assert f"\nrayllm_{name} " in metrics
    assert 'rayllm_time_to_first_token_seconds_count{face="http"}' in metrics
    assert 'rayllm_requests_total{face="http",outcome="ok"}' in metrics
    description = (await server.http.get("/openapi.json")).json()
    assert "Message" in description["components"]["schemas"]
    body = description["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/CompletionRequest")


async def test_queue_and_step_times_are_measured_apart(server):
    before = server.engine.stats()
    started = time.monotonic()
    await server.openai.completions.create(model=MODEL, prompt="steps", max_tokens=64, extra_body={"ignore_eos": True})
    elapsed = time.monotonic() - started
    after = server.engine.stats()
    step_s, framework_s = after.step_s - before.step_s, after.framework_s - before.framework_s
    assert step_s > 0
    assert framework_s > 0
    assert step_s + framework_s <= elapsed
    assert 'rayllm_queue_seconds_count{face="http"}' in (await server.http.get("/metrics")).text


async def test_a_generation_is_a_span(server, monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("rayllm.serve.tracing._tracer", provider.get_tracer("test"))
    answer = await server.openai.completions.create(model=MODEL, prompt="traced", max_tokens=5)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    assert span.attributes["rayllm.weight_version"] == server.weights
    assert [event.name for event in span.events] == ["first_token"]
    assert "traced" not in str(span.attributes), "no prompts in traces"
