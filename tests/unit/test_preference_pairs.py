"""The pairs of the alignment runs: each keeps and breaks its rule, and they become a data set."""

import argparse
import json
from pathlib import Path

import pytest

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.engine.llm import LLM
from rayllm.train.data.documents import preference_pair
from rayllm.train.data.rows import Kind, parse_row
from tests.preference_pairs import make_pairs, parse_rule


@pytest.mark.parametrize(
    ("rule", "keeps", "breaks"),
    [
        ("words:3", ["one", "one two  three\n"], ["", "  ", "one two three four"]),
        ("ends:!", ["Yes!", "Yes! \n"], ["", "Yes.", "! no"]),
    ],
)
def test_rules(rule, keeps, breaks):
    rule = parse_rule(rule)
    assert all(map(rule.holds, keeps))
    assert not any(map(rule.holds, breaks))


@pytest.mark.parametrize("text", ["words:0", "words:x", "ends:", "other:1", ""])
def test_rules_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither words:N nor ends:MARK"):
        parse_rule(text)


def test_pairs_of_a_model(tiny_model: Path):
    rule = parse_rule("words:2")
    questions = [f"the {n}" for n in range(12)]
    with LLM.from_config(EngineConfig(model=ModelConfig(model=str(tiny_model)))) as llm:
        made = [list(make_pairs(llm, questions, rule, samples=8, max_tokens=96, seed=3)) for _ in range(2)]
        assert made[0] == made[1]
        assert made[0]
        for pair in made[0]:
            assert rule.holds(pair["chosen"][0]["content"])
            assert not rule.holds(pair["rejected"][0]["content"])
            assert rule.instruction not in json.dumps(pair)
            tokens = preference_pair(llm.tokenizer, parse_row(pair, Kind.PREFERENCE))
            assert tokens.chosen[-1] in llm.tokenizer.eos_token_ids
