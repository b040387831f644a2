"""From documents to metrics with a tiny model: resumable, and the same however the work is cut."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError, DataError
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.eval.backend import Usage
from rayllm.eval.data import Data, Table
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.registry import find_task
from rayllm.eval.run import run_tasks
from rayllm.eval.runner import EvalSettings
from rayllm.eval.samples import SampleStore, claim, read_spent, write_results, write_spent
from rayllm.eval.task import Document, Generate, Generated, Loglikelihood, Request, Response, Score, Task
from tests.eval_documents import ANATOMY, PAGES
from tests.eval_runs import answers, rows, run, write_table


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    for split, some in ANATOMY.items():
        many = [{**row, "question": f"{i}. {row['question']}"} for i in range(6) for row in some]
        write_table(folder, Table(name="cais/mmlu", config="anatomy", split=split, columns=()), many)
    goals = [{"goal": "To dry shoes", "sol1": "paper" * (1 + i % 3), "sol2": "soup", "label": i % 2} for i in range(9)]
    write_table(folder, Table(name="baber/piqa", split="validation", columns=()), goals)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in [*PAGES, "", "x"]))
    return Data(folder)


@pytest.fixture(scope="module")
def open_backend(make_tiny_model) -> Iterator[Callable[..., LocalBackend]]:
    model = make_tiny_model(max_position_embeddings=2048)
    opened: list[LocalBackend] = []

    def make(*, max_model_len: int | None = None, num_blocks: int = 400, **scheduler: int) -> LocalBackend:
        config = EngineConfig(
            model=ModelConfig(model=str(model), max_model_len=max_model_len),
            cache=CacheConfig(num_blocks=num_blocks),
            scheduler=SchedulerConfig(**scheduler),
        )
        opened.append(LocalBackend.open(config))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


@pytest.fixture(scope="module")
def backend(open_backend) -> LocalBackend:
    return open_backend()


class TestLikelihoods:
    """Against a float64 forward pass of transformers over the whole prompt."""

    def test_multiple_choice_and_perplexity(self, open_backend, backend, make_tiny_model, data, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(make_tiny_model(max_position_embeddings=2048), dtype=torch.float64)
        tokenizer = backend._llm.tokenizer
        run("mmlu_anatomy", backend, data, tmp_path, num_fewshot=2)
        run("piqa", backend, data, tmp_path)
        run("perplexity", backend, data, tmp_path)
        for name in ("mmlu_anatomy", "piqa", "perplexity"):
            for row in rows(tmp_path, name):
                for response in row["responses"]:
                    context = tokenizer.encode(response["prompt"]) or [tokenizer.bos_token_id]
                    targets = tokenizer.encode(response["continuation"])
                    ids = torch.tensor([context + targets])
                    assert response["num_tokens"] == len(targets)
                    if not targets:
                        continue
                    with torch.inference_mode():
                        scores = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
                    picked = scores[torch.arange(len(targets)), torch.tensor(targets)]
                    assert response["logprob"] == pytest.approx(picked.sum().item(), abs=1e-3)
                    assert response["is_greedy"] == bool((scores.argmax(-1) == torch.tensor(targets)).all())

    @pytest.mark.parametrize("window", [16, 33])
    def test_windows_over_a_text(self, open_backend, make_tiny_model, data, window):
        model = AutoModelForCausalLM.from_pretrained(make_tiny_model(max_position_embeddings=2048), dtype=torch.float64)
        backend = open_backend(max_model_len=window)
        (by_word, *_) = run("perplexity", backend, data).metrics
        total = 0.0
        for page in [*PAGES, "x"]:
            tokens = [backend._llm.tokenizer.bos_token_id, *backend._llm.tokenizer.encode(page)]
            for start in range(0, len(tokens) - 1, window):
                stop = min(start + window, len(tokens) - 1)
                first = max(0, stop - window)
                read = torch.tensor([tokens[first:stop]])
                with torch.inference_mode():
                    scores = model(read).logits[0].log_softmax(-1)
                for position in range(start, stop):
                    total += scores[position - first, tokens[position + 1]].item()
        words = sum(len(page.split()) + page.startswith(" ") + page.endswith("\n") for page in PAGES) + 2
        assert by_word.value == pytest.approx(math.exp(-total / words), rel=1e-4)

    def test_strided_windows(self, backend, make_tiny_model, tmp_path):
        """The loop of Hugging Face's documentation, each loss weighted by the tokens that it is the mean of."""
        (tmp_path / "test.jsonl").write_text(json.dumps({"text": "".join(PAGES) * 5}) + "\n")
        (metric,) = run("perplexity_strided", backend, Data(tmp_path)).metrics
        model = AutoModelForCausalLM.from_pretrained(make_tiny_model(max_position_embeddings=2048), dtype=torch.float64)
        ids = torch.tensor([backend._llm.tokenizer.encode("".join(PAGES) * 5)])
        assert ids.shape[1] > 1600
        loss, count, previous_end = 0.0, 0, 0
        for begin in range(0, ids.shape[1], 512):
            end = min(begin + 1024, ids.shape[1])
            window = ids[:, begin:end]
            labels = window.clone()
            labels[:, : (end - begin) - (end - previous_end)] = -100
            num_scored = int((labels[:, 1:] != -100).sum())
            with torch.inference_mode():
                loss += model(window, labels=labels).loss.item() * num_scored
            count += num_scored
            previous_end = end
            if end == ids.shape[1]:
                break
        assert metric.value == pytest.approx(math.exp(loss / count), rel=1e-5)


@pytest.fixture(scope="module")
def expected(backend, data, tmp_path_factory) -> dict[str, list[tuple[str | None, list[float]]]]:
    output = tmp_path_factory.mktemp("expected")
    for name, shots in (("mmlu_anatomy", 3), ("piqa", 0)):
        run(name, backend, data, output, num_fewshot=shots)
    return {name: answers(output, name) for name in ("mmlu_anatomy", "piqa")}


class TestInvariance:
    @pytest.mark.parametrize(
        "engine",
        [
            {"max_num_seqs": 1},
            {"max_num_batched_tokens": 7},
            {"max_num_batched_tokens": 33, "max_num_seqs": 3},
            {"max_num_batched_tokens": 4096},
            {"num_blocks": 48},  # a cache that forgets
        ],
        ids=str,
    )
    def test_batch_size_chunks_and_cache(self, engine, open_backend, data, expected, tmp_path):
        backend = open_backend(**engine)
        self.check(backend, data, expected, tmp_path)

    def test_a_warm_cache(self, backend, data, expected, tmp_path):
        self.check(backend, data, expected, tmp_path)

    def test_order(self, backend, data, expected, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "rayllm.eval.local_backend.prefix_order", lambda prompts, **_: list(reversed(range(len(prompts))))
        )
        self.check(backend, data, expected, tmp_path)

    def test_one_document_alone_has_the_same_score(self, backend, data, expected, tmp_path):
        run("mmlu_anatomy", backend, data, tmp_path, num_fewshot=3, limit=1)
        ((extracted, logprobs),) = answers(tmp_path, "mmlu_anatomy")
        assert extracted == expected["mmlu_anatomy"][0][0]
        assert logprobs == pytest.approx(expected["mmlu_anatomy"][0][1], abs=2e-5)

    def check(self, backend, data, expected, output):
        for name, shots in (("mmlu_anatomy", 3), ("piqa", 0)):
            run(name, backend, data, output, num_fewshot=shots)
            got = answers(output, name)
            assert [extracted for extracted, _ in got] == [extracted for extracted, _ in expected[name]]
            for (_, logprobs), (_, wanted) in zip(got, expected[name], strict=True):
                assert logprobs == pytest.approx(wanted, abs=2e-5)


def test_the_shots_are_read_from_the_prefix_cache(open_backend, data):
    backend = open_backend(max_num_batched_tokens=256)
    run("mmlu_anatomy", backend, data, num_fewshot=3)
    usage = backend.usage
    assert usage.cached_tokens / usage.prompt_tokens > 0.6


class Nobody:
    model, weight_version, usage = "tiny", "w", None

    def run(self, requests, seeds, on_response):
        raise AssertionError("there is nothing to run")


class TestResume:
    def test_what_is_done_is_not_run_again(self, backend, data, tmp_path):
        first = run("mmlu_anatomy", backend, data, tmp_path, limit=5)
        assert (first.num_documents, first.num_resumed) == (5, 0)
        whole = run("mmlu_anatomy", backend, data, tmp_path)
        assert (whole.num_documents, whole.num_resumed) == (12, 5)
        assert len(rows(tmp_path, "mmlu_anatomy")) == 12
        unbroken = run("mmlu_anatomy", backend, data)
        assert [metric.value for metric in whole.metrics] == [metric.value for metric in unbroken.metrics]
        again = run("mmlu_anatomy", Nobody(), data, tmp_path)
        assert again.metrics == whole.metrics

    def test_a_run_that_is_killed_keeps_what_it_has(self, backend, data, tmp_path):
        class Dying:
            model, weight_version, usage = "tiny", "w", None

            def run(self, requests, seeds, on_response):
                def count(index, response):
                    count.heard += 1
                    if count.heard > 20:
                        raise KeyboardInterrupt
                    on_response(index, response)

                count.heard = 0
                backend.run(requests, seeds, count)

        with pytest.raises(KeyboardInterrupt):
            run("mmlu_anatomy", Dying(), data, tmp_path)
        kept = len(rows(tmp_path, "mmlu_anatomy"))
        assert 0 < kept < 12
        resumed = run("mmlu_anatomy", backend, data, tmp_path)
        assert resumed.num_resumed == kept
        assert resumed.metrics == run("mmlu_anatomy", backend, data).metrics

    def test_samples_of_other_data_are_not_taken_for_these(self, backend, data, tmp_path):
        run("piqa", backend, data, tmp_path)
        goals = [{"goal": "To dry", "sol1": "air", "sol2": "soup", "label": 0}]
        write_table(tmp_path / "other", Table(name="baber/piqa", split="validation", columns=()), goals)
        with pytest.raises(ConfigError, match="holds samples of piqa that another version of it, or other data"):
            run("piqa", backend, Data(tmp_path / "other"), tmp_path)

    def test_samples_of_other_questions_with_the_same_answers_are_not_taken_for_these(self, backend, tmp_path):
        rows = [{"question": f"Q{i}", "choices": ["a", "b", "c", "d"], "answer": 1} for i in range(3)]
        table = Table(name="cais/mmlu", config="anatomy", split="test", columns=())
        write_table(tmp_path / "a", table, rows)
        write_table(tmp_path / "b", table, [*rows[:2], {**rows[2], "question": "Q3"}])
        run("mmlu_anatomy", backend, Data(tmp_path / "a"), tmp_path)
        with pytest.raises(ConfigError, match="another version of it, or other data"):
            run("mmlu_anatomy", backend, Data(tmp_path / "b"), tmp_path)
        assert run("mmlu_anatomy", backend, Data(tmp_path / "b"), tmp_path, limit=2).num_resumed == 2

    def test_sampled_texts_and_chats_are_known_again(self, backend, data, tmp_path):
        for name, request in (("a", {}), ("b", {"prompt": (("user", "hi"),), "prefix": "the"})):
            task = Writing(**request)
            run(task, backend, data, tmp_path / name)
            assert run(task, Nobody(), data, tmp_path / name).num_resumed == 3

    @pytest.mark.parametrize(
        ("name", "read"),
        [
            ("run.json", lambda folder: claim(folder, {"model": "a"})),
            ("results.json", lambda folder: claim(folder, {"model": "a"})),  # before anything is run
            ("results.json", lambda folder: write_results(folder, {"tasks": {}})),
            ("spent.json", read_spent),
        ],
    )
    @pytest.mark.parametrize("content", ["", "{", "[]", '{"a": ' * 100_000], ids=lambda content: content[:9])
    def test_a_damaged_file_is_named(self, tmp_path, name, read, content):
        claim(tmp_path, {"model": "a"})
        write_results(tmp_path, {"tasks": {}})
        write_spent(tmp_path, {})
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}: "):
            read(tmp_path)

    def test_no_folder_can_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match=r"file.*: cannot be written to"):
                claim(path, {"model": "a"})

    def test_rows_that_cannot_be_written(self, backend, data, tmp_path):
        """Once by a file in the place of a folder, once by a disk that is full."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a/samples").write_text("")
        (tmp_path / "b/samples/piqa").mkdir(parents=True)
        (tmp_path / "b/samples/piqa/00000.tmp").symlink_to("/dev/full")
        for folder, reason in (("a", "Not a directory|File exists"), ("b", "No space left on device")):
            with pytest.raises(ConfigError, match=rf"cannot be written to \(({reason})\)"):
                run("piqa", backend, data, tmp_path / folder)

    def test_a_table_of_something_else_is_no_shard(self, backend, data, tmp_path):
        (tmp_path / "samples/piqa").mkdir(parents=True)
        pq.write_table(pa.table({"subject": [""], "index": [0]}), tmp_path / "samples/piqa/00000.parquet")
        with pytest.raises(DataError, match=r"00000\.parquet: cannot be read \(its columns are not .* delete it"):
            run("piqa", backend, data, tmp_path)

    def test_a_shard_is_written_when_it_is_full_or_old(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("rayllm.eval.samples.time.monotonic", lambda: now[0])
        store = SampleStore(tmp_path, "piqa")
        written = []
        for seconds in (0, 9, 11, 12, 13, 22):
            now[0] = seconds
            store.add({"index": seconds})
            written.append(len(list(store.rows())))
        assert written == [0, 0, 3, 3, 3, 6]
        monkeypatch.setattr("rayllm.eval.samples._SHARD_ROWS", 2)
        store.add({"index": 1})
        store.add({"index": 2})
        assert len(list(store.rows())) == 8

    def test_a_damaged_shard_is_named(self, backend, data, tmp_path):
        run("piqa", backend, data, tmp_path)
        (shard,) = (tmp_path / "samples/piqa").iterdir()
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(DataError, match=r"00000\.parquet: cannot be read .* delete it"):
            run("piqa", backend, data, tmp_path)

    def test_a_deleted_shard_costs_no_other(self, tmp_path):
        """What the message above advises; then its rows are run again."""
        for index in range(3):
            store = SampleStore(tmp_path, "piqa")
            store.add({"index": index})
            store.flush()
        (tmp_path / "samples/piqa/00001.parquet").unlink()
        store = SampleStore(tmp_path, "piqa")
        store.add({"index": 1})
        store.flush()
        assert [row["index"] for row in store.rows()] == [0, 2, 1]

    def test_a_folder_holds_one_run(self, tmp_path):
        claim(tmp_path, {"model": "a", "seed": 0})
        claim(tmp_path, {"model": "a", "seed": 0})
        with pytest.raises(ConfigError, match=r"holds another run \(model: 'a' there, 'b' here\); choose another"):
            claim(tmp_path, {"model": "b", "seed": 0})

    def test_results_of_several_tasks_stand_side_by_side(self, tmp_path):
        write_results(tmp_path, {"seconds": 1, "tasks": {"a": 1}})
        write_results(tmp_path, {"seconds": 2, "tasks": {"b": 2}})
        assert json.loads((tmp_path / "results.json").read_text()) == {"seconds": 2, "tasks": {"a": 1, "b": 2}}


class Counting:
    """The engine, with a clock that its tokens move and an end after some requests."""

    model, weight_version = "tiny", "w"

    def __init__(self, backend: LocalBackend, clock: list[float], requests: int = 1 << 30) -> None:
        self._backend, self._clock, self._left, self._tokens = backend, clock, requests, 1000

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=self._tokens, cached_tokens=self._tokens // 10)

    def run(self, requests, seeds, on_response):
        for index, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            self._tokens += 10
            self._clock[0] += 2.0
            self._backend.run([request], [seed], lambda _, response, index=index: on_response(index, response))


class TestWholeRuns:
    @pytest.fixture
    def go(self, data, backend, tmp_path, monkeypatch):
        clock = [50.0]
        monkeypatch.setattr("rayllm.eval.run.time.perf_counter", lambda: clock[0])

        def go(names: str, output: bool = True, **ends: int) -> dict[str, Any]:
            return run_tasks(
                [find_task(name) for name in names.split()],
                Counting(backend, clock, **ends),
                {},
                data,
                EvalSettings(num_fewshot=0),
                output=tmp_path if output else None,
                progress=lambda description, total: nullcontext(lambda steps: None),
            )

        return go

    def test_results_are_written_after_each_task(self, go, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            go("piqa mmlu_anatomy", requests=18 + 5)  # the second one is not done
        written = json.loads((tmp_path / "results.json").read_text())
        assert list(written["tasks"]) == ["piqa"]
        assert (written["seconds"], written["prompt_tokens"], written["cached_tokens"]) == (36.0, 180, 18)

    def test_seconds_and_tokens_add_up_over_the_parts(self, go, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            go("piqa", requests=8)
        with pytest.raises(KeyboardInterrupt):
            go("piqa", requests=4)
        whole = go("piqa")
        asked = 8 + 4 + 2 * (9 - whole["tasks"]["piqa"]["num_resumed"])  # an answer may be lost before it is scored
        assert (whole["seconds"], whole["prompt_tokens"]) == (2.0 * asked, 10 * asked)
        assert whole["cached_tokens"] == pytest.approx(asked, abs=3)  # each part's are rounded
        assert json.loads((tmp_path / "results.json").read_text()) == whole
        alone = go("piqa", output=False)
        assert (alone["seconds"], alone["prompt_tokens"]) == (36.0, 180)
        assert go("piqa")["seconds"] == 2.0 * asked


class Writing(Task):
    """Writes some text after each of a few beginnings, twice."""

    name = "writing"
    version = "1"
    metrics = ("length",)

    def __init__(self, **request: Any) -> None:
        self._request = {"max_tokens": 8, "temperature": 1.0, "n": 2, **request}

    def documents(self, data: Data) -> list[Document]:
        return [Document(index=i, fields={"text": text}) for i, text in enumerate(("and", "the ", "hand"))]

    def question(self, document: Document) -> str:
        return str(document.fields["text"])

    def target(self, document: Document) -> str:
        return ""

    def requests(self, document: Document, prompt: str) -> list[Request]:
        return [Generate(**{"prompt": prompt, **self._request})]

    def score(self, document: Document, responses: list[Response]) -> Score:
        (response,) = responses
        assert isinstance(response, Generated)
        return Score(values={"length": float(len(response.texts[0]))}, extracted=response.texts[0])


class TestGeneration:
    def texts(self, task, backend, data, output, **settings):
        run(task, backend, data, output, **settings)
        return [[response["text"] for response in row["responses"]] for row in rows(output, "writing")]

    def test_samples_depend_on_the_seed_alone(self, backend, open_backend, data, tmp_path):
        first = self.texts(Writing(), backend, data, tmp_path / "1")
        assert all(len(set(texts)) == 2 for texts in first)
        one_by_one = open_backend(max_num_seqs=1)
        assert self.texts(Writing(), one_by_one, data, tmp_path / "2") == first
        assert self.texts(Writing(), backend, data, tmp_path / "3", limit=1) == first[:1]
        assert self.texts(Writing(), backend, data, tmp_path / "4", seed=1) != first

    def test_a_conversation_and_what_the_answer_begins_with(self, backend, data, tmp_path):
        llm = backend._llm
        task = Writing(prompt=(("user", "hi"),), prefix="and", n=1, temperature=0.0)
        task.requests = lambda document, prompt: [Generate(**task._request)]
        texts = self.texts(task, backend, data, tmp_path)
        ids = llm.tokenizer.chat([{"role": "user", "content": "hi"}]) + llm.tokenizer.encode("and")
        (expected,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=8))
        assert texts[0] == [expected.outputs[0].text]

    def test_a_prompt_without_room_for_the_answer(self, open_backend, data):
        backend = open_backend(max_model_len=32)
        with pytest.raises(ConfigError, match=r"answer of 33 are longer than the context of 32; use fewer shots"):
            run(Writing(max_tokens=33), backend, data)


class TestRefusals:
    def test_shots_longer_than_the_context(self, open_backend, data):
        backend = open_backend(max_model_len=128)
        with pytest.raises(ConfigError, match=r"longer than the 128 that the model reads .*--num-fewshot"):
            run("mmlu_anatomy", backend, data, num_fewshot=3)

    def test_more_shots_than_there_are(self, backend, data):
        with pytest.raises(ConfigError, match="mmlu_anatomy: 99 shots are asked for, but there are 18 of anatomy"):
            run("mmlu_anatomy", backend, data, num_fewshot=99)
        with pytest.raises(ConfigError, match="perplexity: 1 shots are asked for, but there are 0"):
            run("perplexity", backend, data, num_fewshot=1)

    def test_code_is_run_only_where_it_is_allowed(self, backend, data):
        task = Writing()
        task.runs_code = True
        with pytest.raises(ConfigError, match="allow it with --allow-code-execution"):
            run(task, backend, data)
        run(task, backend, data, allow_code_execution=True)


def test_the_weights_that_are_asked_for_are_evaluated(make_tiny_model):
    """`--quantize` reaches the engine: the likelihoods are those of int8 weights, not of the checkpoint's."""
    model, request = str(make_tiny_model(max_position_embeddings=2048)), Loglikelihood(context="a", continuation=" b")

    def logprob(quantize: str | None) -> float:
        responses = []
        backend = LocalBackend.open(EngineConfig(model=ModelConfig(model=model, quantize=quantize)))
        backend.run([request], [0], lambda _, response: responses.append(response))
        backend.close()
        return responses[0].logprob

    with LLM(model, quantize="w8a8") as llm:
        context, ids = llm.tokenizer.encode("a"), llm.tokenizer.encode("a b")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=len(context))
        (output,) = llm.generate([ids], params)
    expected = sum(position.logprob for position in output.prompt_logprobs[len(context) :])
    assert logprob("w8a8") == pytest.approx(expected, abs=1e-4)
    assert abs(logprob(None) - expected) > 1e-4
