"""PPO equals a float64 statement of it on transformers' models, step by step and over two rollouts, under every layout.

The answers are those that the engine drew. What the reference below says of them is by transformers and by plain
loops over numbers; formulas as in Huang et al. 2024 and trl 1.16 (`trl/experimental/ppo/ppo_trainer.py`).
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rayllm.core.config import CacheConfig
from rayllm.core.errors import CheckpointError, ConfigError, DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.data.permutation import permute
from rayllm.train.data.rows import Kind
from rayllm.train.experience import Answers, experience
from rayllm.train.progress import Progress, read_metrics
from rayllm.train.recipes import RECIPES
from rayllm.train.rollout import Answer
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.conftest import byte_tokenizer
from tests.packed_rows import pack_rows
from tests.ranks import Ranks

PROMPT, ANSWER = 12, 8
LENGTH = PROMPT + ANSWER
ROWS_PER_STEP, MINIBATCHES, EPOCHS = 4, 2, 2
STEPS = 2 * MINIBATCHES * EPOCHS  # two rollouts
GAP = ("gap_max_abs_diff", "gap_mean_abs_diff", "gap_kl")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def start(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> Path:
    """Divides by two. Many tokens end an answer, so that some do early."""
    directory = make_tiny_model(num_key_value_heads=2, num_attention_heads=4, tie_word_embeddings=request.param)
    generation = directory / "generation_config.json"
    settings = json.loads(generation.read_text())
    generation.write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], *range(0, 240, 9)]}))
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by transformers, of another shape than the policy."""
    directory, tokenizer = tmp_path_factory.mktemp("reward"), byte_tokenizer()
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            num_labels=1,
            pad_token_id=None,
            dtype="float32",
        )
    )
    with torch.no_grad():
        model.score.weight.mul_(15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """Eleven prompts, so that the second rollout ends in the next epoch."""
    rows = [{"prompt": "the " * (n % 3) + f"cat {n}"} for n in range(11)]
    return pack_rows(tmp_path_factory.mktemp("prompts"), start, Kind.PROMPT, rows, PROMPT)


Make = Callable[..., TrainConfig]


@pytest.fixture
def make(start: Path, data: Path, reward_model: Path) -> Make:
    def config_of(run: Path, *, ppo: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(start=str(start)),
            "batch": BatchConfig(sequence_length=LENGTH, tokens=ROWS_PER_STEP * LENGTH),
            "optimizer": OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, max_grad_norm=1.0, eps=1e-4),
            "schedule": ScheduleConfig(steps=STEPS, kind="constant"),
            "checkpoint": CheckpointConfig(every_steps=MINIBATCHES * EPOCHS, keep_last=2),
            "ppo": PpoConfig(
                **{
                    "reward_model": str(reward_model),
                    "answer_tokens": ANSWER,
                    "minibatches": MINIBATCHES,
                    "epochs": EPOCHS,
                    "kl_coef": 0.2,
                    "clip_low": 0.02,
                    "clip_high": 0.03,
                    "value_clip": 0.01,
                    "value_coef": 0.5,
                    "gamma": 0.98,
                    "unfinished_penalty": 0.7,
                    **(ppo or {}),
                }
            ),
        }
        return TrainConfig(run=str(run), data=DataConfig(path=str(data)), **{**settings, **changes})

    return config_of


def run(ranks: Ranks, config: TrainConfig) -> tuple[list[Progress], list[list[Answer]]]:
    rollouts = ranks.run(config.layout.world, train_ranks.run_ppo, config)
    assert all(one == rollouts[0] for one in rollouts), "ranks learn from different answers"
    return read_metrics(Path(config.run)), rollouts[0]


class Float64:
    """Policy, value head, reference and reward model by transformers; torch's AdamW; one answer at a time."""

    def __init__(self, start: Path, reward_model: Path, config: TrainConfig) -> None:
        self.config, self.ppo = config, config.ppo
        self.policy = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
        self.reference = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
        self.reward_model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float64)
        self.value_head = torch.nn.Parameter(torch.zeros(self.policy.config.hidden_size, dtype=torch.float64))
        named = list(self.policy.named_parameters())
        decayed = [self.value_head, *(p for name, p in named if p.ndim == 2 and "embed" not in name)]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.parameters = [*decayed, *others]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=config.optimizer.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-4,
        )

    def log_probs(self, model: Any, answer: Answer) -> tuple[Tensor, Tensor]:
        """Of the answer's tokens, and the hidden states that predict them."""
        ids = torch.tensor([answer.prompt + answer.tokens])
        out = model(ids, output_hidden_states=True)
        first = len(answer.prompt) - 1
        log_probs = out.logits[0, first:-1].log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        return log_probs, out.hidden_states[-1][0, first:-1]

    def begin(self, answers: list[Answer]) -> dict[str, float]:
        """What a rollout is worth; keeps what its steps need."""
        self.answers, self.known = answers, []
        rewards, kls, entropies, gaps = [], [], [], []
        with torch.no_grad():
            for answer in answers:
                log_probs, hidden = self.log_probs(self.policy, answer)
                reference, _ = self.log_probs(self.reference, answer)
                values = (hidden @ self.value_head).tolist()
                ids = torch.tensor([answer.prompt + answer.tokens])
                score = self.reward_model(ids).logits[0, 0].item() - self.ppo.unfinished_penalty * (not answer.finished)
                kl = (log_probs - reference).tolist()
                advantages, returns = self.advantages([-self.ppo.kl_coef * one for one in kl], score, values)
                self.known.append((log_probs, torch.tensor(values), advantages, torch.tensor(returns)))
                rewards.append(score)
                kls.append(sum(kl))
                entropies += (-log_probs).tolist()
                gaps += (torch.tensor(answer.log_probs).double() - log_probs).abs().tolist()
        flat = [a for _, _, advantages, _ in self.known for a in advantages]
        mean, deviation = np.mean(flat), math.sqrt(np.var(flat) + 1e-8)
        self.known = [(p, v, torch.tensor([(one - mean) / deviation for one in a]), r) for p, v, a, r in self.known]
        assert max(gaps) < 1e-4, "the engine drew the answers from another distribution"
        return {
            "reward": float(np.mean(rewards)),
            "kl": float(np.mean(kls)),
            "entropy": float(np.mean(entropies)),
            "answer_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            "finished": float(np.mean([answer.finished for answer in answers])),
        }

    def advantages(self, rewards: list[float], score: float, values: list[float]) -> tuple[list[float], list[float]]:
        rewards = [*rewards[:-1], rewards[-1] + score]
        advantages, following = [], 0.0
        for t in reversed(range(len(values))):
            next_value = values[t + 1] if t + 1 < len(values) else 0.0
            delta = rewards[t] + self.ppo.gamma * next_value - values[t]
            following = delta + self.ppo.gamma * self.ppo.lam * following
            advantages.insert(0, following)
        return advantages, [a + v for a, v in zip(advantages, values, strict=True)]

    def step(self, chosen: list[int]) -> dict[str, float]:
        ppo = self.ppo
        policy_terms, value_terms, clipped, changes = [], [], [], []
        for place in chosen:
            old, old_values, advantages, returns = self.known[place]
            log_probs, hidden = self.log_probs(self.policy, self.answers[place])
            values = hidden @ self.value_head
            ratios = torch.exp(log_probs - old)
            for t in range(len(ratios)):
                held = ratios[t].clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
                plain, bounded = -advantages[t] * ratios[t], -advantages[t] * held
                policy_terms.append(torch.maximum(plain, bounded))
                clipped.append(float(bounded > plain))
                near = old_values[t] + (values[t] - old_values[t]).clamp(-ppo.value_clip, ppo.value_clip)
                errors = torch.stack([(values[t] - returns[t]) ** 2, (near - returns[t]) ** 2])
                value_terms.append(0.5 * errors.max())
                changes.append((ratios[t] - 1 - torch.log(ratios[t])).item())
        policy, value = torch.stack(policy_terms).mean(), torch.stack(value_terms).mean()
        loss = policy + ppo.value_coef * value
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.adamw.step()
        self.adamw.zero_grad()
        return {
            "loss": loss.item(),
            "grad_norm": norm,
            "count": len(policy_terms),
            "policy_loss": policy.item(),
            "value_loss": value.item(),
            "clip_fraction": float(np.mean(clipped)),
            "approx_kl": float(np.mean(changes)),
        }


def order(step: int, seed: int = 0) -> list[int]:
    """The answers of a step: each epoch goes through all of them."""
    place = step % (MINIBATCHES * EPOCHS)
    epoch, minibatch = divmod(place, MINIBATCHES)
    whole = permute(np.arange(MINIBATCHES * ROWS_PER_STEP), MINIBATCHES * ROWS_PER_STEP, (seed, step - place, epoch))
    return whole.tolist()[minibatch * ROWS_PER_STEP : (minibatch + 1) * ROWS_PER_STEP]


def test_two_rollouts_equal_float64(
    ranks: Ranks, make: Make, start: Path, reward_model: Path, data: Path, tmp_path: Path
) -> None:
    config = make(tmp_path)
    metrics, rollouts = run(ranks, config)
    assert len(rollouts) == 2
    ends = Tokenizer.load(start).eos_token_ids
    for answer in (answer for rollout in rollouts for answer in rollout):
        assert answer.finished == (answer.tokens[-1] in ends)
        assert answer.finished or len(answer.tokens) == ANSWER
        assert not ends & set(answer.tokens[:-1])
    assert {answer.finished for rollout in rollouts for answer in rollout} == {True, False}
    reference = Float64(start, reward_model, config)
    told: dict[str, float] = {}
    for step, row in enumerate(metrics):
        if step % (MINIBATCHES * EPOCHS) == 0:
            told = reference.begin(rollouts[step // (MINIBATCHES * EPOCHS)])
        expected = {**reference.step(order(step)), **told}
        found = {"loss": row.loss, "grad_norm": row.grad_norm, "count": row.count, **row.measures}
        assert {name for name in found if name not in expected} == set(GAP)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-5), (step, name)
    assert metrics[0].measures["kl"] == 0, "before the first step policy and reference are one"
    assert metrics[0].measures["approx_kl"] < 1e-9
    assert metrics[-1].measures["kl"] != 0
    assert all(row.measures["gap_max_abs_diff"] < 1e-4 for row in metrics)
    assert 0 < max(row.measures["clip_fraction"] for row in metrics) < 1, "nothing, or everything, is clipped"
    saved = SavedRun(tmp_path).latest()
    assert saved is not None
    model = AutoModelForCausalLM.from_pretrained(saved.directory)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.double(), reference.policy.get_parameter(name), rtol=0, atol=2e-5)
    with LLM(str(saved.directory), cache=CacheConfig(cpu_memory_bytes=32 << 20)) as llm:
        [answer] = llm.generate([[5, 6]], SamplingParams(max_tokens=3))
    assert answer.outputs[0].token_ids


LAYOUTS = {
    "ddp": LayoutConfig(replicate=2),
    "fsdp": LayoutConfig(shard=2),
    "hsdp": LayoutConfig(replicate=2, shard=2),
    "tp": LayoutConfig(tensor=2),
    "pp": LayoutConfig(pipeline=2),
    "fsdp x tp": LayoutConfig(shard=2, tensor=2),
    "tp x pp": LayoutConfig(tensor=2, pipeline=2),
}


def second_rollout(ranks: Ranks, config: TrainConfig, alone: Path) -> tuple[list[Progress], list[list[Answer]]]:
    """From the weights with which it began there."""
    shutil.copytree(alone, config.run)
    last = SavedRun(Path(config.run)).latest()
    assert last is not None
    shutil.rmtree(last.directory)
    return run(ranks, config)


def check_same_steps(rows: list[Progress], others: list[Progress], *, loss: float) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row.loss == pytest.approx(other.loss, abs=loss)
        assert row.count == other.count
        assert row.measures.keys() == other.measures.keys()
        for measure in row.measures.keys() - GAP:
            assert row.measures[measure] == pytest.approx(other.measures[measure], rel=1e-5, abs=1e-5), measure
        assert row.measures["gap_max_abs_diff"] < 1e-4


def test_every_layout_goes_the_same_way(ranks: Ranks, make: Make, tmp_path: Path) -> None:
    alone, answers = run(ranks, make(tmp_path / "alone"))
    half, failures = STEPS // 2, {}
    for name, layout in LAYOUTS.items():
        try:
            metrics, drawn = run(ranks, make(tmp_path / name, layout=layout))
            again, drawn_again = second_rollout(
                ranks, make(tmp_path / f"{name} again", layout=layout), tmp_path / "alone"
            )
            tokens = [[a.tokens for a in rollout] for rollout in answers]
            assert [[a.tokens for a in rollout] for rollout in drawn] == tokens
            assert [[a.tokens for a in rollout] for rollout in drawn_again] == tokens[1:]
            check_same_steps(metrics[:half], alone[:half], loss=1e-6)
            # This one begins with weights that four updates have rounded differently, as the norm of a gradient shows.
            check_same_steps(metrics[half:], alone[half:], loss=1e-5)
            check_same_steps(again[half:], alone[half:], loss=1e-6)
            for row, other in zip([*metrics[:half], *again[half:]], alone, strict=True):
                assert row.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
            assert metrics[0].measures["kl"] == 0
        except AssertionError as failure:
            failures[name] = str(failure)
    assert not failures, "\n\n".join(f"{name}: {text}" for name, text in failures.items())


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(shard=2)], ids=["alone", "fsdp"])
def test_a_run_goes_on(ranks: Ranks, make: Make, layout: LayoutConfig, tmp_path: Path) -> None:
    whole, answers = run(ranks, make(tmp_path / "whole", layout=layout))
    config = make(tmp_path / "run", layout=layout)
    _, first = run(ranks, replace(config, schedule=ScheduleConfig(steps=STEPS // 2, kind="constant")))
    metrics, second = run(ranks, config)
    assert [*first, *second] == answers
    assert [row.step for row in metrics] == list(range(1, STEPS + 1))
    assert [(row.loss, row.grad_norm, row.measures) for row in metrics] == [
        (row.loss, row.grad_norm, row.measures) for row in whole
    ]


def test_it_learns(ranks: Ranks, make: Make, tmp_path: Path) -> None:
    """More reward, at the cost of being further from the reference."""
    config = make(
        tmp_path,
        ppo={"kl_coef": 0.01, "clip_low": 0.2, "clip_high": 0.2, "value_clip": 10.0},
        batch=BatchConfig(sequence_length=LENGTH, tokens=16 * LENGTH, rows=4),
        schedule=ScheduleConfig(steps=20 * MINIBATCHES * EPOCHS, kind="constant"),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        checkpoint=CheckpointConfig(),
    )
    metrics, _ = run(ranks, config)
    rewards = [row.measures["reward"] for row in metrics[:: MINIBATCHES * EPOCHS]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5
    assert metrics[-1].measures["kl"] > 0.1
    saved = SavedRun(Path(config.run)).latest()
    assert saved is not None
    assert saved.state.reward == pytest.approx(np.mean(rewards)), "of all steps, what checkpoints are ranked by"


def test_bfloat16(ranks: Ranks, make: Make, start: Path, tmp_path: Path) -> None:
    """The engine draws in the dtype that the policy computes in, so that they are one policy."""
    config = make(tmp_path, model=ModelConfig(start=str(start), compute_dtype="bfloat16"), layout=LayoutConfig(shard=2))
    metrics, _ = run(ranks, config)
    assert metrics[0].measures["kl"] == 0
    assert all(row.measures["gap_mean_abs_diff"] < 0.05 for row in metrics)
    assert any(row.measures["gap_max_abs_diff"] > 1e-4 for row in metrics), "computed in float32"


def test_adapters_answer_and_learn(ranks: Ranks, make: Make, tmp_path: Path) -> None:
    """The engine draws by what adapters have learnt; the value head learns whole."""
    lora, rate = LoraConfig(rank=2), OptimizerConfig(learning_rate=1e-3, eps=1e-4)
    alone, _ = run(ranks, make(tmp_path / "alone", lora=lora, optimizer=rate))
    assert alone[0].measures["kl"] == 0
    assert alone[-1].measures["kl"] > 1e-3
    assert all(row.measures["gap_max_abs_diff"] < 1e-4 for row in alone)
    assert len({row.measures["value_loss"] for row in alone}) == len(alone)
    layout = LayoutConfig(shard=2, pipeline=2)
    for row, other in zip(
        run(ranks, make(tmp_path / "split", lora=lora, optimizer=rate, layout=layout))[0], alone, strict=True
    ):
        assert row.loss == pytest.approx(other.loss, abs=1e-5)
        assert row.measures["kl"] == pytest.approx(other.measures["kl"], abs=1e-5)


def test_an_answer_without_an_end_is_worth_less() -> None:
    answers = Answers(
        [Answer(prompt=[1], tokens=[2, 3], log_probs=[-1.0, -2.0], finished=finished) for finished in (True, False)]
    )
    nothing_NA = torch.zeros(2, 2, dtype=torch.float64)
    made = experience(
        answers, answers.engine_log_probs_NA, nothing_NA, nothing_NA, torch.tensor([1.0, 1.0]).double(),
        PpoConfig(unfinished_penalty=0.5, kl_coef=0.0, gamma=1.0, lam=1.0),
    )  # fmt: skip
    assert made.known["return"].tolist() == [[1.0, 1.0], [0.5, 0.5]]
    assert made.measures["reward"] == 0.75
    assert made.measures["finished"] == 0.5


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"ppo": {"reward_model": ""}}, r"^ppo.reward_model: name what `rayllm train rm` made"),
            ({"ppo": {"answer_tokens": 9}}, r"^batch.sequence_length: 20 has no room for prompts of 12 tokens"),
            ({"schedule": ScheduleConfig(steps=6)}, r"^schedule.steps: 6 is not a multiple of the 4 steps"),
            ({"checkpoint": CheckpointConfig(every_steps=2)}, r"^checkpoint.every_steps: 2 is not a multiple"),
        ],
    )
    def test_a_setting(self, make: Make, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(ConfigError, match=problem):
            check(make(tmp_path, **changes), RECIPES["ppo"])

    def test_weights_drawn_at_random(self, make: Make, start: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^model.random: answers are by a model that can write"):
            check(make(tmp_path, model=ModelConfig(start=str(start), random=True)), RECIPES["ppo"])

    def test_what_is_no_reward_model(self, make: Make, start: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is no reward model, but LlamaForCausalLM"):
            check(make(tmp_path, ppo={"reward_model": str(start)}), RECIPES["ppo"])

    def test_other_data(self, make: Make, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds prompt rows; sft reads chat"):
            check(make(tmp_path), RECIPES["sft"])

    def test_ppo_of_another_recipe(self, make: Make, start: Path, tmp_path: Path) -> None:
        rows = [{"prompt": "the", "chosen": " cat", "rejected": " dog"}] * 4
        pairs = pack_rows(tmp_path / "pairs", start, Kind.PREFERENCE, rows, LENGTH)
        config = replace(make(tmp_path / "run"), data=DataConfig(path=str(pairs)))
        with pytest.raises(ConfigError, match=r"^ppo: dpo has no use for it; only `rayllm train ppo` has"):
            check(config, RECIPES["dpo"])

    def test_to_go_on_with_something_else(
        self, ranks: Ranks, make: Make, make_tiny_model: Callable[..., Path], start: Path, tmp_path: Path
    ) -> None:
        config = make(tmp_path, schedule=ScheduleConfig(steps=4, kind="constant"))
        run(ranks, config)
        check(config, RECIPES["ppo"])
        other = make_tiny_model(num_key_value_heads=2, num_attention_heads=4, num_hidden_layers=2)
        with pytest.raises(DataError, match="the run began with another start model; go on with what it began with"):
            check(replace(config, model=ModelConfig(start=str(other))), RECIPES["ppo"])
