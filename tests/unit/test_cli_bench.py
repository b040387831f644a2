"""What `rayllm bench` computes, against numpy and by a clock that stands still unless it is told."""

import asyncio
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rayllm.cli.bench import kernels
from rayllm.cli.bench.load import Record, run_load, summarize
from rayllm.cli.bench.statistics import latency_ms, percentile, random_prompts
from rayllm.cli.bench.throughput import Timing, Workload, compare, speeds
from rayllm.cli.main import main
from rayllm.core.errors import CapacityError


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(size):
    values = sorted(np.random.default_rng(size).random(size).tolist())
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_latencies_are_in_milliseconds():
    assert latency_ms([0.003, 0.001, 0.002]) == pytest.approx(
        {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}
    )
    assert latency_ms([]) is None


def test_prompts_share_no_prefix_and_come_again():
    prompts = random_prompts(50, 16, seed=1)
    assert prompts == random_prompts(50, 16, seed=1)
    assert len({tuple(prompt[:8]) for prompt in prompts + random_prompts(50, 16, seed=2)}) == 100
    assert {len(prompt) for prompt in prompts} == {16}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_engines_take_turns_and_the_first_round_does_not_count():
    clock, calls = Clock(), []

    def engine(name: str, prefill_s: float, step_s: float) -> Callable[[list[list[int]], int], None]:
        def run(prompts: list[list[int]], output_len: int) -> None:
            calls.append((name, output_len, prompts))
            slow = 100.0 if len(calls) <= 4 else 0.0  # the round in which everything is compiled
            clock.now += slow + prefill_s + (output_len - 1) * step_s

        return run

    workload = Workload(requests=4, input_len=10, output_len=6)
    done: list[int] = []
    timings = compare(
        {"a": engine("a", 2.0, 0.5), "b": engine("b", 1.0, 1.0)}, workload, repeats=2, on_done=done.append, clock=clock
    )
    assert timings == {"a": [Timing(prefill_s=2.0, total_s=4.5)] * 2, "b": [Timing(prefill_s=1.0, total_s=6.0)] * 2}
    assert [(name, output_len) for name, output_len, _ in calls] == [("a", 1), ("a", 6), ("b", 1), ("b", 6)] * 3
    assert sum(done) == 6
    of_a, of_b = ([prompts for name, _, prompts in calls if name == each] for each in "ab")
    assert of_a == of_b
    assert len({str(prompts) for prompts in of_a}) == len(of_a)
    figures = speeds(timings["a"], workload)
    assert figures["prefill_tokens_per_s"] == 40 / 2.0
    assert figures["decode_tokens_per_s"] == 4 * 5 / 2.5
    assert figures["total_tokens_per_s"] == 64 / 4.5


def test_speeds_are_medians_of_the_rounds():
    workload = Workload(requests=1, input_len=1, output_len=2)
    timings = [Timing(prefill_s=s, total_s=2 * s) for s in (1.0, 4.0, 2.0)]
    figures = speeds(timings, workload)
    assert figures["prefill_tokens_per_s"] == 0.5
    assert [run["prefill_tokens_per_s"] for run in figures["runs"]] == [1.0, 0.25, 0.5]


class ScriptedTransport:
    """Answers in pieces; what a request gets depends on its first token."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.running = 0
        self.most_running = 0

    async def send(self, prompt_token_ids: list[int], output_len: int, record: Record) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if prompt_token_ids[0] == 1:
            raise CapacityError("full", retry_after_s=1.0)
        record.piece(0)  # text that lags is no token
        self.clock.now += 1.0
        record.piece(1)
        self.clock.now += 0.5
        record.piece(output_len - 1 - (prompt_token_ids[0] == 2))

    async def close(self) -> None:
        pass


async def test_load_keeps_its_concurrency_and_counts_errors():
    clock = Clock()
    transport = ScriptedTransport(clock)
    done: list[int] = []
    prompts = [[0], [1], [2], [0], [1], [0]]
    records, duration_s = await run_load(
        transport, prompts, output_len=4, concurrency=2, on_done=done.append, clock=clock
    )
    assert transport.most_running == 2
    assert len(records) == sum(done) == 6
    summary = summarize(records, duration_s, input_len=1)
    assert summary["requests"] == 6
    assert summary["errors"] == 3
    assert summary["error_messages"] == {"full": 2, "3 tokens came instead of 4": 1}
    assert summary["duration_s"] == 4 * 1.5
    assert summary["output_tokens_per_s"] == pytest.approx(3 * 4 / 6.0)
    assert summary["total_tokens_per_s"] == pytest.approx(3 * 5 / 6.0)
    assert summary["tokens_per_piece"] == 2.0


async def test_latencies_of_one_request():
    clock = Clock()
    records, duration_s = await run_load(
        ScriptedTransport(clock), [[0]], output_len=3, concurrency=1, on_done=lambda _: None, clock=clock
    )
    summary = summarize(records, duration_s, input_len=1)
    assert summary["ttft_ms"]["p50"] == 1000.0
    assert summary["inter_token_ms"]["p50"] == 500.0
    assert summary["end_to_end_ms"]["p99"] == 1500.0


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["rayllm", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code


def test_offline_on_a_real_engine(monkeypatch, capsys, tiny_model: Path):
    arguments = ["bench", "offline", tiny_model, "--requests", 3, "--input-len", 9, "--output-len", 5, "--repeats", 1]
    run(monkeypatch, *arguments, "--against-transformers", "--json")
    output = capsys.readouterr()
    result = json.loads(output.out)
    for figures in (result, result["transformers"]):
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "total_tokens_per_s"):
            assert figures[name] == figures["runs"][0][name] > 0
    assert result["decode_speedup"] == result["decode_tokens_per_s"] / result["transformers"]["decode_tokens_per_s"]
    assert result["settings"]["requests"] == 3
    assert result["versions"]["torch"]
    run(monkeypatch, *arguments)
    assert "prefill" in capsys.readouterr().out


def test_served_in_process_on_a_real_engine(monkeypatch, capsys, tiny_model: Path):
    arguments = ["bench", "serve", "--in-process", tiny_model, "--requests", 5, "--concurrency", 2]
    arguments += ["--input-len", 9, "--output-len", 4]
    run(monkeypatch, *arguments, "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["requests"], result["errors"]) == (5, 0)
    for latency in ("ttft_ms", "inter_token_ms", "end_to_end_ms"):
        assert 0 <= result[latency]["p50"] <= result[latency]["p90"] <= result[latency]["p99"]
    assert result["ttft_ms"]["p50"] <= result["end_to_end_ms"]["p50"]
    assert result["settings"]["concurrency"] == 2
    run(monkeypatch, *arguments)
    assert "0 errors in 5 requests" in capsys.readouterr().out


def test_kernels_on_this_machine(monkeypatch, capsys, tmp_path: Path):
    """The command with one small benchmark in the place of all."""
    script = tmp_path / "run.py"
    bench = kernels.SCRIPT.parent
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(bench)!r})\nimport run\n"
        "run.benchmarks = lambda device: [run.HERE / 'fused.py']\nsys.exit(run.main())\n"
    )
    monkeypatch.setattr(kernels, "SCRIPT", script)
    run(monkeypatch, "bench", "kernels", "--quick", "--repeats", 1, "-o", tmp_path / "kernels.csv")
    assert "add_rms_norm" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open(newline="")))
    assert {row["op"] for row in rows} >= {"rms_norm", "store_kv", "rotary_store_kv", "silu_mul", "cross_entropy"}
    for row in rows:
        assert float(row["median_us"]) > 0
        assert row["card"]
        assert row["torch"] == str(torch.__version__)
        if row["ratio"]:
            assert float(row["ratio"]) == pytest.approx(float(row["baseline_us"]) / float(row["median_us"]), rel=0.01)


def test_kernels_without_a_checkout(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(kernels, "SCRIPT", tmp_path / "kernels" / "bench" / "run.py")
    monkeypatch.setattr(sys, "argv", ["rayllm", "bench", "kernels"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code
    assert "come with a checkout" in capsys.readouterr().err


def test_kernels_to_a_folder_are_refused_before_they_are_timed(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["rayllm", "bench", "kernels", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"error: --output: {tmp_path}: Is a directory\n"
