"""MMLU 5-shot against lm-eval's Hugging Face backend: same machine, same model, same dtype, same questions.

    python -m tests.eval_benchmark --batch-sizes 1,4,8,16,32 --per-subject 10    # which batch size suits lm-eval
    python -m tests.eval_benchmark --batch-sizes 8                               # 200 questions with it

Needs what `make reference` installs. Loading the model is not counted on either side. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.models.hub import resolve_model
from tests.eval_runs import answers, run, write_table
from tests.lm_eval_reference import LmEval, data_folder, tables_of

SUBJECTS = ("anatomy", "formal_logic", "marketing", "world_religions")


def time_ours(model: str, dtype: str, per_subject: int, folder: Path) -> dict[str, Any]:
    backend = LocalBackend.open(EngineConfig(model=ModelConfig(model=model, dtype=dtype)))
    run("piqa", backend, Data(data_folder()), limit=2)  # compiles and warms up
    before = backend.usage
    started = time.perf_counter()
    predictions = []
    for subject in SUBJECTS:
        task = f"mmlu_{subject}"
        run(task, backend, Data(folder), folder / "run", num_fewshot=5, limit=per_subject)
        predictions += [extracted for extracted, _ in answers(folder / "run", task)]
    seconds = time.perf_counter() - started
    after = backend.usage
    assert before is not None
    assert after is not None
    backend.close()
    hit_rate = (after.cached_tokens - before.cached_tokens) / (after.prompt_tokens - before.prompt_tokens)
    return {"seconds": seconds, "prefix_hit_rate": hit_rate, "predictions": predictions}


def time_lm_eval(lm_eval: LmEval, files: dict[str, dict[str, Path]], per_subject: int, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    predictions = []
    for subject in SUBJECTS:
        directory = folder / subject
        directory.mkdir(parents=True)
        config = f"mmlu/default/mmlu_{subject}.yaml"
        answer = lm_eval.run(directory, config, files[subject], num_fewshot=5, limit=per_subject)
        for sample in answer.samples:
            logprobs = [request.logprob or 0.0 for request in sample.requests]
            predictions.append("ABCD"[logprobs.index(max(logprobs))])
    return {"seconds": time.perf_counter() - started, "predictions": predictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", default="8")
    parser.add_argument("--per-subject", type=int, default=50)
    options = parser.parse_args()
    report: dict[str, Any] = {"dtype": options.dtype, "questions": options.per_subject * len(SUBJECTS), "lm_eval": {}}
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
        for subject in SUBJECTS:
            tables = tables_of(f"mmlu_{subject}")
            source = Data(data_folder())
            files[subject] = {table.split: write_table(folder, table, source.rows(table)) for table in tables}
        ours = time_ours(options.model, options.dtype, options.per_subject, folder)
        for size in map(int, options.batch_sizes.split(",")):
            lm_eval = LmEval(resolve_model(options.model), batch_size=size, dtype=options.dtype)
            theirs = time_lm_eval(lm_eval, files, options.per_subject, folder / str(size))
            same = sum(a == b for a, b in zip(ours["predictions"], theirs.pop("predictions"), strict=True))
            report["lm_eval"][size] = {**theirs, "same_answers": same}
    best = min(each["seconds"] for each in report["lm_eval"].values())
    del ours["predictions"]
    print(json.dumps({**report, "rayllm": ours, "times_faster": best / ours["seconds"]}))


if __name__ == "__main__":
    main()
