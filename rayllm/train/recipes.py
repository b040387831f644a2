"""The recipes, by name."""

from collections.abc import Mapping

from rayllm.train.data.rows import Kind
from rayllm.train.objective import NextToken
from rayllm.train.preference import Preference, check_pairs, dpo_loss, prepare_pairs, shape_pairs
from rayllm.train.reward import Reward, check_start
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
            scores=True,
            check=check_start,
            prepare=lambda config, directory, dataset, trainee, mesh: shape_pairs(config, mesh),
        ),
        Recipe(
            name="dpo",
            kind=Kind.PREFERENCE,
            objective=lambda config: Preference(dpo_loss(config.dpo)),
            check=check_pairs,
            prepare=prepare_pairs,
        ),
    )
}
