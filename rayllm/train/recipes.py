"""The recipes, by name."""

from collections.abc import Mapping

from rayllm.train.data.rows import Kind
from rayllm.train.objective import NextToken
from rayllm.train.preference import Preference, check_pairs, dpo_loss, prepare_pairs
from rayllm.train.trainer import Recipe

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="pretrain", kind=Kind.TEXT, objective=lambda config: NextToken()),
        Recipe(name="sft", kind=Kind.CHAT, objective=lambda config: NextToken()),
        Recipe(
            name="dpo",
            kind=Kind.PREFERENCE,
            objective=lambda config: Preference(dpo_loss(config.dpo)),
            check=check_pairs,
            prepare=prepare_pairs,
        ),
    )
}
