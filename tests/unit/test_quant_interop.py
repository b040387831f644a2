"""What `rayllm quantize` writes loads in transformers with compressed-tensors, and answers the same there."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.quantization import OUTLIERS_FIELD, Scheme
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.quant.calibrate import calibrate
from rayllm.quant.convert import Outliers, Recipe, convert
from tests.tiny_models import save_tiny

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
    if outliers == "mixed":  # they have the int8 of the outlier columns, and know of nothing else
        config = json.loads((out / "config.json").read_text())
        del config[OUTLIERS_FIELD]
        (out / "config.json").write_text(json.dumps(config))
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
