"""PPO: rollouts by the policy under training, and the steps that learn from each of them.

The start model is the reference. Reference and reward model are built as the policy is, on the same ranks in the same
layout, so that before the first step policy and reference are one, to the last bit.
"""

from pathlib import Path

import numpy as np

from rayllm.core.errors import ConfigError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.hub import resolve_model
from rayllm.train.config import TrainConfig, check_layout
from rayllm.train.data.cursor import Cursor, deal
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.permutation import permute
from rayllm.train.experience import Answers, Experience, Jury, experience
from rayllm.train.feed import Feed, Setup, Work
from rayllm.train.gather import language_model
from rayllm.train.initial import stored_weights
from rayllm.train.objective import NextToken
from rayllm.train.reward import Reward
from rayllm.train.rollout import Rollout
from rayllm.train.trainee import Heads, Trainee, build_trainee


def check(config: TrainConfig, directory: Path, dataset: PackedDataset) -> None:
    """ConfigError for what cannot be learnt so. `directory`: of the start model."""
    ppo, length = config.ppo, config.batch.sequence_length
    if config.model.random:
        raise ConfigError("model.random: answers are by a model that can write; start from one")
    if dataset.info.sequence_length + ppo.answer_tokens > length:
        raise ConfigError(
            f"batch.sequence_length: {length} has no room for prompts of {dataset.info.sequence_length} tokens, as"
            f" {config.data.path} was packed, and ppo.answer_tokens {ppo.answer_tokens}"
        )
    for name, steps in (
        ("schedule.steps", config.schedule.steps),
        ("checkpoint.every_steps", config.checkpoint.every_steps),
    ):
        if steps % ppo.steps_per_rollout:
            raise ConfigError(
                f"{name}: {steps} is not a multiple of the {ppo.steps_per_rollout} steps after each rollout"
                f" (ppo.minibatches {ppo.minibatches} x ppo.epochs {ppo.epochs})"
            )
    _check_reward_model(config, directory)


def _check_reward_model(config: TrainConfig, directory: Path) -> None:
    if not config.ppo.reward_model:
        raise ConfigError("ppo.reward_model: name what `rayllm train rm` made; it says how good an answer is")
    path = resolve_model(config.ppo.reward_model)
    checkpoint = Checkpoint.open(path, scores=True)
    stored_weights(checkpoint)
    check_layout(checkpoint.spec, config.layout)
    if Tokenizer.load(path).fingerprint != Tokenizer.load(directory).fingerprint:
        raise ConfigError(f"ppo.reward_model: {path} has another tokenizer than the start model {directory}")
    if checkpoint.spec.max_position_embeddings < config.batch.sequence_length:
        raise ConfigError(
            f"ppo.reward_model: {path} reads {checkpoint.spec.max_position_embeddings} tokens at most,"
            f" fewer than batch.sequence_length {config.batch.sequence_length}"
        )


def feed(setup: Setup) -> Feed:
    """Answers of the policy; see `rayllm.train.policy`."""
    return _Rollouts(setup)


class _Rollouts:
    def __init__(self, setup: Setup) -> None:
        config, directory = setup.config, setup.directory
        self._setup = setup
        reward_model = resolve_model(config.ppo.reward_model)
        self._reference = _build(Checkpoint.open(directory), Heads.VOCABULARY, setup)
        self._reward_model = _build(Checkpoint.open(reward_model, scores=True), Heads.SCORE, setup)
        self._rollout = Rollout(directory, config, setup.mesh)
        self._jury = Jury(mesh=setup.mesh, rows=config.batch.rows)
        self._experience: Experience | None = None

    def __call__(self, step: int, cursor: Cursor) -> Work:
        """The steps of a rollout go through all of its answers once in each epoch, each time in another order."""
        config, mesh = self._setup.config, self._setup.mesh
        place = step % config.ppo.steps_per_rollout
        size = config.batch.tokens // config.batch.sequence_length
        total = size * config.ppo.minibatches
        if place == 0:
            dataset = self._setup.dataset
            samples = cursor.next_samples(total, len(dataset)).tolist()
            self._experience = self._make([dataset.prompt(sample) for sample in samples], step)
            cursor = cursor.advanced(total, len(dataset))
        if self._experience is None:
            raise ConfigError(
                f"ppo: the run's last checkpoint is that of step {step}, in the midst of a rollout of"
                f" {config.ppo.steps_per_rollout} steps; go on with the ppo.minibatches and ppo.epochs that it had"
            )
        epoch, minibatch = divmod(place, config.ppo.minibatches)
        chosen = np.arange(minibatch * size, (minibatch + 1) * size)
        answers = permute(chosen, total, (config.data.seed, step - place, epoch))
        own = deal(answers, micro_batch_size=config.batch.rows, rank=mesh.data_rank, num_ranks=mesh.layout.data)
        batches = [self._experience.answers.batch(places.tolist(), self._experience.known) for places in own]
        if mesh.layout.pipeline > 1:
            length = config.batch.sequence_length
            batches = [batch.padded(config.batch.rows * length, length) for batch in batches]
        return Work(batches=batches, cursor=cursor, measures=self._experience.measures)

    def _make(self, prompts: list[list[int]], step: int) -> Experience:
        policy, mesh, config = self._setup.trainee, self._setup.mesh, self._setup.config
        answers = Answers(self._rollout(language_model(policy, mesh, config.model.compute_dtype), prompts, step))
        log_probs_NA, values_NA = self._jury.of_tokens(
            policy, answers, lambda hidden, head, targets: [head.log_probs(hidden, targets), head.values(hidden)], 2
        )
        [reference_NA] = self._jury.of_tokens(
            self._reference, answers, lambda hidden, head, targets: [head.log_probs(hidden, targets)], 1
        )
        scores_N = self._jury.of_answers(self._reward_model, answers)
        return experience(answers, log_probs_NA, values_NA, reference_NA, scores_N, config.ppo)


def _build(checkpoint: Checkpoint, heads: Heads, setup: Setup) -> Trainee:
    objective = Reward() if heads is Heads.SCORE else NextToken()
    weights = stored_weights(checkpoint)
    return build_trainee(checkpoint.spec, weights, objective, setup.mesh, setup.config.model, heads=heads)
