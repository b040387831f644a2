"""Parity of serving and training: figures against transformers in float64, every path, and faults that must show."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllm.cli.main import main
from rayllm.core.types import TokenLogprobs
from rayllm.engine import model_runner
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.models.quantization import stored_format, write_quantization
from rayllm.scheduler import sequence
from rayllm.scheduler.block_manager import block_hash
from rayllm.train.gap import Scored, TrainingForward
from rayllm.train.parity import PATHS
from tests.tiny_models import save_tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["rayllm", "parity", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return run


def said(logprobs_V: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """What an engine with these log-probabilities says."""
    top = logprobs_V.topk(num_top)
    return TokenLogprobs(
        token_id=token,
        logprob=float(logprobs_V[token]),
        rank=1 + int((logprobs_V > logprobs_V[token]).sum()),
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


@pytest.mark.parametrize("case", ["llama-gqa", "llama-mqa-tied", "qwen3-windows", "gpt2-tied"])
def test_gap_is_that_of_a_float64_reference(tmp_path, case):
    """An engine that answers from other logits, for sequences that lie packed, is as far off as float64 says."""
    reference = save_tiny(tmp_path, case).double()
    generator = torch.Generator().manual_seed(1)
    sequences, differences, mismatches, divergences, num_top = [], [], 0, [], 20
    for length in (5, 17, 2, 23):
        ids = torch.randint(0, 101, (length,), generator=generator)
        with torch.no_grad():
            q_TV = reference(ids[None]).logits[0].log_softmax(-1)
        p_TV = (q_TV + 0.3 * torch.randn(q_TV.shape, generator=generator).double()).log_softmax(-1)
        sequences.append(
            Scored(token_ids=ids.tolist(), said={t: said(p_TV[t - 1], int(ids[t]), num_top) for t in range(1, length)})
        )
        for p_V, q_V, token in zip(p_TV[:-1], q_TV[:-1], ids[1:], strict=True):
            differences.append(abs(float(p_V[token] - q_V[token])))
            mismatches += int(p_V.argmax() != q_V.argmax())
            top = p_V.argsort(descending=True)[:num_top].tolist()
            events = [(math.exp(p_V[i]), math.exp(q_V[i])) for i in top]
            events.append((1 - sum(p for p, _ in events), 1 - sum(q for _, q in events)))
            divergences.append(sum(p * math.log(p / q) for p, q in events))
    forward = TrainingForward(Checkpoint.open(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    gap = forward.gap(sequences)
    assert gap.tokens == len(differences) == 43
    assert gap.max_abs_diff == pytest.approx(max(differences), abs=2e-5)
    assert gap.mean_abs_diff == pytest.approx(sum(differences) / 43, abs=2e-5)
    assert gap.argmax_mismatches == mismatches > 0
    assert gap.kl == pytest.approx(sum(divergences) / 43, rel=1e-4)


def test_every_path_of_the_engine_is_the_training_forward(parity, tiny_model: Path):
    status, out, err = parity(tiny_model, "--json")
    report = json.loads(out)  # one object and nothing else
    assert (status, err, report["ok"], report["dtype"]) == (0, "", True, "float32")
    assert all(length % 16 for length in report["prompt_tokens"])
    assert [(row["tp"], row["pp"], row["quantize"], row["path"]) for row in report["results"]] == [
        (1, 1, None, path) for path in PATHS
    ]
    prompts = sum(report["prompt_tokens"]) - len(report["prompt_tokens"])  # nothing comes before the first
    tokens = {row["path"]: row["tokens"] for row in report["results"]}
    assert tokens["prefill"] == tokens["chunked_prefill"] == prompts
    assert (tokens["decode_greedy"], tokens["decode_sampled"], tokens["preemption"]) == (160, 160, 120)
    for row in report["results"]:
        assert row["max_abs_diff"] <= 1e-4
        assert row["argmax_mismatches"] == 0
        assert abs(row["kl"]) < 1e-7


def test_bfloat16_int8_and_prompts_of_a_file(parity, tiny_model: Path, tmp_path: Path):
    """int8 weights are further off than bfloat16 alone, and the table says so."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a\n\nIn the end, one hand washes the other; both wash the face of the land.\n\n\n", encoding="utf-8"
    )
    options = ("--prompts", prompts, "--dtype", "bfloat16", "--bound", 50, "--int8")
    status, out, _ = parity(tiny_model, *options, "--json")
    report = json.loads(out)
    assert (status, len(report["prompt_tokens"]), len(report["results"])) == (0, 2, 3 * len(PATHS))
    mean = {}
    for row in report["results"]:
        mean.setdefault(row["quantize"], []).append(row["mean_abs_diff"])
    assert sum(mean["w8a8"]) > sum(mean["w8a16"]) > sum(mean[None]) > 0
    differing = [row for row in report["results"] if row["quantize"] is None and row["max_abs_diff"] > 1e-6]
    assert {row["path"] for row in differing} >= set(PATHS) - {"prefill"}, "only that may be the very same products"
    status, out, err = parity(tiny_model, "--prompts", prompts, "--dtype", "bfloat16", "--bound", 1e-6)
    assert status == 1
    assert out.count("TOO FAR") == len(differing)
    assert f"error: serving differs from training on {len(differing)} of 6 paths" in err


def shift_norm(model: Decoder) -> None:
    assert model.norm is not None
    model.norm.weight.data.mul_(1.001)


def turn_rope(model: Decoder) -> None:
    assert model.rotary is not None
    forward = model.rotary.rotation
    model.rotary.rotation = lambda positions_T, *rest: forward(positions_T + (positions_T > 20), *rest)


@pytest.mark.parametrize("disturb", [shift_norm, turn_rope])
def test_an_engine_that_computes_something_else_is_found(parity, tiny_model, monkeypatch, disturb):
    load = model_runner.load_shard

    def load_disturbed(*args: object, **options: object) -> Decoder:
        model = load(*args, **options)  # type: ignore[arg-type]
        disturb(model)
        return model

    monkeypatch.setattr(model_runner, "load_shard", load_disturbed)
    status, out, err = parity(tiny_model, "--json")
    report = json.loads(out)
    assert (status, report["ok"]) == (1, False)
    assert not any(row["ok"] for row in report["results"])
    assert err.count("\n") == 1
    assert err.startswith("error: serving differs from training on 6 of 6 paths; most in ")


def test_a_cache_that_mixes_prompts_up_is_found_where_it_is_read(parity, tiny_model, monkeypatch):
    """Blocks are found by their place alone, whatever their tokens; a prompt with logprobs reads none."""
    monkeypatch.setattr(sequence, "block_hash", lambda parent, token_ids: block_hash(parent, []))
    status, out, _ = parity(tiny_model, "--json")
    ok = {row["path"]: row["ok"] for row in json.loads(out)["results"]}
    assert status == 1
    assert (ok["prefill"], ok["chunked_prefill"]) == (True, True)
    assert (ok["decode_greedy"], ok["prefix_hit"]) == (False, False)


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "tensor model.norm.weight holds NaN or infinity"), (3e38, "the weights may be damaged")],
)
def test_weights_that_give_no_numbers_are_one_error(
    parity, tiny_model: Path, tmp_path: Path, value: float, message: str
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(value)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status, out, err = parity(broken)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


def test_bad_input_is_one_clear_error(parity, tiny_model: Path, tmp_path: Path, make_tiny_model, capsys):
    short = make_tiny_model(max_position_embeddings=64)
    capsys.readouterr()  # transformers' progress

    def error(*arguments: object) -> str:
        status, out, err = parity(*arguments)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        return err

    prompts = tmp_path / "prompts.txt"
    assert "config.json" in error(tmp_path)
    assert "tensor parallel size 4 does not divide the model's 6 attention heads" in error(tiny_model, "--tp", "1,4")
    assert "pipeline parallel size 5 is more than the model's 3 layers" in error(tiny_model, "--pp", 5)
    assert "No such file" in error(tiny_model, "--prompts", prompts)
    prompts.write_text(" \n\n\n")
    assert "holds no text" in error(tiny_model, "--prompts", prompts)
    prompts.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error(tiny_model, "--prompts", prompts)
    prompts.write_text("short")
    assert "the longest has 5 tokens; 32 are needed" in error(tiny_model, "--prompts", prompts)
    prompts.write_text("short\n\n" + "long " * 200)
    assert "number 2 has" in error(tiny_model, "--prompts", prompts)
    assert "context of 64 tokens is too short" in error(short)
    assert "dtype: 'int4'" in error(tiny_model, "--dtype", "int4")
    status, _, err = parity(tiny_model, "--tp", "1,x")
    assert status == 2
    assert "'1,x' is not a list of sizes" in err
    int8 = tmp_path / "int8"
    shutil.copytree(tiny_model, int8)
    config = json.loads((int8 / "config.json").read_text())
    config["quantization_config"] = write_quantization(stored_format("w8a8", outliers=False), ignore=[])
    (int8 / "config.json").write_text(json.dumps(config))
    assert "int8" in error(int8)
