"""What training takes is what torch counts on the real decoder; peaks and shares."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rayllm.cli.train import Pace
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.models.families import spec_from_config
from rayllm.models.spec import DecoderSpec
from rayllm.train.config import LayoutConfig
from rayllm.train.flops import attended_pairs, multiplied_weights, training_flops
from rayllm.train.peak import measured_peak, published_peak
from rayllm.train.progress import Progress
from tests import train_ranks
from tests.ranks import Ranks
from tests.tiny_models import CASES, save_tiny, tiny_config
from tests.unit.test_train_step import OPTIMIZER, VOCAB, micro_batches

LENGTHS = (1, 7, 16, 3)
WITHOUT_WINDOW = [case for case in CASES if "window" not in case]


def counted(
    spec: DecoderSpec, lengths: tuple[int, ...], prefixes: tuple[int, ...] = (), predictions: int | None = None
) -> int:
    """By torch, over a forward and a backward pass; attention by products that it sees. `predictions` None: of all."""
    decoder = Decoder(spec)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    token_ids = torch.randint(0, spec.vocab_size, (sum(lengths),))
    context = DenseContext([0, *accumulate(lengths)], prefixes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_TD = decoder(token_ids, context.positions_T, context)
        decoder.logits(hidden_TD[:predictions]).sum().backward()
    return int(counter.get_total_flops())


def formula(spec: DecoderSpec, lengths: tuple[int, ...]) -> int:
    return training_flops(
        spec, sum(lengths), attended_pairs(spec, zip(lengths, lengths, strict=True)), predictions=sum(lengths)
    )


@pytest.mark.parametrize("case", WITHOUT_WINDOW)
def test_as_many_as_torch_counts(case: str) -> None:
    spec = spec_from_config(tiny_config(case))
    assert formula(spec, LENGTHS) == counted(spec, LENGTHS)
    assert formula(spec, (27,)) == counted(spec, (27,))
    assert formula(spec, (27,)) > formula(spec, LENGTHS), "documents do not see each other"


def test_keys_that_are_borrowed_count_for_those_who_borrow_them() -> None:
    spec = spec_from_config(tiny_config("llama-gqa"))
    pairs = attended_pairs(spec, [(1, 1), (7, 7), (16, 22), (3, 3)])
    assert training_flops(spec, sum(LENGTHS), pairs, predictions=20) == counted(spec, LENGTHS, (0, 0, 6, 0), 20)


@pytest.mark.parametrize("case", ["mistral-window", "qwen2-windows", "qwen3-windows"])
def test_a_window_takes_away_the_keys_it_hides(case: str) -> None:
    """Torch computes them all, and masks."""
    spec = spec_from_config(tiny_config(case))
    hidden = sum(
        sum(length * (length - window) for length in LENGTHS if length > window)
        for window in spec.windows
        if window is not None
    )
    assert hidden > 0
    assert counted(spec, LENGTHS) - formula(spec, LENGTHS) == 12 * spec.num_heads * spec.head_dim * hidden


def test_palm() -> None:
    """The paper's model of 8.63 billion parameters (table 1) by the paper's formula (appendix B)."""
    spec = spec_from_config(tiny_config("llama-mqa-tied"))
    spec = replace(
        spec, vocab_size=256_000, hidden_size=4096, num_heads=16, head_dim=256, num_kv_heads=1, ffn_size=16_384,
        gated_mlp=True, num_layers=32, windows=(None,) * 32,
    )  # fmt: skip
    weights = multiplied_weights(spec)
    assert weights == pytest.approx(8.63e9, rel=1e-3)
    one_row = training_flops(spec, 2048, attended_pairs(spec, [(2048, 2048)]), predictions=2048)
    assert one_row == 2048 * (6 * weights + 12 * 32 * 16 * 256 * 2048)


def test_a_reward_model_has_no_vocabulary_to_multiply_by() -> None:
    spec = spec_from_config(tiny_config("llama-gqa"))
    assert multiplied_weights(spec) - multiplied_weights(spec, vocabulary=False) == 101 * 48


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "layout", [LayoutConfig(), LayoutConfig(shard=2, tensor=2), LayoutConfig(replicate=2, pipeline=2)], ids=str
)
def test_a_step_counts_those_of_all_ranks_once(ranks: Ranks, layout: LayoutConfig, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", "qwen3-bias-tied", vocab_size=VOCAB, num_key_value_heads=2)
    batches = micro_batches(0)
    [trained, *_] = ranks.run(layout.world, train_ranks.train, tmp_path / "start", layout, OPTIMIZER, [batches], {})
    spec = spec_from_config(tiny_config("qwen3-bias-tied", vocab_size=VOCAB, num_key_value_heads=2))
    lengths = tuple(length for batch in batches for row in batch.document_lengths for length in row)
    targets = sum(batch.num_targets for batch in batches)
    assert 0 < targets < sum(lengths)
    assert trained.reports[0].flops == counted(spec, lengths, predictions=targets)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A10", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_published_peaks(name: str, tflops: int | None) -> None:
    assert published_peak(name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_peak_is_a_rate(dtype: torch.dtype) -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), dtype) < 1e15


def at(step: int, steps: int = 100) -> Progress:
    return Progress(
        step=step,
        steps=steps,
        loss=1.0,
        measures={},
        grad_norm=1.0,
        learning_rate=1.0,
        count=1,
        tokens_per_second=1.0,
        flops_per_second=1.0,
        mfu=None,
        matmul_share=0.5,
        seconds=8.0,
        memory_bytes=1,
        pid=1,
    )


def test_time_left_is_by_the_clock() -> None:
    pace = Pace()
    assert pace.seconds_left(at(1), now=1000.0) == 99 * 8
    assert pace.seconds_left(at(3), now=1005.0) == 97 * 2.5  # two steps in 5 s
    assert pace.seconds_left(at(11), now=1100.0) == 89 * 10  # a save between them
    assert pace.seconds_left(at(100), now=2000.0) == 0
    assert math.isclose(pace.seconds_left(at(1), now=2100.0), 99 * 8)  # begun again
