"""From files to a packed data set and back, and every way in which a file can be bad. Ray is in tests/ray."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayllm.core.errors import ConfigError, DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.data import parquet as parquet_module
from rayllm.train.data import sources
from rayllm.train.data.cursor import Cursor
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.loader import Loader
from rayllm.train.data.pack import PackSettings, pack, prepare
from rayllm.train.data.rows import Kind
from rayllm.train.data.sources import Chunk, check_source, find_files, read_chunk
from rayllm.train.data.tokenize import tokenize_chunk

TEXTS = [f"the cat {number} sat on the mat. " * (number % 5) for number in range(60)]
CHATS = [
    [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": "and the cat " * (n % 4 + 1)}]
    for n in range(50)
]
PAIRS = [{"prompt": f"the {n}", "chosen": " cat" * (n % 3 + 1), "rejected": " dog"} for n in range(40)]


def in_this_process(chunks: Sequence[Chunk], kind: Kind, directory: str) -> Iterator[tuple[Chunk, pa.Table]]:
    for chunk in chunks:
        for table in tokenize_chunk(chunk, kind, directory):
            yield chunk, table


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def parquet(path: Path, rows, **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def packed(inputs, output: Path, tokenizer: Path, kind: Kind, length: int, **options) -> PackedDataset:
    settings = PackSettings(kind=kind, sequence_length=length, **options)
    info = pack(prepare(inputs, output, tokenizer, settings), tokenize=in_this_process)
    dataset = PackedDataset(output)
    assert dataset.info == info
    return dataset


def documents_of(dataset: PackedDataset) -> dict[int, tuple[list[int], list[bool]]]:
    """Put together again from their pieces."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for sample in range(len(dataset)):
        row, start = dataset.row(sample), 0
        for length, number, offset in zip(row.document_lengths, row.document_ids, row.document_offsets, strict=True):
            tokens, mask = found.setdefault(number, ([], []))
            need = offset + length - len(tokens)
            tokens += [-1] * need
            mask += [0] * need
            tokens[offset : offset + length] = row.tokens[start : start + length].tolist()
            for place in range(length):
                mask[offset + place] += int(row.mask[start + place])
            start += length
    return {number: (tokens, [bool(m) for m in mask]) for number, (tokens, mask) in sorted(found.items())}


class TestPack:
    def test_texts_of_all_kinds_of_files(self, tmp_path, byte_level_directory, monkeypatch):
        monkeypatch.setattr(sources, "_CHUNK_BYTES", 300)  # several chunks of a small file
        (tmp_path / "c.txt").write_text("안녕하세요 the cat")
        rows = [{"text": text, "other": index} for index, text in enumerate(TEXTS)]
        files = [
            jsonl(tmp_path / "a.jsonl", rows[:30]),
            parquet(tmp_path / "b.parquet", rows[30:], row_group_size=7),
            tmp_path / "c.txt",
        ]
        dataset = packed(files, tmp_path / "out", byte_level_directory, Kind.TEXT, 48)
        tokenizer = Tokenizer.load(byte_level_directory)
        texts = [*TEXTS, "안녕하세요 the cat"]
        expected = {i: [*tokenizer.encode(text), tokenizer.eos_token_id] for i, text in enumerate(texts) if text}
        documents = documents_of(dataset)
        assert {number: tokens for number, (tokens, _) in documents.items()} == expected
        assert all(mask == [False] + [True] * (len(mask) - 1) for _, mask in documents.values())
        info = dataset.info
        assert info.num_documents == len(expected)
        assert info.num_empty == sum(not text for text in texts)
        assert info.num_tokens == sum(map(len, expected.values()))
        assert info.num_targets == info.num_tokens - info.num_documents
        assert [source.num_rows for source in info.sources] == [30, 30, 1]
        assert info.place_of(31) == f"{tmp_path / 'b.parquet'}, row 1 (from 0)"
        assert info.tokenizer_sha256 == tokenizer.fingerprint
        assert info.template_sha256 is None

    def test_conversations(self, tmp_path, byte_level_directory):
        rows = [{"messages": messages} for messages in CHATS]
        file = parquet(tmp_path / "a.parquet", rows)
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.CHAT, 40)
        tokenizer = Tokenizer.load(byte_level_directory)
        for number, (tokens, mask) in documents_of(dataset).items():
            assert tokens == tokenizer.chat(CHATS[number], add_generation_prompt=False)
            answer = [token for token, wanted in zip(tokens, mask, strict=True) if wanted]
            assert tokenizer.decode(answer, skip_special_tokens=False) == CHATS[number][1]["content"] + "</s>"
        assert dataset.info.num_documents == len(CHATS)

    def test_a_long_question_leaves_no_row_in_which_nothing_is_learnt(self, tmp_path, byte_level_directory):
        question = [{"role": "user", "content": "the cat " * 40}, {"role": "assistant", "content": "a dog"}]
        file = jsonl(tmp_path / "a.jsonl", [{"messages": question}])
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.CHAT, 40)
        rows = [dataset.row(sample) for sample in range(len(dataset))]
        assert all(row.mask.any() for row in rows)
        info = dataset.info
        assert info.num_left_out > 1
        assert info.num_rows == info.num_pieces == (info.num_tokens - 2) // 39 + 1 - info.num_left_out
        assert info.num_padding == sum(40 - sum(row.document_lengths) for row in rows)
        [(tokens, mask)] = documents_of(dataset).values()
        answer = [token for token, wanted in zip(tokens, mask, strict=True) if wanted]
        assert Tokenizer.load(byte_level_directory).decode(answer, skip_special_tokens=False) == "a dog</s>"
        assert len(answer) == info.num_targets

    def test_pairs(self, tmp_path, byte_level_directory):
        dataset = packed(
            [jsonl(tmp_path / "a.jsonl", PAIRS)], tmp_path / "out", byte_level_directory, Kind.PREFERENCE, 16
        )
        tokenizer = Tokenizer.load(byte_level_directory)
        assert len(dataset) == len(PAIRS)
        for sample, row in enumerate(PAIRS):
            pair = dataset.pair(sample)
            assert pair.prompt == tokenizer.encode(row["prompt"])
            assert pair.chosen == [*tokenizer.encode(row["chosen"]), tokenizer.eos_token_id]

    def test_pairs_that_are_too_long(self, tmp_path, byte_level_directory):
        file = jsonl(tmp_path / "a.jsonl", [*PAIRS[:2], {"prompt": "the", "chosen": " cat" * 30, "rejected": " dog"}])
        with pytest.raises(
            DataError, match=r"a\.jsonl, row 2 \(from 0\): prompt and answer have \d+ tokens, more than 16"
        ):
            packed([file], tmp_path / "out", byte_level_directory, Kind.PREFERENCE, 16)
        assert not (tmp_path / "out").exists()
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.PREFERENCE, 16, drop_long=True)
        assert (len(dataset), dataset.info.num_dropped) == (2, 1)

    def test_prompts(self, tmp_path, byte_level_directory):
        """As the engine would be fed them: a text alone, or a conversation that waits for the assistant."""
        rows = [{"prompt": "the cat"}, {"prompt": CHATS[0][:1]}, {"prompt": "the " * 40}]
        file = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(DataError, match=r"a\.jsonl, row 2 \(from 0\): the prompt has \d+ tokens, more than 30"):
            packed([file], tmp_path / "out", byte_level_directory, Kind.PROMPT, 30)
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.PROMPT, 30, drop_long=True)
        tokenizer = Tokenizer.load(byte_level_directory)
        wanted = [tokenizer.encode("the cat"), tokenizer.chat(CHATS[0][:1])]
        assert [dataset.prompt(sample) for sample in range(len(dataset))] == wanted
        info = dataset.info
        assert (info.num_documents, info.num_tokens, info.num_targets) == (2, sum(map(len, wanted)), 0)
        assert info.num_dropped == 1
        assert info.template_sha256 == tokenizer.template_fingerprint

    def test_the_same_files_give_the_same_data(self, tmp_path, byte_level_directory):
        file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
        made = [packed([file], tmp_path / str(n), byte_level_directory, Kind.TEXT, 32).info for n in range(2)]
        assert made[0] == made[1]
        other = packed([file], tmp_path / "3", byte_level_directory, Kind.TEXT, 33).info
        assert other.fingerprint != made[0].fingerprint

    def test_a_problem_that_only_the_tokenizer_finds(self, tmp_path, byte_level_directory):
        rows = [{"messages": [*CHATS[0], {"role": "tool", "content": "x"}]}]
        file = jsonl(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, *rows])
        with pytest.raises(
            DataError, match=r"a\.jsonl, line 2: messages: the model's chat template refuses them: no tools"
        ):
            packed([file], tmp_path / "out", byte_level_directory, Kind.CHAT, 32)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    def test_settings_that_cannot_work(self, tmp_path, byte_level_directory, sentencepiece_directory):
        with pytest.raises(ConfigError, match="sequence_length: 1 is too short"):
            PackSettings(kind=Kind.TEXT, sequence_length=1)
        with pytest.raises(ConfigError, match="only pairs and prompts are dropped"):
            PackSettings(kind=Kind.CHAT, sequence_length=8, drop_long=True)
        file = jsonl(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
        settings = PackSettings(kind=Kind.CHAT, sequence_length=8)
        with pytest.raises(ConfigError, match="has no chat template"):
            prepare([file], tmp_path / "out", sentencepiece_directory, settings)
        with pytest.raises(ConfigError, match="is there already"):
            prepare([file], tmp_path, byte_level_directory, settings)
        empty = jsonl(tmp_path / "b.jsonl", [{"text": ""}])
        with pytest.raises(DataError, match="every row is empty"):
            packed([empty], tmp_path / "out", byte_level_directory, Kind.TEXT, 8)


MESSAGE = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        (Kind.TEXT, {"text": 7}, "text: is of type int, not a text"),
        (Kind.TEXT, {"text": None}, "text: is null, not a text"),
        (Kind.TEXT, {"text": "a\0b"}, "text: holds a NUL character at position 1"),
        (Kind.CHAT, {"messages": "hi"}, "messages: is of type str, not a list of messages"),
        (Kind.CHAT, {"messages": []}, "messages: is an empty list"),
        (Kind.CHAT, {"messages": ["hi"]}, r"messages\[0\]: is of type str, not a message"),
        (Kind.CHAT, {"messages": [{"role": "user"}]}, r"messages\[0\]: has no content"),
        (Kind.CHAT, {"messages": [{"role": "user", "content": "x"}]}, "messages: none is the assistant's"),
        (Kind.CHAT, {"messages": [MESSAGE | {"tool_calls": "f()"}]}, r"messages\[0\]: has tool_calls; only role and"),
        (Kind.CHAT, {"messages": [MESSAGE | {"content": 3}]}, r"messages\[0\]\.content: is of type int"),
        (Kind.PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (Kind.PROMPT, {"prompt": 3}, "prompt: is of type int, not a list of messages"),
        (Kind.PROMPT, {"prompt": []}, "prompt: is an empty list"),
        (
            Kind.PREFERENCE,
            {"prompt": "a", "chosen": [MESSAGE], "rejected": "b"},
            "prompt, chosen and rejected must be three texts or three lists",
        ),
        (
            Kind.PREFERENCE,
            {"prompt": [MESSAGE], "chosen": [MESSAGE], "rejected": [{"role": "user", "content": "x"}]},
            "rejected: the last message must be the assistant's",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_place(tmp_path, write, kind, row, problem):
    good = {
        Kind.TEXT: {"text": "x"},
        Kind.CHAT: {"messages": [MESSAGE]},
        Kind.PREFERENCE: {"prompt": "a", "chosen": "b", "rejected": "c"},
        Kind.PROMPT: {"prompt": "a"},
    }[kind]
    place = r"line 4" if write is jsonl else r"row 0 \(from 0\)"
    rows = [good, good, good, row] if write is jsonl else [row]  # a Parquet column has one type
    file = write(tmp_path / f"bad.{write.__name__}", rows)
    with pytest.raises(DataError, match=f"^{file}, {place}: {problem}"):
        check_source(file, kind)


class TestBadFiles:
    @pytest.mark.parametrize(("name", "kind"), [("a.jsonl", Kind.TEXT), ("a.parquet", Kind.CHAT), ("a.txt", Kind.CHAT)])
    def test_a_missing_column(self, tmp_path, name, kind):
        path = tmp_path / name
        {"txt": lambda: path.write_text("x"), "jsonl": lambda: jsonl(path, [{"body": "x", "id": 1}])}.get(
            path.suffix[1:], lambda: parquet(path, [{"body": "x", "id": 1}])
        )()
        with pytest.raises(DataError, match=f"^{path}.*has no column {kind.columns[0]}"):
            check_source(path, kind)

    def test_two_columns_of_one_name(self, tmp_path):
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet: has text more than once; it has text, text$"):
            check_source(tmp_path / "a.parquet", Kind.TEXT)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b'{"text": "a"}\n\n{"text": \n', "line 3: is not JSON"),
            (b'{"text": "a"}\n["text"]\n', "line 2: is a JSON list, not an object"),
            (b'{"text": "a\xff"}\n', "line 1: is not JSON"),
            (b'{"text": "\\ud83d"}\n', "line 1: "),
            (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: is not JSON"),
            (b"\n \n", "holds no rows"),
            (b"", "holds no rows"),
        ],
    )
    def test_bad_lines(self, tmp_path, content, problem):
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"a.jsonl.*{problem}"):
            check_source(path, Kind.TEXT)

    def test_lines_are_counted_over_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "_CHUNK_BYTES", 40)
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "x"}\r\n\n' * 20 + '{"text": 1}\n')
        with pytest.raises(DataError, match="line 41: text"):
            check_source(path, Kind.TEXT)
        path.write_text('{"text": "x"}\r\n\n' * 20 + '{"text": "last"}')
        source = check_source(path, Kind.TEXT)
        assert len(source.chunks) > 5
        rows = [row for chunk in source.chunks for row in read_chunk(chunk, Kind.TEXT)]
        assert [row.index for row in rows] == list(range(21))
        assert rows[-1].row.text == "last"

    def test_files_that_are_not_there_or_of_no_kind(self, tmp_path):
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(DataError, match="nowhere: no such file or folder"):
            find_files([tmp_path / "nowhere"])
        with pytest.raises(DataError, match=r"a\.csv: ends in none of \.parquet, \.jsonl, \.txt"):
            find_files([tmp_path / "a.csv"])
        with pytest.raises(DataError, match="holds no file ending in"):
            find_files([tmp_path])
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match=r"a\.txt: is given twice"):
            find_files([tmp_path, tmp_path / "a.txt"])

    def test_parquet_with_any_byte_changed(self, tmp_path):
        """An error that names the file, or rows; never another exception. A checksum finds what changed in a page;
        only its header and the footer have none."""
        path = parquet(tmp_path / "a.parquet", [{"text": text} for text in TEXTS], write_page_checksum=True)
        content = path.read_bytes()
        whole = [row.row for chunk in check_source(path, Kind.TEXT).chunks for row in read_chunk(chunk, Kind.TEXT)]
        messages, changed = [], []
        for place in range(0, len(content), 3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
            try:
                source = check_source(path, Kind.TEXT)
            except DataError as error:
                messages.append(str(error))
                continue
            rows = [row.row for chunk in source.chunks for row in read_chunk(chunk, Kind.TEXT)]
            if rows != whole:
                changed.append(place)
        assert all(str(path) in message for message in messages)
        assert len(messages) > 100
        assert len(changed) < len(content) / 300

    @pytest.mark.parametrize("size", [0, 3, 50, -1, -9])
    def test_parquet_cut_off(self, tmp_path, size):
        path = parquet(tmp_path / "a.parquet", [{"text": text} for text in TEXTS])
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
            check_source(path, Kind.TEXT)


EVIL = """
import sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq

class Evil(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.string(), "evil.type")
    def __arrow_ext_serialize__(self):
        return b"payload"
    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        Path(sys.argv[2]).write_text("code of the file was run")
        return cls()

pa.register_extension_type(Evil())
column = pa.ExtensionArray.from_storage(Evil(), pa.array(["x"]))
nested = pa.StructArray.from_arrays([column], ["inner"])
pq.write_table(pa.table({"text": ["x"], "evil": nested if sys.argv[3] == "nested" else column}), sys.argv[1])
Path(sys.argv[2]).unlink(missing_ok=True)  # writing runs it, too

from rayllm.core.errors import DataError
from rayllm.train.data.rows import Kind
from rayllm.train.data.sources import check_source
try:
    check_source(Path(sys.argv[1]), Kind.TEXT)
except DataError as error:
    print(error)
if sys.argv[4]:
    pq.read_metadata(sys.argv[1])
"""


class TestExtensionTypes:
    @pytest.mark.parametrize("where", ["top", "nested"])
    def test_no_code_of_theirs_runs(self, tmp_path, where):
        """The class is registered in the process, as Ray Data registers its own; the control shows what Arrow does."""
        for control in ("", "control"):
            path, trace = tmp_path / f"a{control}.parquet", tmp_path / f"trace{control}"
            command = [sys.executable, "-c", EVIL, str(path), str(trace), where, control]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert done.stdout == (
                f"{path}: holds columns of an Arrow extension type, which only code that the file names can read; "
                "write them as plain columns\n"
            )
            assert trace.exists() is bool(control)

    @pytest.mark.parametrize(
        "name", ["arrow.py_extension_type", "ray.data.arrow_pickled_object", "ray.data.arrow_tensor"]
    )
    def test_pickles_under_the_names_that_unpickled_them(self, tmp_path, name):
        """Made by hand: what an attacker would write, without the library that reads it."""
        payload = b"cbuiltins\nprint\n(S'run'\ntR."
        field = pa.field(
            "text", pa.string(), metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
        )
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table([pa.array(["x"])], schema=pa.schema([field])), path)
        with pytest.raises(DataError, match="holds columns of an Arrow extension type"):
            check_source(path, Kind.TEXT)

    def test_wherever_it_stands_in_the_footer(self, tmp_path):
        """Base64 depends on the place modulo 3."""
        for length in range(1, 13):
            field = pa.field("text", pa.string(), metadata={"ARROW:extension:name": "x" * length})
            path = tmp_path / f"{length}.parquet"
            schema = pa.schema([pa.field("y" * length, pa.string()), field], metadata={"z" * length: ""})
            pq.write_table(pa.table([["x"], ["x"]], schema=schema), path)
            assert any(key in path.read_bytes() for key in parquet_module._EXTENSION_KEY_IN_BASE64)
            with pytest.raises(DataError, match="holds columns of an Arrow extension type"):
                check_source(path, Kind.TEXT)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, byte_level_directory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("dataset")
    file = jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayllm.train.data.shards._GROUP_TOKENS", 24 * 5)
        patch.setattr("rayllm.train.data.shards._FILE_TOKENS", 24 * 15)
        return packed([file], folder / "out", byte_level_directory, Kind.TEXT, 24)


class TestDataset:
    def test_random_access_over_files_and_row_groups(self, dataset):
        assert len(dataset.info.files) > 3
        table = pq.read_table([dataset.directory / file.name for file in dataset.info.files])
        for sample in np.random.default_rng(0).permutation(len(dataset)).tolist():
            assert dataset.row(sample).tokens.tolist() == table["tokens"][sample].as_py()
        with pytest.raises(IndexError):
            dataset.row(len(dataset))

    @pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 12), (1, 5), (4, 3), (5, 1), (3, 7)])
    def test_all_layouts_see_the_same_samples_and_tokens(self, dataset, num_ranks, micro_batch_size):
        cursor = Cursor(seed=5)
        total = torch.zeros((), dtype=torch.int64)
        seen = []
        while True:
            ranks = [
                Loader(
                    dataset=dataset,
                    samples_per_step=12,
                    micro_batch_size=micro_batch_size,
                    rank=rank,
                    num_ranks=num_ranks,
                    num_epochs=2,
                )
                for rank in range(num_ranks)
            ]
            batches = [list(loader.step(cursor)) for loader in ranks]
            assert {len(own) for own in batches} == {ranks[0].num_micro_batches(cursor)}
            if not batches[0]:
                break
            seen += [sample for own in batches for batch in own for sample in batch.sample_ids]
            total += sum(batch.targets_T.clamp(min=0).sum() for own in batches for batch in own)
            cursor = ranks[0].after_step(cursor)
        assert sorted(seen) == sorted([*range(len(dataset))] * 2)
        expected = sum(int(row.tokens[row.mask].sum()) for row in map(dataset.row, range(len(dataset))))
        assert total == 2 * expected

    def test_pairs_are_two_documents_each(self, tmp_path, byte_level_directory):
        file = jsonl(tmp_path / "a.jsonl", PAIRS)
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.PREFERENCE, 16)
        batch = dataset.micro_batch([3, 1])
        pairs = [dataset.pair(3), dataset.pair(1)]
        wanted = [part for p in pairs for part in (p.prompt + p.chosen, p.prompt[-1:] + p.rejected)]
        assert batch.token_ids.tolist() == [list(chain.from_iterable(wanted))]
        assert batch.document_lengths == (tuple(map(len, wanted)),)
        assert batch.prefixes == [n for pair in pairs for n in (0, len(pair.prompt) - 1)]
        assert dataset.longest_pair() == max(
            dataset.micro_batch([sample]).token_ids.numel() for sample in range(len(dataset))
        )
        assert batch.num_targets == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        assert batch.sample_ids == (3, 1)
        nothing = dataset.micro_batch([])
        assert (nothing.num_documents, nothing.num_targets, nothing.sample_ids) == (2, 0, ())

    def test_what_was_changed_or_is_of_another_tokenizer_is_refused(
        self, tmp_path, byte_level_directory, sentencepiece_directory
    ):
        file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
        dataset = packed([file], tmp_path / "out", byte_level_directory, Kind.TEXT, 24)
        dataset.check_tokenizer(Tokenizer.load(byte_level_directory))
        with pytest.raises(DataError, match="packed with another tokenizer"):
            dataset.check_tokenizer(Tokenizer.load(sentencepiece_directory))
        data = tmp_path / "out" / "data-00000.parquet"
        content = data.read_bytes()
        data.write_bytes(content[:100] + struct.pack("<I", 7) + content[104:])
        with pytest.raises(DataError, match=r"data-00000\.parquet: cannot be read"):
            PackedDataset(tmp_path / "out").row(0)
        parquet(data, [{"text": "x"}])
        with pytest.raises(DataError, match="is not the file that the data set was made with"):
            PackedDataset(tmp_path / "out").row(0)
        data.unlink()
        info = tmp_path / "out" / "dataset.json"
        written = info.read_text()
        info.write_text(written.replace('"kind": "text"', '"kind": "other"'))
        with pytest.raises(DataError, match=r"dataset\.json: Invalid enum value 'other'"):
            PackedDataset(tmp_path / "out")
        info.write_text(written.replace('"format": 2', '"format": 1'))
        with pytest.raises(DataError, match="format 1; this version reads 2; pack the data again"):
            PackedDataset(tmp_path / "out")
        info.write_text(written)
        with pytest.raises(DataError, match="is missing from the data set"):
            PackedDataset(tmp_path / "out")
        with pytest.raises(DataError, match="holds no packed data set"):
            PackedDataset(tmp_path)
