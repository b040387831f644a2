"""The recipes, by name."""

from collections.abc import Mapping

from rayllm.train import ppo
from rayllm.train.data.rows import Kind
from rayllm.train.objective import NextToken
from rayllm.train.policy import Policy
from rayllm.train.preference import Preference, check_pairs, dpo_loss, pair_feed, preference_feed
from rayllm.train.reward import Reward, check_start
from rayllm.train.trainee import Heads
from rayllm.train.trainer import Recipe

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="pretrain", kind=Kind.TEXT, objective=lambda config: NextToken()),
        Recipe(name="sft", kind=Kind.CHAT, objective=lambda config: NextToken()),
        Recipe(
            name="rm",
            kind=Kind.PREFERENCE,
            objective=lambda config: Reward(),
            heads=Heads.SCORE,
            check=check_start,
            feed=pair_feed,
        ),
        Recipe(
            name="dpo",
            kind=Kind.PREFERENCE,
            objective=lambda config: Preference(dpo_loss(config.dpo)),
            check=check_pairs,
            feed=preference_feed,
        ),
        Recipe(
            name="ppo",
            kind=Kind.PROMPT,
            objective=lambda config: Policy(config.ppo),
            heads=Heads.VOCABULARY_AND_VALUE,
            check=ppo.check,
            feed=ppo.feed,
        ),
    )
}
