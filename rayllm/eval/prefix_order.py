"""In which order prompts that share prefixes should be computed, so that none is computed twice.

Where two prompts share a prefix the second finds it in the prefix cache, but only once the first is computed: handed
over side by side, both would compute it in the same step. So each prompt is held back until the one that brings its
prefix has had its step, and others go before it meanwhile.

Knows nothing of the scheduler but that it takes prompts first come first served, `budget` tokens a step.
"""

import heapq
from collections.abc import Sequence


def prefix_order(prompts: Sequence[tuple[int, ...]], *, block_size: int, budget: int) -> list[int]:
    """The indices of `prompts`, each once. Prompts with a common prefix stay as close together as that allows, for
    the cache is finite."""
    ordered = sorted(range(len(prompts)), key=lambda index: prompts[index])
    parents, shared = _first_sharers([prompts[index] for index in ordered], block_size)
    children: dict[int, list[int]] = {}
    for position, parent in enumerate(parents):
        children.setdefault(parent, []).append(position)
    ready = list(children.get(-1, ()))
    heapq.heapify(ready)
    started: list[tuple[int, int]] = []  # (tokens until its prompt is computed, position)
    result: list[int] = []
    now = 0
    while ready or started:
        # What is done when this step begins makes its children ready.
        while started and (started[0][0] <= now // budget * budget or not ready):
            done, position = heapq.heappop(started)
            now = max(now, -(-done // budget) * budget)
            for child in children.get(position, ()):
                heapq.heappush(ready, child)
        if not ready:
            continue
        position = heapq.heappop(ready)
        result.append(ordered[position])
        now += len(prompts[ordered[position]]) - shared[position]
        heapq.heappush(started, (now, position))
    return result


def _first_sharers(ordered: Sequence[tuple[int, ...]], block_size: int) -> tuple[list[int], list[int]]:
    """For each of the sorted prompts, the first one that shares as many full blocks with it as any before it does (-1:
    none shares a block), and how many tokens those are."""
    parents: list[int] = []
    shared: list[int] = []
    groups: list[tuple[int, int]] = []  # a stack of (tokens, position): prefixes of the last prompt, who brought them
    for position, prompt in enumerate(ordered):
        common = _common_prefix(ordered[position - 1], prompt) // block_size * block_size if position else 0
        bringer = position - 1
        while groups and groups[-1][0] >= common:
            bringer = groups.pop()[1]
        if common:
            groups.append((common, bringer))
        parents.append(bringer if common else -1)
        shared.append(common)
    return parents, shared


def _common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    length = min(len(left), len(right))
    low, high = 0, length  # left[:low] equals right[:low]
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
