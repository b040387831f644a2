"""The report against numpy and scipy, and as a page: complete, self-contained, and safe with what models write."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from rayllm.core.errors import ConfigError
from rayllm.eval.report.page import MAX_CHANGED, render, write_report
from rayllm.eval.report.runs import read_runs
from rayllm.eval.report.statistics import (
    calibration,
    changed,
    comparable,
    nats_per,
    paired_difference,
    paired_nats,
    score,
)
from rayllm.eval.samples import SampleStore, write_results
from rayllm.eval.task import mean_metric
from tests.html_page import parse

KEY = ("anatomy", 0)
HOSTILE = '<script>alert("x")</script>&amp;\x07'


def choice_row(index: int, logprobs: list[float], right: int, subject: str = "anatomy") -> dict[str, Any]:
    best = int(np.argmax(logprobs))
    return {
        "task": "mmlu",
        "task_version": "1.0",
        "subject": subject,
        "index": index,
        "target": "ABCD"[right],
        "extracted": "ABCD"[best],
        "scores": [("acc", float(best == right))],
        "responses": [
            {
                "prompt": f"Question {index} {HOSTILE}",
                "continuation": f" {letter}",
                "logprob": logprob,
                "num_tokens": 1,
                "is_greedy": False,
                "text": None,
            }
            for letter, logprob in zip("ABCD", logprobs, strict=True)
        ],
        "model": "tiny",
        "weight_version": "w",
        "num_fewshot": 5,
        "seed": 0,
    }


def text_row(index: int, text: str, score: float) -> dict[str, Any]:
    row = choice_row(index, [0.0] * 4, 0, "")
    response = {**row["responses"][0], "continuation": None, "logprob": None, "is_greedy": None, "text": text}
    return {**row, "task": "gsm8k", "scores": [("strict-match", score)], "extracted": text, "responses": [response]}


def write_run(directory: Path, tasks: Mapping[str, list[dict[str, Any]]], model: str = "tiny") -> Path:
    results: dict[str, Any] = {}
    for task, rows in tasks.items():
        store = SampleStore(directory, task)
        for row in rows:
            store.add(row)
        store.flush()
        name = rows[0]["scores"][0][0]
        groups: dict[str, Any] = {}
        for part in ["", *sorted({row["subject"] for row in rows} - {""})]:
            metric = mean_metric(name, [row["scores"][0][1] for row in rows if part in ("", row["subject"])])
            figure = {"value": metric.value, "stderr": metric.stderr}
            groups[part] = {"num_documents": metric.num_documents, "metrics": {name: figure}}
        results[task] = {
            "version": "1.0",
            "num_fewshot": 5,
            "num_resumed": 0,
            "environment": {"sandbox": "landlock"} if task == "gsm8k" else {},
            **groups.pop(""),
            "groups": groups,
        }
    write_results(directory, {"model": model, "weight_version": None, "seed": 0, "tasks": results})
    return directory


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    runs = []
    for name, count, sharpness in (("plain", 120, 1.0), ("int8", 100, 3.0)):
        choices = [
            choice_row(i, (sharpness * random.normal(size=4)).tolist(), i % 4, ["anatomy", "virology"][i % 2])
            for i in range(count)
        ]
        texts = [text_row(i, f"{HOSTILE} {name} {i}", float(random.random() < 0.5)) for i in range(90)]
        runs.append(write_run(tmp_path / name, {"mmlu": choices, "gsm8k": texts}, model=name))
    return runs


def test_paired_difference_is_that_of_scipy(directories: list[Path]) -> None:
    first, other = (run.rows("mmlu") for run in read_runs(directories))
    found = paired_difference(first, other, "acc")
    assert found is not None
    keys = first.keys() & other.keys()
    gaps = np.array([dict(other[key]["scores"])["acc"] - dict(first[key]["scores"])["acc"] for key in keys])
    low, high = scipy.stats.norm.interval(0.95, gaps.mean(), scipy.stats.sem(gaps))
    assert found.num_documents == len(keys) == 100
    assert (found.value, found.low, found.high) == pytest.approx((gaps.mean(), low, high), abs=1e-6)
    assert found.is_clear == (low > 0 or high < 0)


def page_row(index: int, loglikelihood: float, words: int) -> dict[str, Any]:
    scores = {"loglikelihood": loglikelihood, "words": words, "bytes": 5 * words, "tokens": 2 * words}
    response = {**choice_row(0, [loglikelihood] * 4, 0)["responses"][0], "prompt": "", "continuation": "a text"}
    row = {**choice_row(index, [0.0] * 4, 0, ""), "task": "perplexity", "extracted": None, "target": f"text {index}"}
    return {**row, "scores": list(scores.items()), "responses": [response]}


@pytest.fixture
def pages() -> list[list[dict[str, Any]]]:
    """Of two runs; documents are hard and long for both alike."""
    random = np.random.default_rng(1)
    words = random.integers(1, 400, size=80)
    hardness = random.normal(4, 1, size=80)
    runs = [
        [-w * (h + extra + random.normal(0, 0.05)) for w, h in zip(words, hardness, strict=True)] for extra in (0, 0.1)
    ]
    return [[page_row(i, float(ll), int(w)) for i, (ll, w) in enumerate(zip(run, words, strict=True))] for run in runs]


def test_paired_nats_are_those_of_the_ratio_estimator(pages: list[list[dict[str, Any]]]) -> None:
    first, other = ({("", row["index"]): row for row in rows} for rows in pages)
    found, alone = paired_nats(first, other, "bytes"), nats_per(pages[0], "bytes")
    assert found is not None
    assert alone is not None
    columns = [[dict(row["scores"])[name] for row in rows] for rows in pages for name in ("loglikelihood", "bytes")]
    before, sizes, after, _ = map(np.array, columns)
    n = len(sizes)

    def textbook(nats: Any) -> tuple[float, float]:
        """Cochran, Sampling Techniques, 6.4: by variances and the covariance."""
        ratio = nats.sum() / sizes.sum()
        spread = np.cov(nats, sizes)
        variance = (spread[0, 0] - 2 * ratio * spread[0, 1] + ratio**2 * spread[1, 1]) / n / sizes.mean() ** 2
        return ratio, variance**0.5

    value, stderr = textbook(before - after)
    low, high = scipy.stats.norm.interval(0.95, value, stderr)
    assert (found.value, found.low, found.high, found.num_documents) == pytest.approx((value, low, high, n), rel=1e-6)
    assert (alone.value, alone.stderr) == pytest.approx(textbook(-before), rel=1e-9)
    random = np.random.default_rng(2)
    draws = random.integers(0, n, size=(4000, n))
    resampled = (before - after)[draws].sum(1) / sizes[draws].sum(1)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * resampled.std(), rel=0.1)
    assert found.is_clear
    assert paired_nats(first, {("", 0): first["", 0]}, "bytes") is None
    assert paired_nats(first, {}, "bytes") is None
    assert nats_per([text_row(0, "", 1.0)], "bytes") is None


def test_the_page_compares_perplexities(pages: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    pages[1][3]["scores"] = pages[0][3]["scores"] = [("loglikelihood", -30.0), ("words", 10), ("bytes", 50)]
    pages[1][5]["scores"] = [("loglikelihood", -1.0), ("words", 10), ("bytes", 50)]
    figure = {"value": 54.6, "stderr": None}
    infinite = {"value": None, "stderr": None, "note": "inf: no finite number"}
    for i, rows in enumerate(pages):
        directory = write_run(tmp_path / f"{i}", {"perplexity": rows})
        content = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        content["tasks"]["perplexity"]["metrics"] = {"word_perplexity": infinite, "byte_perplexity": figure}
        write_results(directory, content)
    runs = read_runs([tmp_path / "0", tmp_path / "1"])
    html = render(runs)
    text = parse(html).text.replace("\n", " ")
    for unit in ("words", "bytes"):
        found = paired_nats(runs[0].rows("perplexity"), runs[1].rows("perplexity"), unit)
        assert found is not None
        colour = "bad" if found.is_clear else ""
        assert f'<span class="{colour}">{found.value:+.4f}</span> [{found.low:+.4f}, {found.high:+.4f}]' in html
        assert f"nats per {unit[:-1]}" in text
    assert "not finite" in text
    worst = max(
        (row for row in pages[1] if row["index"] != 5),
        key=lambda row: score(row, "word_perplexity") - score(pages[0][row["index"]], "word_perplexity"),
    )
    summaries = re.findall("<summary>(.*?)</summary>", html)
    assert f" · {worst['index']}" in summaries[0]
    assert any('class="good"' in each and each.endswith("0.1000</span> · 5") for each in summaries)
    assert not any(each.endswith(" · 3") for each in summaries)  # it has not changed
    assert "no answer" not in text


def test_paired_difference_needs_documents_in_both() -> None:
    rows = {("", i): text_row(i, "", float(i % 2)) for i in range(4)}
    assert paired_difference(rows, {("", 9): text_row(9, "", 1.0)}, "strict-match") is None
    assert paired_difference(rows, rows, "acc") is None
    same = paired_difference(rows, rows, "strict-match")
    assert same is not None
    assert (same.value, same.low, same.high, same.is_clear) == (0.0, 0.0, 0.0, False)


def test_calibration_is_that_of_numpy(directories: list[Path]) -> None:
    rows = list(read_runs(directories)[1].rows("mmlu").values())
    found = calibration(rows)
    assert found is not None
    logprobs = np.array([[response["logprob"] for response in row["responses"]] for row in rows])
    shares = np.exp(logprobs) / np.exp(logprobs).sum(1, keepdims=True)
    confidence, right = shares.max(1), np.array([dict(row["scores"])["acc"] for row in rows])
    bins = np.minimum((confidence * 10).astype(int), 9)
    error = sum(
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )
    assert found.error == pytest.approx(error, abs=1e-9)
    assert [each.count for each in found.bins] == [int((bins == b).sum()) for b in np.unique(bins)]


def test_calibration_is_of_multiple_choice_alone() -> None:
    assert calibration([text_row(0, "x", 1.0)]) is None
    assert calibration([]) is None
    certain = calibration([choice_row(0, [0.0, -1e6, -1e6, -1e6], 0)])
    assert certain is not None
    assert (certain.bins[0].confidence, certain.error) == (1.0, 0.0)


def test_changed_samples_are_those_with_another_score() -> None:
    first = {("", i): text_row(i, "a", float(i < 3)) for i in range(6)}
    other = {("", i): text_row(i, "b", float(i % 2)) for i in range(7)}
    pairs = changed(first, other, "strict-match")
    assert [(old["index"], dict(new["scores"])["strict-match"]) for old, new in pairs] == [
        (0, 0.0),
        (2, 0.0),
        (3, 1.0),
        (5, 1.0),
    ]


def test_the_page_stands_alone_and_is_safe(directories: list[Path], tmp_path: Path) -> None:
    write_report(directories, tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    page = parse(text)
    assert page.links == ["#mmlu", "#gsm8k"]
    assert HOSTILE.split("&")[0] in page.text  # as text
    assert "nan" not in text.split("</style>")[1].lower().replace("anatomy", "")


def test_the_page_says_what_the_runs_say(directories: list[Path]) -> None:
    runs = read_runs(directories)
    page = parse(render(runs))
    for run in runs:
        for task, metric in (("mmlu", "acc"), ("gsm8k", "strict-match")):
            figure = run.tasks[task]["metrics"][metric]
            assert f"{figure['value']:.4f} ± {figure['stderr']:.4f}" in page.text
        for part in ("anatomy", "virology"):
            assert f"{run.tasks['mmlu']['groups'][part]['metrics']['acc']['value']:.4f}" in page.text
    difference = paired_difference(runs[0].rows("mmlu"), runs[1].rows("mmlu"), "acc")
    assert difference is not None
    assert f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]" in page.text.replace("\n", " ")
    assert "Documents differ: A 120, B 100." in page.text
    assert "Sandbox: A landlock, B landlock." in page.text
    assert "expected calibration error" in page.text
    assert page.tags.count("details") <= 2 * MAX_CHANGED


def test_the_page_says_in_what_the_runs_differ(directories: list[Path]) -> None:
    """The same model with int8 weights has the same name."""
    for directory, quantize, limit in zip(directories, (None, "w8a8"), (None, 100), strict=True):
        settings = {"model": "tiny", "dtype": "bfloat16", "quantize": quantize, "limit": limit, "seconds": 1.0}
        write_results(directory, {"weight_version": None, "seed": 0, **settings, "tasks": {}})
    runs = read_runs(directories)
    table = render(runs).partition("</table>")[0]
    names = re.findall("<th>(.*?)</th>", table)
    assert names == ["run", "model", "weights", "seed", "quantize", "limit", "folder"]
    assert re.findall("<td>([^<]*)</td>", table) == [
        *("tiny", "not said", "0", "-", "-", "plain"),
        *("tiny", "not said", "0", "w8a8", "100", "int8"),
    ]
    assert "quantize" not in render(runs[1:])


def test_one_run_and_a_task_that_only_one_has(directories: list[Path], tmp_path: Path) -> None:
    alone = parse(render(read_runs(directories[:1])))
    assert "Changed from" not in alone.text
    other = write_run(tmp_path / "other", {"gsm8k": [text_row(0, "x", 1.0)]})
    both = parse(render(read_runs([directories[0], other])))
    assert "mmlu" in both.text


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"tasks": {}}',
        '{"model": "m", "tasks": []}',
        '{"model": "m", "tasks": {"mmlu": 1}}',
        '{"model": "m", "tasks": {"mmlu": {"version": "1"}}}',
        '{"model": "m", "tasks": {"mmlu": {"version": "1", "num_fewshot": 0, "num_documents": 1, "groups": {}, '
        '"metrics": {}}}}',
        '{"model": "m", "tasks": {"mmlu": {"version": "1", "num_fewshot": 0, "num_documents": 1, "groups": {}, '
        '"metrics": {"acc": {"value": "high", "stderr": null}}}}}',
        "[" * 100_000,
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=r"results\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_samples_beyond_the_limit_of_the_last_run_do_not_count(tmp_path: Path, directories: list[Path]) -> None:
    content = json.loads((directories[0] / "results.json").read_text(encoding="utf-8"))
    content["tasks"]["mmlu"]["limit"] = 30
    write_results(directories[0], content)
    first, other = read_runs(directories)
    assert {index for _, index in first.rows("mmlu")} == set(range(30))
    difference = paired_difference(first.rows("mmlu"), other.rows("mmlu"), "acc")
    assert difference is not None
    assert difference.num_documents == 30
    assert len(first.rows("gsm8k")) == 90


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, directories: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report.html"):
        with pytest.raises(ConfigError, match=rf"^{path}: cannot be written"):
            write_report(directories, path)


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 6"):
        read_runs([tmp_path] * 7)


def test_other_documents_of_the_same_number_are_not_compared(tmp_path: Path) -> None:
    """Two runs on data of one's own."""
    rows = [choice_row(index, [1.0, 0.0, 0.0, index % 2 * 2.0], 0) for index in range(8)]
    other = [choice_row(index, [0.0, 1.0, 0.0, 0.0], 0) for index in range(8)]
    for row in other[:3]:
        row["responses"][0]["prompt"] = "Another question?"
    other[3]["target"] = "another"
    other[4]["responses"][1]["continuation"] = "another"
    runs = read_runs([write_run(tmp_path / "a", {"mmlu": rows}), write_run(tmp_path / "b", {"mmlu": other})])
    texts = parse(render(runs)).text
    assert "5 of the documents of B have other texts than A's of the same number, and are not compared." in texts
    assert "3 in both" in texts


def test_shots_make_other_prompts_of_the_same_documents() -> None:
    old, new = choice_row(0, [0.0] * 4, 0), choice_row(0, [0.0] * 4, 0)
    for response in new["responses"]:
        response["prompt"] = "more shots, " + response["prompt"]
    assert not comparable({KEY: old}, {KEY: new})
    assert comparable({KEY: old}, {KEY: {**new, "num_fewshot": 0}})


def test_samples_that_are_gone_are_told(tmp_path: Path, directories: list[Path]) -> None:
    shutil.rmtree(directories[1] / "samples")
    assert "B's folder holds no samples any more" in parse(render(read_runs(directories))).text
