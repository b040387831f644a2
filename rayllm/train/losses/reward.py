"""The loss of a reward model: of two answers the chosen one is to get the higher reward (Bradley and Terry 1952;
Ouyang et al. 2022, eq. 1)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_loss(chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor | None = None) -> Tensor:
    """-> [P]: -log sigmoid(chosen - rejected - margin), from rewards. `margins_P`: by how much they should differ,
    where that is known (Touvron et al. 2023, eq. 2)."""
    differences_P = chosen_P - rejected_P
    return -logsigmoid(differences_P if margins_P is None else differences_P - margins_P)
