"""The order of prompts: complete, parents first, and nothing computed twice by a scheduler that takes them in turn."""

import random

import pytest

from rayllm.eval.prefix_order import prefix_order

BLOCK, BUDGET = 4, 32


def computed_tokens(prompts, order):
    """By a scheduler that fills steps of BUDGET tokens first come first served and caches full blocks after each."""
    cached: set[tuple[int, ...]] = set()
    total, waiting = 0, [prompts[i] for i in order]
    running: list[tuple[tuple[int, ...], int]] = []
    while waiting or running:
        room, step = BUDGET, []
        for prompt, done in running:
            take = min(room, len(prompt) - done)
            step.append((prompt, done + take))
            room -= take
        while waiting and room:
            prompt = waiting.pop(0)
            hits = 0
            while (hits + 1) * BLOCK < len(prompt) and prompt[: (hits + 1) * BLOCK] in cached:
                hits += 1
            take = min(room, len(prompt) - hits * BLOCK)
            total += len(prompt) - hits * BLOCK
            step.append((prompt, hits * BLOCK + take))
            room -= take
        for prompt, done in step:
            cached.update(prompt[:end] for end in range(BLOCK, done + 1, BLOCK))
        running = [(prompt, done) for prompt, done in step if done < len(prompt)]
    return total


def distinct_tokens(prompts):
    """What has to be computed at the least: each block of the trie once, and each prompt's own end."""
    blocks = {prompt[:end] for prompt in prompts for end in range(BLOCK, len(prompt), BLOCK)}
    return BLOCK * len(blocks) + sum((len(prompt) - 1) % BLOCK + 1 for prompt in prompts)


def questions(subjects, each, choices, seed=0):
    """Few-shot prompts: a long prefix for each subject, a question, and the beginnings of its choices."""
    draw = random.Random(seed)
    prompts = []
    for subject in range(subjects):
        prefix = [subject] * 3 + draw.choices(range(50), k=37)
        for _ in range(each):
            question = draw.choices(range(50), k=draw.randint(5, 20))
            for choice in range(choices):
                prompts.append(tuple(prefix + question + ([50 + choice] * choice)))
    draw.shuffle(prompts)
    return prompts


@pytest.mark.parametrize(("subjects", "each", "choices"), [(1, 30, 1), (5, 8, 1), (40, 2, 1), (3, 5, 4), (1, 1, 6)])
def test_shared_prefixes_are_computed_once(subjects, each, choices):
    prompts = questions(subjects, each, choices)
    order = prefix_order(prompts, block_size=BLOCK, budget=BUDGET)
    assert sorted(order) == list(range(len(prompts)))
    least = distinct_tokens(prompts)
    as_sorted = computed_tokens(prompts, sorted(range(len(prompts)), key=lambda i: prompts[i]))
    got = computed_tokens(prompts, order)
    assert got <= as_sorted
    if subjects > 1 and choices == 1:
        assert got == least
    assert got <= 1.35 * least


def test_nothing_in_common_and_nothing_at_all():
    prompts = [(i, i + 1, i + 2) for i in range(9)]
    assert sorted(prefix_order(prompts, block_size=BLOCK, budget=BUDGET)) == list(range(9))
    assert prefix_order([], block_size=BLOCK, budget=BUDGET) == []


def test_a_prompt_that_is_the_beginning_of_another_and_twice_the_same():
    prompts = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8)]
    assert sorted(prefix_order(prompts, block_size=BLOCK, budget=BUDGET)) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_prompts(seed):
    draw = random.Random(seed)
    prompts = [tuple(draw.choices((1, 2), k=draw.randint(1, 25))) for _ in range(60)]
    order = prefix_order(prompts, block_size=BLOCK, budget=BUDGET)
    assert sorted(order) == list(range(60))
    assert computed_tokens(prompts, order) <= 1.5 * distinct_tokens(prompts)
