"""The losses of alignment against their formulas, restated one number at a time in float64.

trl is no dependency of the tests: its losses are statements inside a trainer, which cannot be called without one. The
formulas below are those of trl 1.16 (`trl/trainer/dpo_trainer.py`, `trl/trainer/reward_trainer.py`,
`trl/experimental/cpo/cpo_trainer.py`), of Mitchell's direct-preference-optimization (`trainers.py`: cDPO, IPO of sums),
and of the papers that the code names.
"""

import math

import pytest
import torch

from rayllm.core.errors import ConfigError
from rayllm.train.batch import MicroBatch
from rayllm.train.losses.dpo import DpoLoss, DpoVariant
from rayllm.train.losses.pairs import PairLogps, pair_logps, reference_logps
from rayllm.train.losses.ppo import (
    advantages_and_returns,
    kl_estimates,
    moments,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)
from rayllm.train.losses.reward import pairwise_loss

P = 64


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def pairs(seed: int, dtype=torch.float64) -> PairLogps:
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 60, (P,), generator=torch.Generator().manual_seed(place)) for place in (1, 2)]
    chosen, rejected = ((-torch.rand(P, generator=g, dtype=torch.float64) * 2 * n).to(dtype) for n in tokens)
    return PairLogps(chosen_P=chosen, rejected_P=rejected, chosen_tokens_P=tokens[0], rejected_tokens_P=tokens[1])


def restated(loss: DpoLoss, c, r, ref_c, ref_r, len_c, len_r) -> float:
    b, e = loss.beta, loss.label_smoothing
    h = (c - ref_c) - (r - ref_r)
    match loss.variant:
        case DpoVariant.SIGMOID:
            return -(1 - e) * log_s(b * h) - e * log_s(-b * h)
        case DpoVariant.ROBUST:
            return (-(1 - e) * log_s(b * h) + e * log_s(-b * h)) / (1 - 2 * e)
        case DpoVariant.HINGE:
            return max(0.0, 1 - b * h)
        case DpoVariant.IPO_SUM:
            return (h - 1 / (2 * b)) ** 2
        case DpoVariant.IPO_MEAN:
            return ((c - ref_c) / len_c - (r - ref_r) / len_r - 1 / (2 * b)) ** 2
        case DpoVariant.SIMPO:
            return -log_s(b * (c / len_c - r / len_r) - loss.gamma)


LOSSES = [
    DpoLoss(),
    DpoLoss(beta=0.5, label_smoothing=0.2),
    DpoLoss(variant=DpoVariant.ROBUST, label_smoothing=0.1),
    DpoLoss(variant=DpoVariant.HINGE, beta=0.05),
    DpoLoss(variant=DpoVariant.IPO_SUM, beta=0.3),
    DpoLoss(variant=DpoVariant.IPO_MEAN, beta=0.3),
    DpoLoss(variant=DpoVariant.SIMPO, beta=2.0, gamma=0.7),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.variant.value}-{loss.label_smoothing}")
class TestDpo:
    def test_is_its_formula(self, loss):
        policy, reference = pairs(0), pairs(1)
        found = loss(policy, reference if loss.needs_reference else None)
        columns = (
            *(policy.chosen_P, policy.rejected_P, reference.chosen_P, reference.rejected_P),
            *(policy.chosen_tokens_P, policy.rejected_tokens_P),
        )
        expected = [restated(loss, *(float(column[i]) for column in columns)) for i in range(P)]
        torch.testing.assert_close(found.losses_P, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_its_gradient_is_that_of_the_formula(self, loss):
        """Central differences in the chosen answer's log-probability."""
        policy, reference = pairs(0), pairs(1)
        policy.chosen_P.requires_grad_()
        loss(policy, reference).losses_P.sum().backward()
        step, chosen_P = 1e-5, policy.chosen_P.detach()
        for i in range(0, P, 7):
            values = [
                restated(
                    loss,
                    float(chosen_P[i]) + sign * step,
                    *(float(x[i]) for x in (policy.rejected_P, reference.chosen_P, reference.rejected_P)),
                    *(float(x[i]) for x in (policy.chosen_tokens_P, policy.rejected_tokens_P)),
                )
                for sign in (1, -1)
            ]
            slope = (values[0] - values[1]) / (2 * step)
            assert float(policy.chosen_P.grad[i]) == pytest.approx(slope, rel=1e-4, abs=1e-7)

    def test_before_the_first_step(self, loss):
        """Policy and reference are one: no margin, a loss that is known."""
        policy = pairs(0, torch.float32)
        found = loss(policy, policy)
        if loss.needs_reference:
            assert torch.equal(found.margins_P, torch.zeros(P))
            at_zero = restated(loss, 0, 0, 0, 0, 1, 1)
            torch.testing.assert_close(found.losses_P, torch.full((P,), at_zero), rtol=1e-6, atol=0)
        if loss.variant in (DpoVariant.SIGMOID, DpoVariant.ROBUST):
            assert float(found.losses_P[0]) == pytest.approx(math.log(2), abs=1e-6)


def test_rewards_are_beta_times_the_log_ratio_and_have_no_gradient():
    policy, reference = pairs(0), pairs(1)
    policy.chosen_P.requires_grad_()
    found = DpoLoss(beta=0.2)(policy, reference)
    torch.testing.assert_close(found.chosen_rewards_P, 0.2 * (policy.chosen_P.detach() - reference.chosen_P))
    assert not found.chosen_rewards_P.requires_grad
    assert torch.equal(found.correct_P, found.chosen_rewards_P > found.rejected_rewards_P)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"beta": 0.0}, "beta: must be above 0"),
        ({"beta": math.nan}, "beta: must be above 0"),
        ({"beta": math.inf}, "beta: must be above 0 and finite, not inf"),
        ({"gamma": math.nan, "variant": DpoVariant.SIMPO}, "gamma: must be finite, not nan"),
        ({"label_smoothing": 0.5}, "label_smoothing: must be"),
        ({"label_smoothing": 0.1, "variant": DpoVariant.HINGE}, "is for sigmoid and robust, not for hinge"),
        ({"gamma": 0.1}, "gamma: is for simpo, not for sigmoid"),
    ],
)
def test_settings_that_do_not_go_together(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        DpoLoss(**settings)


class TestPairLogps:
    def batch(self) -> MicroBatch:
        """Two rows: a pair and padding of two documents; a pair."""
        mask = [[0, 0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1, 1, 1]]
        return MicroBatch(
            token_ids=torch.arange(16).reshape(2, 8),
            loss_mask=torch.tensor(mask, dtype=torch.bool),
            document_lengths=((4, 2, 1, 1), (2, 6)),
            sample_ids=(0, 1),
        )

    def test_sums_over_answers_without_padding(self):
        batch = self.batch()
        log_probs_T = torch.where(batch.targets_T >= 0, -batch.targets_T.double(), 0.0)
        found = pair_logps(log_probs_T, batch)
        assert found.chosen_P.tolist() == [-(2 + 3), -9]
        assert found.rejected_P.tolist() == [-5, -(13 + 14 + 15)]
        assert found.chosen_tokens_P.tolist() == [2, 1]
        assert found.rejected_tokens_P.tolist() == [1, 3]
        stored = reference_logps(torch.tensor([1.0, 2, 0, 0, 3, 4]), found, batch)
        assert stored.chosen_P.tolist() == [1, 3]
        assert stored.rejected_P.tolist() == [2, 4]


def test_pairwise_reward_loss():
    g = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (torch.randn(P, generator=g, dtype=torch.float64) * 3 for _ in range(3))
    plain = [-log_s(float(c - r)) for c, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(pairwise_loss(chosen, rejected).tolist(), plain, rtol=1e-12, atol=1e-12)
    with_margin = [-log_s(float(c - r - m)) for c, r, m in zip(chosen, rejected, margins, strict=True)]
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margins).tolist(), with_margin, rtol=1e-12, atol=1e-12)


B, S = 7, 13
LENGTHS = [13, 1, 5, 12, 2, 13, 8]


class TestPpo:
    @pytest.fixture
    def data(self):
        g = torch.Generator().manual_seed(0)

        def draw() -> torch.Tensor:
            x = torch.randn(B, S, generator=g, dtype=torch.float64)
            return x.masked_fill(~self.mask(), 1e30)  # what pads must not be looked at

        return [draw() for _ in range(4)]

    @staticmethod
    def mask() -> torch.Tensor:
        return torch.arange(S)[None] < torch.tensor(LENGTHS)[:, None]

    @staticmethod
    def each(function) -> torch.Tensor:
        """`function(b, t)` at every real token, 0 elsewhere."""
        values = torch.zeros(B, S, dtype=torch.float64)
        for b, length in enumerate(LENGTHS):
            for t in range(length):
                values[b, t] = function(b, t)
        return values

    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
    def test_advantages(self, data, gamma, lam):
        """The definition: A_t is the sum over l of (gamma lam)^l delta_t+l."""
        rewards, values, mask = data[0], data[1], self.mask()

        def delta(b, t):
            following = float(values[b, t + 1]) if t + 1 < LENGTHS[b] else 0.0
            return float(rewards[b, t]) + gamma * following - float(values[b, t])

        def advantage(b, t):
            return math.fsum((gamma * lam) ** k * delta(b, t + k) for k in range(LENGTHS[b] - t))

        advantages, returns = advantages_and_returns(rewards, values, mask, gamma=gamma, lam=lam)
        torch.testing.assert_close(advantages, self.each(advantage), rtol=1e-12, atol=1e-12)
        expected = self.each(lambda b, t: advantage(b, t) + float(values[b, t]))
        torch.testing.assert_close(returns, expected, rtol=1e-12, atol=1e-12)
        single = advantages_and_returns(rewards.float(), values.float(), mask, gamma=gamma, lam=lam)[0]
        torch.testing.assert_close(single.double(), advantages, rtol=1e-5, atol=1e-5)

    def test_kl_and_rewards(self, data):
        policy, reference, mask = data[0], data[1], self.mask()
        k1 = kl_estimates(policy, reference, mask, "k1")
        torch.testing.assert_close(k1, self.each(lambda b, t: policy[b, t] - reference[b, t]))
        k3 = kl_estimates(policy, reference, mask, "k3")
        expected = self.each(
            lambda b, t: math.exp(reference[b, t] - policy[b, t]) - 1 - (reference[b, t] - policy[b, t])
        )
        torch.testing.assert_close(k3, expected, rtol=1e-12, atol=1e-12)
        assert (k3 >= 0).all()
        scores = torch.arange(1.0, B + 1, dtype=torch.float64)
        rewards = token_rewards(k1, scores, mask, kl_coef=0.3)
        expected = self.each(lambda b, t: -0.3 * k1[b, t] + (scores[b] if t == LENGTHS[b] - 1 else 0.0))
        torch.testing.assert_close(rewards, expected)

    def test_both_estimators_estimate_the_kl(self):
        """In expectation over what the policy draws, which is summed here and not drawn."""
        g = torch.Generator().manual_seed(0)
        policy, reference = torch.randn(2, 1, 50, generator=g, dtype=torch.float64).log_softmax(-1)
        exact = float((policy.exp() * (policy - reference)).sum())
        for estimator in ("k1", "k3"):
            estimates = kl_estimates(policy, reference, torch.ones(1, 50, dtype=torch.bool), estimator)
            assert float((policy.exp() * estimates).sum()) == pytest.approx(exact, rel=1e-10)

    def test_policy_losses(self, data):
        new, old, advantages, mask = data[0] * 0.2, data[1] * 0.2, data[2], self.mask()
        found = policy_losses(new, old, advantages, mask, clip_low=0.2, clip_high=0.28)

        def loss(b, t):
            ratio, a = math.exp(new[b, t] - old[b, t]), float(advantages[b, t])
            return -min(ratio * a, min(max(ratio, 0.8), 1.28) * a)

        def is_clipped(b, t):
            ratio, a = math.exp(new[b, t] - old[b, t]), float(advantages[b, t])
            return (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)

        torch.testing.assert_close(found.losses_BS, self.each(loss), rtol=1e-12, atol=1e-12)
        assert torch.equal(found.clipped_BS.double(), self.each(is_clipped))
        assert 0 < int(found.clipped_BS.sum()) < int(mask.sum())
        ratios = self.each(lambda b, t: math.exp(new[b, t] - old[b, t]))
        torch.testing.assert_close(found.ratios_BS.masked_fill(~mask, 0), ratios, rtol=1e-12, atol=1e-12)

    def test_a_policy_that_has_not_moved_has_the_policy_gradient(self, data):
        """Ratio 1: the gradient by each log-probability is minus the advantage."""
        new = data[0].masked_fill(~self.mask(), 0).requires_grad_()
        losses = policy_losses(new, new.detach(), data[2], self.mask(), clip_low=0.2, clip_high=0.2)
        losses.losses_BS.sum().backward()
        torch.testing.assert_close(new.grad, -data[2].masked_fill(~self.mask(), 0))
        assert not losses.clipped_BS.any()

    def test_value_losses(self, data):
        new, old, returns, mask = data[0], data[1], data[2], self.mask()

        def loss(b, t):
            v, o, r = float(new[b, t]), float(old[b, t]), float(returns[b, t])
            return 0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)

        torch.testing.assert_close(
            value_losses(new, old, returns, mask, clip=0.2), self.each(loss), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("shift_mean", [True, False])
    def test_whitening_over_ranks(self, data, shift_mean):
        """As if all answers lay on one rank; against numpy's mean and variance of the real tokens."""
        values, mask = data[0] * 3 + 5, self.mask()
        parts = [slice(0, 3), slice(3, B)]
        total = sum(moments(values[part], mask[part]) for part in parts)
        found = torch.cat([whiten(values[part], mask[part], total, shift_mean=shift_mean) for part in parts])
        kept = values[mask].numpy()
        expected = (kept - kept.mean()) / math.sqrt(kept.var() + 1e-8) + (0 if shift_mean else kept.mean())
        torch.testing.assert_close(found[mask], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
        assert not found[~mask].any()
