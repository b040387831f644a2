"""English and Korean text, a tokenizer learnt from it, and the shape of a model of five million parameters.

    apt-get download libreoffice-help-en-us libreoffice-help-ko
    pip install --no-deps --target konlpy konlpy==0.6.0
    python -m tests.real_runs.corpus runs-data *.deb --konlpy konlpy

LibreOffice's help (MPL-2.0) in both languages, and konlpy's corpora: Korea's constitution and ten bills of its
parliament. A document is a page of the help, or a file. One in
twenty is held out, chosen by its name, which is the same in both languages: no translation of what is held out is
learnt. Of pages with the same text one is kept; Korean ones are those of which at least 30 % of the letters are Hangul,
since much of the Korean help is not translated.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LANGUAGES = {"en-US": "en", "ko": "ko"}
_BLOCKS = {"p", "div", "br", "tr", "li", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dt", "dd"}
_UNSEEN = {"script", "style"}
_HANGUL = re.compile(r"[가-힣]")
_LETTER = re.compile(r"[^\W\d_]")
_HELD_OUT_OF = 20
_VOCABULARY = 4096
_END = "<|endoftext|>"
_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


class _Page(HTMLParser):
    """What a page of the help says: the text between its navigation and its footer, a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._shown, self._unseen = False, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        place = dict(attrs).get("id")
        if place == "DisplayArea":
            self._shown = True
        elif place == "SearchFrame":
            self._shown = False
        self._unseen += tag in _UNSEEN
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if self._shown and not self._unseen:
            self.pieces.append(data.replace("\n", " "))


def page_text(html: str) -> str:
    page = _Page()
    page.feed(html)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(page.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_OF == 0


def is_korean(text: str) -> bool:
    return len(_HANGUL.findall(text)) >= 0.3 * max(1, len(_LETTER.findall(text)))


def help_pages(package: Path, unpacked: Path) -> Iterator[tuple[str, str, str]]:
    """-> language, name and text of each page in a Debian package; `unpacked`: an empty folder to unpack it into."""
    subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    for folder, language in LANGUAGES.items():
        root = unpacked / "usr/share/libreoffice/help" / folder / "text"
        for path in sorted(root.rglob("*.html")):
            yield language, str(path.relative_to(root)), page_text(path.read_text(encoding="utf-8"))


def konlpy_documents(directory: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted((directory / "konlpy/data/corpus").rglob("*.txt")):
        yield "ko", path.name, path.read_text(encoding="utf-8").strip()


def write_corpus(documents: Iterator[tuple[str, str, str]], output: Path) -> None:
    """OUTPUT/LANGUAGE/train.jsonl and OUTPUT/LANGUAGE/held-out/test.jsonl."""
    texts: dict[tuple[str, bool], list[str]] = {}
    seen = set()
    for language, name, text in documents:
        if not text or text in seen or (language == "ko" and not is_korean(text)):
            continue
        seen.add(text)
        texts.setdefault((language, is_held_out(name)), []).append(text)
    for (language, held_out), members in texts.items():
        path = output / language / ("held-out/test.jsonl" if held_out else "train.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in members))
        size = sum(len(text.encode()) for text in members)
        print(f"{path}: {len(members)} documents, {size} bytes")


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_model(texts: Sequence[str], output: Path) -> None:
    """A byte-level BPE tokenizer learnt from `texts`, and the configuration of a model that has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    output.mkdir(parents=True, exist_ok=True)
    backend.save(str(output / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _END, "eos_token": _END}
    end = backend.token_to_id(_END)
    shape = {**_SHAPE, "vocab_size": backend.get_vocab_size(), "bos_token_id": end, "eos_token_id": end}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("config.json", shape),
        ("generation_config.json", {"bos_token_id": end, "eos_token_id": end}),
    ):
        (output / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make corpus, tokenizer and the model's configuration.")
    parser.add_argument("output", type=Path)
    parser.add_argument("packages", type=Path, nargs="+", help="libreoffice-help-en-us and libreoffice-help-ko, .deb")
    parser.add_argument("--konlpy", type=Path, required=True, help="where pip put konlpy 0.6.0")
    arguments = parser.parse_args()

    def documents() -> Iterator[tuple[str, str, str]]:
        for package in arguments.packages:
            with tempfile.TemporaryDirectory() as unpacked:
                yield from help_pages(package, Path(unpacked))
        yield from konlpy_documents(arguments.konlpy)

    write_corpus(documents(), arguments.output)
    texts = [
        text for language in LANGUAGES.values() for text in read_texts(arguments.output / language / "train.jsonl")
    ]
    write_model(texts, arguments.output / "model")


if __name__ == "__main__":
    main()
