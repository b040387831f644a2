"""What `rayllm quantize` writes loads in transformers with compressed-tensors, and answers the same there."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.quantization import OUTLIERS, OWN_FORMAT, Scheme
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.quant.calibrate import calibrate
from rayllm.quant.convert import Outliers, Recipe, convert
from tests.tiny_models import save_tiny, save_with_outliers

IDS = torch.randint(0, 101, (20,), generator=torch.Generator().manual_seed(4))
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("case", ["llama-biases", "llama-mqa-tied"])
@pytest.mark.parametrize(
    ("scheme", "outliers", "skip"),
    [
        ("w8a16", "none", ()),
        ("w8a16", "smooth", ("lm_head",)),
        ("w8a8", "none", ()),
        ("w8a8", "none", ("lm_head", "down_proj")),
        ("w8a8", "mixed", ()),
    ],
)
@torch.inference_mode()
def test_transformers_reads_it(
    case: str, scheme: Scheme, outliers: Outliers, skip: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    save_tiny(tmp_path / "model", case)
    out = tmp_path / "out"
    out.mkdir()
    exact_model = load_shard(Checkpoint.open(tmp_path / "model"), Mesh.single(), dtype=torch.float32, device=CPU)
    statistics = calibrate(exact_model, [IDS]) if outliers != "none" else None
    recipe = Recipe(scheme=scheme, outliers=outliers, skip=skip)
    convert(Checkpoint.open(tmp_path / "model"), out, recipe, statistics=statistics, calibration_tokens=20)
    ours = load_shard(Checkpoint.open(out), Mesh.single(), dtype=torch.float32, device=CPU)
    logits = ours.logits(ours(IDS, torch.arange(20), DenseContext([0, 20])))
    exact = exact_model.logits(exact_model(IDS, torch.arange(20), DenseContext([0, 20])))
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32).eval()
    their_logits = theirs(IDS[None]).logits[0]
    loss = float((logits - exact).norm() / exact.norm())
    difference = float((their_logits - logits).norm() / exact.norm())
    # They widen the weights and take activations as they are: the same but for float32's last bits under W8A16, and
    # what int8 activations alone lose under W8A8. With weights of another layer, `difference` would be near 1.
    assert difference < (1e-5 if scheme == "w8a16" else min(1.25 * loss, 0.035))


@pytest.fixture
def mixed(tmp_path: Path) -> Callable[..., Path]:
    """Makes the model with these factors of `save_with_outliers` at tmp_path / "model", and its int8."""

    def make(*factors: float) -> Path:
        save_with_outliers(tmp_path / "model", factors)
        model = load_shard(Checkpoint.open(tmp_path / "model"), Mesh.single(), dtype=torch.float32, device=CPU)
        statistics = calibrate(model, [IDS])
        for outliers in get_args(Outliers):
            (tmp_path / outliers).mkdir()
            recipe = Recipe(scheme="w8a8", outliers=outliers)
            convert(Checkpoint.open(tmp_path / "model"), tmp_path / outliers, recipe, statistics=statistics)
        return tmp_path

    return make


@torch.inference_mode()
def in_transformers(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    return model.eval()(IDS[None]).logits[0]  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("default")  # theirs
def test_columns_kept_in_16_bits_are_in_int8_for_others(mixed: Callable[..., Path]) -> None:
    """Inputs have outliers: who does not know of the kept columns has the checkpoint that `none` had been."""
    pytest.importorskip("compressed_tensors")
    folder = mixed(100.0, 100.0, 100.0)
    assert len(load_file(folder / "mixed" / OUTLIERS)) >= 2 * 3 * 5
    exact = in_transformers(folder / "model")
    assert (in_transformers(folder / "mixed") - exact).norm() < 1.05 * (in_transformers(folder / "none") - exact).norm()


@pytest.mark.filterwarnings("default")  # theirs
def test_columns_that_int8_cannot_hold_are_not_read_by_others(mixed: Callable[..., Path]) -> None:
    """Weights have outliers: without the kept columns the model would be another."""
    pytest.importorskip("compressed_tensors")
    folder = mixed(100.0, 0.01, 100.0)
    with pytest.raises(ValueError, match=f"format.*\n.*{OWN_FORMAT}"):
        in_transformers(folder / "mixed")
