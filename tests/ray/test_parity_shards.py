"""Shards of a group compute what training computes, along every path, and one that does not is found."""

import json

import pytest

from rayllm.cli.main import main
from rayllm.models.checkpoint import Checkpoint
from rayllm.train.parity import PATHS, Layout, Parity

pytestmark = pytest.mark.ray


def test_tensor_and_pipeline_parallel_shards(session, make_tiny_model, monkeypatch, capsys):
    model = make_tiny_model(intermediate_size=96)  # three kv heads, and 96 split by three
    monkeypatch.setattr("sys.argv", ["rayllm", "parity", str(model), "--tp", "1,3", "--pp", "2", "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    report = json.loads(capsys.readouterr().out)
    assert (exit_.value.code or 0, report["ok"]) == (0, True)
    assert [(row["tp"], row["pp"], row["path"]) for row in report["results"]] == [
        (tensor, 2, path) for tensor in (1, 3) for path in PATHS
    ]
    for row in report["results"]:
        assert row["max_abs_diff"] <= 1e-4
        assert row["argmax_mismatches"] == 0


def test_shards_of_other_weights_are_found(session, make_tiny_model, monkeypatch):
    """The shards read another directory than training: the same model but for the epsilon of its norms."""
    model = make_tiny_model(intermediate_size=96)
    other = make_tiny_model(intermediate_size=96, rms_norm_eps=1e-3)
    comparison = Parity(Checkpoint.open(model), [Layout(tensor=3, pipeline=1, quantize=None)])
    served = Parity(Checkpoint.open(other), comparison.layouts)
    monkeypatch.setattr(comparison, "_engine", served._engine)
    results = comparison.run()
    assert [result.path for result in results] == [*PATHS]
    assert not any(result.ok for result in results)
