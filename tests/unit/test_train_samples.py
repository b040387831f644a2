"""Answers before and after a run are transformers' likeliest ones, and prompts that cannot be answered are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayllm.core.errors import ConfigError, DataError
from rayllm.train.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplesConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.data.rows import Kind
from rayllm.train.recipes import RECIPES
from rayllm.train.report.page import render
from rayllm.train.samples import read_samples, sample_after, sample_before
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.html_page import parse
from tests.packed_rows import pack_rows, seven_pairs
from tests.ranks import Ranks

LENGTH = 32
SAMPLES = SamplesConfig(prompts=("the cat", "and\nthe <b>"), max_tokens=12)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    rows = [{"text": "the cat sat on the mat. " * 4}] * 8
    return pack_rows(tmp_path_factory.mktemp("data"), tiny_model, Kind.TEXT, rows, LENGTH)


def config_of(run: Path, start: Path, data: Path, samples: SamplesConfig, **model: Any) -> TrainConfig:
    return TrainConfig(
        run=str(run),
        model=ModelConfig(start=str(start), **model),
        data=DataConfig(path=str(data)),
        batch=BatchConfig(sequence_length=LENGTH, tokens=4 * LENGTH),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(steps=4, kind="constant"),
        samples=samples,
    )


def greedy(directory: Path, prompts: tuple[str, ...], max_tokens: int, *, chat: bool = False) -> list[str]:
    """By transformers, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    answers = []
    for prompt in prompts:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(ids, do_sample=False, max_new_tokens=max_tokens, attention_mask=torch.ones_like(ids))
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("chat", [False, True])
def test_answers_of_the_start_model_and_of_the_last_checkpoint(
    ranks: Ranks, tmp_path: Path, tiny_model: Path, data: Path, chat: bool
) -> None:
    config = config_of(tmp_path / "run", tiny_model, data, replace(SAMPLES, chat=chat))
    check(config, RECIPES["pretrain"])
    sample_before(config)
    begun = read_samples(tmp_path / "run")
    assert begun is not None
    before = greedy(tiny_model, SAMPLES.prompts, 12, chat=chat)
    assert [(one.prompt, one.before, one.after) for one in begun.samples] == [
        (prompt, answer, None) for prompt, answer in zip(SAMPLES.prompts, before, strict=True)
    ]
    ranks.run(1, train_ranks.run_recipe, "pretrain", config)
    assert "the run has not ended" in parse(render(tmp_path / "run")).text
    sample_after(config)
    saved, done = SavedRun(tmp_path / "run").latest(), read_samples(tmp_path / "run")
    assert saved is not None
    assert done is not None
    assert (done.checkpoint, done.config) == ("step-00000004", config.samples)
    after = greedy(saved.directory, SAMPLES.prompts, 12, chat=chat)
    assert [(one.before, one.after) for one in done.samples] == list(zip(before, after, strict=True))
    assert before != after
    page = parse(render(tmp_path / "run"))
    assert all(text in page.text for text in (*SAMPLES.prompts, *before, *after))


def test_asked_once_and_again_where_the_question_is_another(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    config = config_of(tmp_path / "run", tiny_model, data, SAMPLES)
    sample_before(config)
    file = tmp_path / "run" / "samples.json"
    written = file.stat().st_mtime_ns
    sample_before(config)
    assert file.stat().st_mtime_ns == written
    sample_before(replace(config, samples=SamplesConfig(prompts=("mat",), max_tokens=3)))
    stored = read_samples(tmp_path / "run")
    assert stored is not None
    assert [one.prompt for one in stored.samples] == ["mat"]
    file.write_text("{}")
    with pytest.raises(DataError, match=r"samples\.json: is not what"):
        read_samples(tmp_path / "run")


def test_random_weights_are_not_asked(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    sample_before(config_of(tmp_path / "run", tiny_model, data, SAMPLES, random=True))
    stored = read_samples(tmp_path / "run")
    assert stored is not None
    assert [one.before for one in stored.samples] == [None, None]


def test_without_prompts_nothing_is_written(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    config = config_of(tmp_path / "run", tiny_model, data, SamplesConfig())
    sample_before(config)
    sample_after(config)
    assert not (tmp_path / "run").exists()
    assert read_samples(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        (SamplesConfig(prompts=("the", "")), r"samples\.prompts: '' has no token"),
        (SamplesConfig(prompts=("the",), max_tokens=512), r"'the' has 1 tokens, .* are more than the model's 512"),
        (SamplesConfig(prompts=("a\0b",)), r"samples\.prompts: 'a\\x00b': prompt: holds a NUL character"),
    ],
)
def test_what_cannot_be_answered(
    tmp_path: Path, tiny_model: Path, data: Path, samples: SamplesConfig, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(config_of(tmp_path / "run", tiny_model, data, samples), RECIPES["pretrain"])


def test_a_reward_model_gives_no_answers(tmp_path: Path, tiny_model: Path) -> None:
    pairs = seven_pairs(tmp_path / "pairs", tiny_model, LENGTH)
    with pytest.raises(ConfigError, match="a reward model gives no answers"):
        check(config_of(tmp_path / "run", tiny_model, pairs, SAMPLES), RECIPES["rm"])


def test_at_least_one_token() -> None:
    with pytest.raises(ConfigError, match=r"samples\.max_tokens: 0 is not positive"):
        SamplesConfig(prompts=("the",), max_tokens=0)
