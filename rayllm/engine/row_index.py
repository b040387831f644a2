"""Some rows of a batch as an index for its tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

RowIndex = Tensor | slice


def row_index(rows: Sequence[int], device: torch.device) -> RowIndex:
    """`rows` ascend and are distinct. Neighbours become a slice, which gives a view where a tensor gives a copy."""
    if not rows:
        return slice(0, 0)
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
