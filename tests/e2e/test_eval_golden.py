"""What lm-eval 0.4.13 says of a few documents, without lm-eval: the short form of `test_eval_lm_eval.py`.

SmolLM2-135M-Instruct in float32. `python -m tests.e2e.test_eval_golden` writes the file anew with lm-eval itself, and a
test in the long form compares the two.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.models.hub import resolve_model
from tests.eval_documents import GOLDEN, Golden
from tests.eval_runs import rows, run
from tests.lm_eval_reference import LmEval, write_case

MODEL = "smollm2-135m"
PATH = Path(__file__).parents[1] / "golden" / "lm_eval.json"


@pytest.fixture(scope="module")
def backends():
    """The perplexity in windows of 64 tokens, so that a short text has several."""
    opened = [
        LocalBackend.open(EngineConfig(model=ModelConfig(model=MODEL, dtype="float32", max_model_len=length)))
        for length in (64, 1024)
    ]
    yield {"wikitext": opened[0], "": opened[1]}
    for backend in opened:
        backend.close()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.task)
def test_lm_eval_says_the_same(case, backends, tmp_path):
    golden = json.loads(PATH.read_text(encoding="utf-8"))[case.task]
    write_case(tmp_path, case)
    output = tmp_path / "run"
    backend = backends.get(case.task, backends[""])
    result = run(case.task, backend, Data(tmp_path), output, num_fewshot=case.num_fewshot)
    responses = [response for row in rows(output, case.task) for response in row["responses"]]
    assert [(r["prompt"], r["continuation"]) for r in responses] == [
        (request["prompt"], request["continuation"]) for request in golden["requests"]
    ]
    assert [r["logprob"] for r in responses] == pytest.approx([r["logprob"] for r in golden["requests"]], abs=1e-3)
    if case.task != "wikitext":
        assert [r["is_greedy"] for r in responses] == [request["is_greedy"] for request in golden["requests"]]
    got = {metric.name: metric.value for metric in result.metrics if not metric.group}
    assert {name: got[name] for name in golden["metrics"]} == pytest.approx(golden["metrics"], rel=1e-4)


def reference(lm_eval: LmEval, case: Golden, folder: Path) -> dict[str, Any]:
    """Of one case, in the shape that the file holds."""
    files = write_case(folder, case)
    max_length = 64 if case.task == "wikitext" else None
    answer = lm_eval.run(folder, case.config, files, num_fewshot=case.num_fewshot, max_length=max_length)
    requests = [request for sample in answer.samples for request in sample.requests]
    return {
        "requests": [
            {
                "prompt": request.prompt,
                "continuation": request.continuation,
                "logprob": request.logprob,
                "is_greedy": request.is_greedy,
            }
            for request in requests
        ],
        "metrics": {name: value for name, value in answer.results.items() if not name.endswith("_stderr")},
    }


if __name__ == "__main__":
    lm_eval = LmEval(resolve_model(MODEL))
    content = {}
    for case in GOLDEN:
        with tempfile.TemporaryDirectory() as folder:
            content[case.task] = reference(lm_eval, case, Path(folder))
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
