"""`rayllm data show` prints what is learnt and what is not. Packing from the command line is in tests/ray."""

import re
import sys
from pathlib import Path

import pytest

from rayllm.cli.main import main
from rayllm.train.data.rows import Kind
from tests.packed_rows import pack_rows

ROWS = {
    Kind.TEXT: [{"text": "the 글\x1b[31m end"}, {"text": "and"}],
    Kind.CHAT: [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]}],
    Kind.PREFERENCE: [{"prompt": "the and", "chosen": " and", "rejected": " end"}],
    Kind.PROMPT: [{"prompt": [{"role": "user", "content": "hi"}]}],
}
# kind -> what is dimmed, what is learnt; line feeds have no style
STYLED = {
    Kind.TEXT: ("theand", " <0xEA><0xB8><0x80><0x1B>[31m end<|im_end|><|im_end|>"),
    Kind.CHAT: ("<|im_start|>userhi<|im_end|><|im_start|>assistant", "the<|im_end|>"),
    Kind.PREFERENCE: ("the andand", " and<|im_end|> end<|im_end|>"),
    Kind.PROMPT: ("<|im_start|>userhi<|im_end|><|im_start|>assistant", ""),
}


def packed(folder: Path, tokenizer: Path, kind: Kind, length: int) -> Path:
    return pack_rows(folder, tokenizer, kind, ROWS[kind], length)


def show(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rayllm", "data", "show", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    output = capsys.readouterr()
    return int(exit_.value.code or 0), output.out, output.err


@pytest.mark.parametrize("kind", Kind)
def test_every_token_with_its_style(monkeypatch, capsys, tmp_path, tiny_model, kind):
    directory = packed(tmp_path, tiny_model, kind, 64)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    status, out, _ = show(monkeypatch, capsys, directory, "--rows", 1)
    assert status == 0
    learnt = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out, re.DOTALL))
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", out, re.DOTALL))
    assert (dimmed, learnt) == STYLED[kind]


def test_documents_and_where_they_come_from(monkeypatch, capsys, tmp_path, tiny_model):
    directory = packed(tmp_path, tiny_model, Kind.TEXT, 12)
    status, out, _ = show(monkeypatch, capsys, directory, "--rows", 9)
    assert status == 0
    marks = [line for line in out.splitlines() if line.startswith("──")]
    file = tmp_path / "rows.jsonl"
    assert marks[:4] == [
        "── row 0: 12 tokens of 1 documents, 11 learnt",
        f"── document 0 ({file}, row 0 (from 0))",
        marks[2],
        f"── document 0, from its token 11 on ({file}, row 0 (from 0))",
    ]
    assert marks[4] == f"── document 1 ({file}, row 1 (from 0))"
    assert re.fullmatch(r"── padding: \d+ tokens", marks[-1])
    assert "\x1b" not in out, "what is in the data does not reach the terminal"


def test_a_pairs_prompt_is_there_once(monkeypatch, capsys, tmp_path, tiny_model):
    directory = packed(tmp_path, tiny_model, Kind.PREFERENCE, 64)
    status, out, _ = show(monkeypatch, capsys, directory)
    assert status == 0
    assert out.splitlines() == [
        "── pair 0: 12 tokens, 8 learnt",
        "── chosen: 6 tokens",
        "the and and<|im_end|>",
        "── rejected: 6 tokens, after the first 2 above",
        "and end<|im_end|>",
    ]


def test_a_row_that_is_not_there(monkeypatch, capsys, tmp_path, tiny_model):
    directory = packed(tmp_path, tiny_model, Kind.CHAT, 64)
    assert show(monkeypatch, capsys, directory, "--first", 1)[::2] == (1, "error: --first: 1 is none of the 1 rows\n")
    status, _, err = show(monkeypatch, capsys, tmp_path)
    assert status == 1
    assert "holds no packed data set" in err
    assert "make one with `rayllm data pack`" in err
