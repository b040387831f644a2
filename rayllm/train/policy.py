"""The objective of a policy that learns from the rewards of its own answers, and of the value head beside it.

What was said of each token when it was drawn travels with the micro-batch. Letters: T tokens, D hidden, K measures.
"""

import torch
from torch import Tensor

from rayllm.train.batch import IGNORE, MicroBatch
from rayllm.train.config import PpoConfig
from rayllm.train.head import Head
from rayllm.train.losses.ppo import kl_estimates, policy_losses, value_losses
from rayllm.train.objective import Loss

# In `MicroBatch.token_values`; "old" is the policy that drew the answers.
OLD_LOG_PROB, OLD_VALUE, ADVANTAGE, RETURN = "old_log_prob", "old_value", "advantage", "return"


class Policy:
    """Clipped losses of policy and value. Measures, as means over the answers' tokens: both losses, the share of
    probabilities whose change was clipped, and KL(old || policy) as k3 estimates it."""

    measures = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")

    def __init__(self, config: PpoConfig) -> None:
        self._config = config

    def count(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        config, targets_T = self._config, batch.targets_T
        mask_T = targets_T != IGNORE
        names = (OLD_LOG_PROB, OLD_VALUE, ADVANTAGE, RETURN)
        old_T, old_values_T, advantages_T, returns_T = (batch.token_values[name].flatten() for name in names)
        log_probs_T = head.log_probs(hidden_TD, targets_T)
        policy = policy_losses(
            log_probs_T, old_T, advantages_T, mask_T, clip_low=config.clip_low, clip_high=config.clip_high
        )
        values_T = value_losses(head.values(hidden_TD), old_values_T, returns_T, mask_T, clip=config.value_clip)
        change_T = kl_estimates(old_T, log_probs_T.detach(), mask_T, "k3")
        measures = [policy.losses_BS.detach(), values_T.detach(), policy.clipped_BS, change_T]
        return Loss(
            total=(policy.losses_BS + config.value_coef * values_T).sum(),
            measures_K=torch.stack([measure.double().sum() for measure in measures]),
        )
