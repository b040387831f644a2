"""Stored log-probabilities of the reference: found again by their key only."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayllm.core.errors import DataError
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.reference import Reference, ReferenceKey, read_reference, write_reference
from rayllm.train.data.rows import Kind
from tests.packed_rows import pack_rows


@pytest.fixture
def dataset(tmp_path: Path, tiny_model: Path) -> PackedDataset:
    rows = [{"prompt": f"the {n}", "chosen": " cat" * (n % 3 + 1), "rejected": " and"} for n in range(9)]
    return PackedDataset(pack_rows(tmp_path / "pairs", tiny_model, Kind.PREFERENCE, rows, 16))


@pytest.fixture
def reference() -> Reference:
    values = -np.random.default_rng(0).random((2, 9)) * 50
    return Reference(chosen=values[0], rejected=values[1])


def test_comes_back_bit_for_bit_and_is_attached_to_its_pairs(tmp_path, tiny_model, dataset, reference):
    key = ReferenceKey.of(tiny_model, dataset, "float32")
    assert read_reference(tmp_path, key, 9) is None
    write_reference(tmp_path, key, reference)
    found = read_reference(tmp_path, key, 9)
    assert found is not None
    assert np.array_equal(found.chosen, reference.chosen)
    assert np.array_equal(found.rejected, reference.rejected)
    batch = found.attach(dataset.micro_batch([4, 2]))
    expected = [reference.chosen[4], reference.rejected[4], reference.chosen[2], reference.rejected[2]]
    assert batch.document_values["reference"].tolist() == expected
    assert found.attach(dataset.micro_batch([])).document_values["reference"].tolist() == [0, 0]


def test_another_model_data_template_or_dtype_is_another_key(tmp_path, make_tiny_model, tiny_model, dataset, reference):
    key = ReferenceKey.of(tiny_model, dataset, "float32")
    write_reference(tmp_path, key, reference)
    other = make_tiny_model(num_hidden_layers=2)
    assert ReferenceKey.of(other, dataset, "float32").weights != key.weights
    for name in ("weights", "data", "template", "dtype"):
        changed = dataclasses.replace(key, **{name: "other"})
        assert read_reference(tmp_path, changed, 9) is None
        key.path(tmp_path).rename(changed.path(tmp_path))  # a file under a name that is not its own
        with pytest.raises(DataError, match=f"is of another {name}; delete it"):
            read_reference(tmp_path, changed, 9)
        changed.path(tmp_path).rename(key.path(tmp_path))


def test_damage_is_an_error(tmp_path, tiny_model, dataset, reference):
    key = ReferenceKey.of(tiny_model, dataset, "float32")
    write_reference(tmp_path, key, reference)
    with pytest.raises(DataError, match="has 9 rows, the data set 10"):
        read_reference(tmp_path, key, 10)
    path = key.path(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:80] + b"\xff\xff" + content[82:])
    with pytest.raises(DataError, match="cannot be read"):
        read_reference(tmp_path, key, 9)
    write_reference(tmp_path, key, dataclasses.replace(reference, chosen=np.full(9, np.nan)))
    with pytest.raises(DataError, match="not finite"):
        read_reference(tmp_path, key, 9)
    assert pq.read_metadata(path).num_rows == 9
    assert not list(tmp_path.glob("*.tmp"))
