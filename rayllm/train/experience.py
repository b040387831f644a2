"""A rollout as it is learnt from: answers, what policy, reference and reward model say of them, and what follows.

The same on every rank. Letters: N answers, A tokens of the longest answer, T tokens of a micro-batch, K numbers of a
token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.train.batch import IGNORE, MicroBatch
from rayllm.train.config import PpoConfig
from rayllm.train.data.cursor import deal
from rayllm.train.head import Head
from rayllm.train.losses.ppo import advantages_and_returns, kl_estimates, moments, token_rewards, whiten
from rayllm.train.mesh import TrainMesh
from rayllm.train.policy import ADVANTAGE, OLD_LOG_PROB, OLD_VALUE, RETURN
from rayllm.train.probe import Look, probe
from rayllm.train.rollout import Answer
from rayllm.train.trainee import Trainee

# Hidden states [T, D], the head behind them and the targets [T] -> K tensors [T].
Read = Callable[[Tensor, Head, Tensor], list[Tensor]]


class Answers:
    """`mask_NA`: which places are tokens of an answer. What is known of them has their shape, float64, 0 elsewhere."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self.lengths_N = torch.tensor([len(answer.tokens) for answer in answers])
        self.mask_NA = torch.arange(int(self.lengths_N.max())) < self.lengths_N[:, None]
        self.finished_N = torch.tensor([answer.finished for answer in answers])

    @property
    def engine_log_probs_NA(self) -> Tensor:
        log_probs = [one for answer in self._answers for one in answer.log_probs]
        return torch.zeros(self.mask_NA.shape, dtype=torch.float64).masked_scatter(
            self.mask_NA, torch.tensor(log_probs, dtype=torch.float64)
        )

    def batch(self, places: Sequence[int], known: Mapping[str, Tensor]) -> MicroBatch:
        """Those answers, each with its prompt, one after another in one row, and what is `known` of their tokens as
        float32."""
        chosen = [self._answers[place] for place in places]
        ids = torch.tensor([token for answer in chosen for token in (*answer.prompt, *answer.tokens)])
        mask = torch.cat([torch.arange(len(a.prompt) + len(a.tokens)) >= len(a.prompt) for a in chosen])
        predicts = mask.roll(-1)  # the first token of a row is a prompt's
        mine_NA = self.mask_NA[list(places)]
        return MicroBatch(
            token_ids=ids[None],
            loss_mask=mask[None],
            document_lengths=(tuple(len(answer.prompt) + len(answer.tokens) for answer in chosen),),
            sample_ids=tuple(places),
            token_values={
                name: torch.zeros(1, len(ids)).masked_scatter(predicts, values_NA[list(places)][mine_NA].float())
                for name, values_NA in known.items()
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Jury:
    """Asks models that are built for training about answers, each rank about its own. `rows`: at a time."""

    mesh: TrainMesh
    rows: int

    def of_tokens(self, model: Trainee, answers: Answers, read: Read, kinds: int) -> Tensor:
        """-> [K, N, A] float64 of what `read` gives of all tokens, which are so many `kinds` of numbers."""
        mask_NA = answers.mask_NA.to(self.mesh.device)
        said_KNA = torch.zeros(kinds, *mask_NA.shape, dtype=torch.float64, device=self.mesh.device)

        def look(batch: MicroBatch, hidden_TD: Tensor, head: Head) -> None:
            targets_T, places = batch.targets_T, list(batch.sample_ids)
            said_KT = torch.stack(read(hidden_TD, head, targets_T)).detach().double()
            mine_KNA = mask_NA[places].expand(kinds, -1, -1)
            said_KNA[:, places] = said_KNA[:, places].masked_scatter(mine_KNA, said_KT[:, targets_T != IGNORE])

        return self._ask(model, answers, look, said_KNA)

    def of_answers(self, reward_model: Trainee, answers: Answers) -> Tensor:
        """-> [N] float64: the score of each answer's last token."""
        scores_N = torch.zeros(len(answers.mask_NA), dtype=torch.float64, device=self.mesh.device)

        def look(batch: MicroBatch, hidden_TD: Tensor, head: Head) -> None:
            last_N = torch.tensor(batch.cu_seqlens[1:], device=hidden_TD.device) - 1
            scores_N[list(batch.sample_ids)] = head.scores(hidden_TD[last_N]).detach().double()

        return self._ask(reward_model, answers, look, scores_N)

    def _ask(self, model: Trainee, answers: Answers, look: Look, found: Tensor) -> Tensor:
        """-> what all ranks have `found`, on each of them; only last stages look."""
        dealt = deal(
            np.arange(len(answers.mask_NA)),
            micro_batch_size=self.rows,
            rank=self.mesh.data_rank,
            num_ranks=self.mesh.layout.data,
        )
        probe(model, self.mesh, (answers.batch(places.tolist(), {}) for places in dealt), look)
        return self.mesh.sum(found, "shard", "replicate", "pipeline").cpu()


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """`known` of each token: what `rayllm.train.policy` learns from. `measures`: of the rollout."""

    answers: Answers
    known: Mapping[str, Tensor]
    measures: Mapping[str, float]


def experience(
    answers: Answers,
    log_probs_NA: Tensor,
    values_NA: Tensor,
    reference_NA: Tensor,
    scores_N: Tensor,
    config: PpoConfig,
) -> Experience:
    """Advantages are whitened over all tokens of the rollout.

    Measures: the mean `reward` of an answer (its score, less what is taken off for no end); its `kl` from the reference
    in nats; the `entropy` of the policy at a token as its own answers show it; how long answers are, and the share that
    has an end; and by how much the engine that drew them differs from the policy as it is trained: of a token's
    log-probability, at most and in the mean, and KL(engine || training) as k3 estimates it.
    """
    mask_NA = answers.mask_NA
    rewards_N = scores_N - config.unfinished_penalty * ~answers.finished_N
    kl_NA = kl_estimates(log_probs_NA, reference_NA, mask_NA, config.kl_estimator)
    token_rewards_NA = token_rewards(kl_NA, rewards_N, mask_NA, kl_coef=config.kl_coef)
    advantages_NA, returns_NA = advantages_and_returns(
        token_rewards_NA, values_NA, mask_NA, gamma=config.gamma, lam=config.lam
    )
    engine_NA = answers.engine_log_probs_NA
    tokens = int(mask_NA.sum())
    return Experience(
        answers=answers,
        known={
            OLD_LOG_PROB: log_probs_NA,
            OLD_VALUE: values_NA,
            ADVANTAGE: whiten(advantages_NA, mask_NA, moments(advantages_NA, mask_NA)),
            RETURN: returns_NA,
        },
        measures={
            "reward": float(rewards_N.mean()),
            "kl": float(kl_NA.sum(1).mean()),
            "entropy": -float(log_probs_NA.sum()) / tokens,
            "answer_tokens": float(answers.lengths_N.double().mean()),
            "finished": float(answers.finished_N.double().mean()),
            "gap_max_abs_diff": float((engine_NA - log_probs_NA).abs().max()),
            "gap_mean_abs_diff": float((engine_NA - log_probs_NA).abs().sum()) / tokens,
            "gap_kl": float(kl_estimates(engine_NA, log_probs_NA, mask_NA, "k3").sum()) / tokens,
        },
    )
