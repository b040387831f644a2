"""Prompts attend to their own keys and values, the rest of a step over pages: against transformers and in float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayllm.engine import paged_context
from rayllm.scheduler.batch import PositionLogprobs
from rayllm_kernels.dispatch import shortest_flash_prompt
from tests.mixed_step import check_mixed_step
from tests.ranks import Ranks
from tests.served_steps import Step, run_steps
from tests.tiny_models import save_tiny

LENGTHS = [30, 29, 17, 25, 5, 1]
# Alone; beside a decode; beside a decode and a chunk of a longer prompt. 16 tokens and fewer attend over pages on CPU.
STEPS: list[Step] = [
    [(0, 0, 27)],
    [(0, 27, 1), (1, 0, 18)],
    [(0, 28, 1), (1, 18, 11), (5, 0, 1), (4, 0, 5), (2, 0, 17), (3, 0, 25)],
    [(0, 29, 1)],
]
LAYOUTS = {"llama-biases": [(3, 1), (3, 2)], "llama-dynamic": [(3, 2)], "qwen2-windows": [(3, 1), (1, 3)]}


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, 101, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(6)
    yield ranks
    ranks.close()


@torch.no_grad()
def check(scores: dict[int, list[PositionLogprobs]], model: PreTrainedModel, sequences: list[list[int]]) -> None:
    for sequence, tokens in enumerate(sequences):
        model(torch.tensor([[0]]))  # it keeps the dynamic angles of a longer sequence until a short one comes
        reference = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        expected = [reference[i - 1, tokens[i]].item() for i in range(1, len(tokens))]
        assert [score.logprob for score in scores[sequence]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "case", ["llama-gqa", "llama-mqa-tied", "llama-dynamic", "mistral-window", "qwen3-windows", "gpt2-tied"]
)
def test_mixed_steps_give_transformers_logits(
    case: str, sequences: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, attend = [], paged_context.flash_attention

    def counted(q: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(len(q))
        return attend(q, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(paged_context, "flash_attention", counted)
    model = save_tiny(tmp_path, case)
    check(run_steps(tmp_path, 1, 1, sequences, STEPS), model, sequences)
    assert seen == [27] * 3 + [18] * 3 + [17 + 25] * 3, "of three layers"
    seen.clear()
    run_steps(tmp_path, 1, 1, sequences, STEPS, cache_dtype="int8")
    assert seen == [], "what later steps see is what int8 holds"


@pytest.mark.parametrize("case", LAYOUTS)
def test_mixed_steps_on_several_ranks(ranks: Ranks, case: str, sequences: list[list[int]], tmp_path: Path) -> None:
    model = save_tiny(tmp_path, case)
    for tp, pp in LAYOUTS[case]:
        reports = ranks.run(tp * pp, run_steps, tmp_path, tp, pp, sequences, STEPS)
        check(reports[(pp - 1) * tp], model, sequences)


def test_who_serves_a_prompt() -> None:
    float32, bfloat16, float16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
    assert [shortest_flash_prompt("cpu", dtype, dtype) for dtype in (float32, bfloat16)] == [17, 17]
    assert [shortest_flash_prompt("cuda", dtype, dtype) for dtype in (float32, bfloat16, float16)] == [None, 2, 2]
    assert shortest_flash_prompt("cpu", float16, float32) is None
    assert shortest_flash_prompt("cuda", bfloat16, int8) is None


@pytest.mark.parametrize("prompts", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_mixed_step(dtype: torch.dtype, window: int | None, prompts: int) -> None:
    check_mixed_step(dtype, window, prompts)
