"""The recipes that minimise cross-entropy, by name."""

from collections.abc import Mapping

from rayllm.train.data.rows import Kind
from rayllm.train.objective import NextToken
from rayllm.train.trainer import Recipe

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="pretrain", kind=Kind.TEXT, objective=NextToken()),
        Recipe(name="sft", kind=Kind.CHAT, objective=NextToken()),
    )
}
