"""The attention of the engine's mixed steps when Triton serves both parts of it."""

import sys

import pytest
import torch

from tests.mixed_step import check_mixed_step

# numpy says what a GPU does silently with rows that nobody owns, whose results are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("prompts", "window"), [(4, None), (2, 7), (1, None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_of_a_mixed_step(
    dtype: torch.dtype, prompts: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def on_triton(op: str, _x: torch.Tensor) -> bool:
        asked.add(op)
        return True

    for name in ("flash_attention", "paged_attention", "store_kv", "rotary", "rotary_store_kv"):
        monkeypatch.setattr(sys.modules[f"rayllm_kernels.{name}"], "on_triton", on_triton)
    check_mixed_step(dtype, window, prompts)
    assert asked >= {"flash_attention", "paged_attention", "store_kv"}
