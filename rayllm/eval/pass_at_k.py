"""pass@k of Chen et al. 2021 (Evaluating large language models trained on code): its unbiased estimate."""

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of `k` samples is right, drawn without replacement from `n` of which `c` are.

    1 - C(n - c, k) / C(n, k), as a product, whose factors do not overflow. ValueError unless 0 <= c <= n and
    1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n} samples is not defined")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
