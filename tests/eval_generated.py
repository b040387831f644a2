"""Texts that a model really writes, here and in lm-eval's Hugging Face backend: the same, and scored the same?

    python -m tests.eval_generated ours DIR --task gsm8k_cot --documents 100
    python -m tests.eval_generated theirs DIR --task gsm8k_cot --documents 100 --seconds 280    # as often as it takes
    python -m tests.eval_generated compare DIR --task gsm8k_cot --documents 100

The first two go on where they were stopped, and say how long the model took, loading not counted: on a machine that
does nothing else they are the benchmark of generation. `compare` prints one JSON object. It names each text that
differs, with the first token at which they part and how far the two best logits are apart there: sums in float32 that
are taken in another order differ in the fifth digit, and that decides between tokens which are that close.

Both sides use SmolLM2-135M-Instruct in float32. Needs what `make reference` installs.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.models.hub import resolve_model
from tests.eval_runs import rows, run
from tests.lm_eval_generation import CONFIGS, load, verdict_of, verdict_of_lm_eval
from tests.lm_eval_reference import LmEval
from tests.lm_eval_replay import asked, judged

MODEL = "smollm2-135m"


def write_ours(name: str, documents: int, folder: Path) -> dict[str, Any]:
    """By the command's own path: the runner, the engine, the rows on disk."""
    config = EngineConfig(model=ModelConfig(model=MODEL, dtype="float32"), cache=CacheConfig(cpu_memory_bytes=1 << 30))
    with TemporaryDirectory() as data:
        load(name, Path(data), documents)
        backend = LocalBackend.open(config)
        started = time.perf_counter()
        try:
            result = run(name, backend, Data(Path(data)), folder / "ours", allow_code_execution=True)
        finally:
            backend.close()
    usage = backend.usage
    assert usage is not None
    return {
        "seconds": time.perf_counter() - started,
        "resumed": result.num_resumed,
        "prefix_hit_rate": usage.cached_tokens / max(usage.prompt_tokens, 1),
    }


def write_theirs(name: str, documents: int, folder: Path, batch_size: int, seconds: float) -> dict[str, Any]:
    """Batches of prompts of similar length, one line a text, until all are done or the time is over."""
    path = folder / "theirs" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_theirs(path)
    with TemporaryDirectory() as data:
        _, _, files = load(name, Path(data) / "data", documents)
        prompts = asked(Path(data), CONFIGS[name], files)
    missing = sorted(set(range(documents)) - done.keys(), key=lambda index: len(prompts[index].prompt))
    lm_eval = LmEval(resolve_model(MODEL), batch_size=batch_size)
    started = time.perf_counter()
    with path.open("a", encoding="utf-8") as file:
        while missing and time.perf_counter() - started < seconds:
            batch, missing = missing[:batch_size], missing[batch_size:]
            for index, text in zip(batch, lm_eval.generate([prompts[index] for index in batch]), strict=True):
                file.write(json.dumps({"index": index, "text": text}) + "\n")
            file.flush()
    written = documents - len(done) - len(missing)
    return {"seconds": time.perf_counter() - started, "written": written, "missing": len(missing)}


def read_theirs(path: Path) -> dict[int, str]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["index"]: line["text"] for line in lines}


def compare(name: str, documents: int, folder: Path) -> dict[str, Any]:
    got = rows(folder / "ours", name)
    theirs = read_theirs(folder / "theirs" / f"{name}.jsonl")
    texts = [theirs[index] for index in range(documents)]
    with TemporaryDirectory() as data:
        task, of_task, files = load(name, Path(data) / "data", documents)
        prompts = asked(Path(data), CONFIGS[name], files)
        (Path(data) / "configs" / "reference.yaml").unlink()
        (Path(data) / "configs").rmdir()
        verdicts = [verdict_of_lm_eval(task, each) for each in judged(Path(data), CONFIGS[name], files, texts)]
    differing = []
    same = {"prompts": 0, "texts": 0, "answers": 0, "scores": 0}
    for row, document, prompt, text, verdict in zip(got, of_task, prompts, texts, verdicts, strict=True):
        (response,) = row["responses"]
        mine = verdict_of(task, document, response["text"])
        same["prompts"] += response["prompt"] == prompt.prompt
        if verdict.extracted:  # of mathematics lm-eval tells the scores alone
            same["answers"] += mine.extracted == verdict.extracted
        same["scores"] += mine.values == verdict.values == dict(row["scores"])
        if response["text"] == text:
            same["texts"] += 1
        else:
            found = {"index": document.index, "ours": dict(mine.values), "theirs": dict(verdict.values)}
            differing.append({**found, **parting(response["prompt"], response["text"], text)})
    means = {
        metric: {
            "ours": sum(dict(row["scores"])[metric] for row in got) / documents,
            "theirs": sum(verdict.values[metric] for verdict in verdicts) / documents,
        }
        for metric in task.metrics
    }
    return {"task": name, "documents": documents, "same": same, "metrics": means, "differing": differing}


def parting(prompt: str, ours: str, theirs: str) -> Mapping[str, Any]:
    """Where two texts part, and the two best logits there, by transformers, which reads the common tokens at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    start = tokenizer(prompt)["input_ids"]
    mine, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs))
    common = common_length(mine, other)
    with torch.inference_mode():
        logits = model(torch.tensor([start + mine[:common]])).logits[0, -1]
    best = logits.topk(2)
    return {
        "at_token": common,
        "best_two": [tokenizer.decode(token) for token in best.indices.tolist()],
        "logit_gap": float(best.values[0] - best.values[1]),
    }


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ours", "theirs", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True, choices=CONFIGS)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval")
    parser.add_argument("--seconds", type=float, default=280.0, help="after which lm-eval begins no other batch")
    options = parser.parse_args()
    if options.what == "ours":
        report = write_ours(options.task, options.documents, options.folder)
    elif options.what == "theirs":
        report = write_theirs(options.task, options.documents, options.folder, options.batch_size, options.seconds)
    else:
        report = compare(options.task, options.documents, options.folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
